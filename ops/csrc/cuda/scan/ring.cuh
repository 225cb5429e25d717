// The rows of a walk, prefetched through shared memory.
//
// All rows of a walk are known before it begins. They are copied asynchronously into rings in shared memory, so that
// neither registers nor many instructions are spent on rows in flight:
//
//     nodes          a ring of kNodeSlots slots of kSlotRows rows, a lane each, 64 to 96 rows before they are needed
//     weights        of pixels likewise, if the scan has any, up to 64 rows ahead
//     tiles          a ring of kRingTiles tiles: kTileRows rows of kWarpChannels channels, 32 rows ahead
//
// Nodes come first, since they say which vertices' rows to copy.
#pragma once

#include "../common/addressing.cuh"
#include "../common/vector.cuh"
#include "plan.cuh"

namespace grootvl {

constexpr int kSlotRows = kWarpLanes;              // rows of a slot, a lane each
constexpr int kNodeSlots = 4;                      // slots whose nodes are there or in flight
constexpr int kTileRows = 8;                       // rows that are worked on together
constexpr int kRingTiles = kSlotRows / kTileRows;  // tiles in flight
constexpr int kNodeBytes = sizeof(uint32_t);

// What a walk reads of a row.
template <typename T, typename acc_t>
struct Row {
  uint32_t node;
  T data[4];
  acc_t sums[2];
  acc_t weights[2];
};

// The nodes of a walk over `count` rows. A slot is named by the first of its rows, `first`, a multiple of kSlotRows.
// Each lane copies, and marks, one node of a slot.
template <Sweep sweep>
struct NodeRing {
  const uint32_t* nodes;  // of the run, in postorder
  uint32_t memory;
  int count, last;

  __device__ NodeRing(const uint32_t* nodes, uint32_t memory, int count)
      : nodes(nodes), memory(memory), count(count), last(count - 1) {}

  // The place in the run of the i-th row of the walk.
  __device__ __forceinline__ int place(int i) const { return sweep == Sweep::kUp ? i : last - i; }

  __device__ __forceinline__ void fetch(int first) const {
    copy_async_4_bytes(lane_address(first), &nodes[place(min(first + int(threadIdx.x), last))]);
  }
  // This lane's node.
  __device__ __forceinline__ uint32_t own(int first) const {
    uint32_t node;
    load_shared(lane_address(first), node);
    return node;
  }
  __device__ __forceinline__ void mark_past(uint32_t node, int first) const {
    if (first + int(threadIdx.x) >= count) store_shared(lane_address(first), (node & kVertexMask) | kPast);
  }
  // Where the node of a row is, which is number `in_slot` of its slot.
  __device__ __forceinline__ uint32_t address(int first, int in_slot) const {
    return slot(first) + in_slot * kNodeBytes;
  }

 private:
  __device__ __forceinline__ uint32_t slot(int first) const {
    return memory + first / kSlotRows % kNodeSlots * (kSlotRows * kNodeBytes);
  }
  __device__ __forceinline__ uint32_t lane_address(int first) const { return slot(first) + threadIdx.x * kNodeBytes; }
};

// The weights of the same rows, of kWeights kinds. They pass through a register, since they may be too small for an
// asynchronous copy: each lane loads its row's weights two slots ahead, and stores them one slot ahead.
template <typename T, typename acc_t, int kWeights>
class WeightRing {
 public:
  // `weights` point to those of the image's first vertex, and the vertices' are so many bytes apart.
  __device__ WeightRing(const T* const* weights, const uint32_t* weight_bytes, uint32_t memory) : memory_(memory) {
    for (int m = 0; m < kWeights; ++m) weights_[m] = weights[m], weight_bytes_[m] = weight_bytes[m];
  }

  __device__ __forceinline__ void load(uint32_t vertex) {
    for (int m = 0; m < kWeights; ++m) pending_[m] = at_vertex(weights_[m], vertex, weight_bytes_[m]);
  }
  __device__ __forceinline__ void store(int first) const {
    for (int m = 0; m < kWeights; ++m) {
      store_shared(slot(m, first) + threadIdx.x * uint32_t(sizeof(acc_t)), static_cast<acc_t>(pending_[m]));
    }
  }
  __device__ __forceinline__ void read(int first, int in_slot, acc_t (&to)[2]) const {
    for (int m = 0; m < kWeights; ++m) load_shared(slot(m, first) + in_slot * uint32_t(sizeof(acc_t)), to[m]);
  }

 private:
  __device__ __forceinline__ uint32_t slot(int m, int first) const {
    return memory_ + (m * kNodeSlots + first / kSlotRows % kNodeSlots) * uint32_t(kSlotRows * sizeof(acc_t));
  }

  const T* weights_[kWeights + 1];
  uint32_t weight_bytes_[kWeights + 1];
  T pending_[kWeights + 1]{};
  uint32_t memory_;
};

// Copies tiles of kMatrices matrices (vertices, channels) of one type to shared memory, and reads them there. A lane
// reads its own channel.
template <typename T, int kMatrices>
class TileCopy {
 public:
  static constexpr int kTileBytes = kMatrices * kTileRows * kWarpChannels * sizeof(T);

  // `columns` point to this lane's channel at the first vertex; it is number `lane_channel` of the `warp_channels` that
  // the warp has. Whole vectors of 16 bytes are copied if `aligned`, single values otherwise.
  __device__ TileCopy(const T* const* columns, int lane_channel, int warp_channels, int channels, bool aligned)
      : row_bytes_(channels * sizeof(T)), aligned_(aligned) {
    const int vector = min(int(threadIdx.x) % kRowVectors, max(warp_channels * int(sizeof(T)) / kVectorBytes - 1, 0));
    for (int m = 0; m < kMatrices; ++m) {
      columns_[m] = aligned ? columns[m] - lane_channel + vector * (kVectorBytes / int(sizeof(T))) : columns[m];
    }
  }

  // Copies a tile to `to`, asynchronously if aligned; `vertex_of(j)` is the j-th row's vertex.
  template <typename VertexOf>
  __device__ __forceinline__ void fetch(uint32_t to, VertexOf vertex_of) const {
    if constexpr (kMatrices == 0) return;
    if (aligned_) {
#pragma unroll
      for (int first = 0; first < kTileRows; first += kRowsAtOnce) {
        const uint32_t vertex = vertex_of(first + threadIdx.x / kRowVectors);
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          copy_async_16_bytes(to + (m * kTileRows + first) * kRowBytes + threadIdx.x * kVectorBytes,
                              &at_vertex(columns_[m], vertex, row_bytes_));
        }
      }
      return;
    }
    T values[kMatrices + 1][kTileRows];
#pragma unroll
    for (int j = 0; j < kTileRows; ++j) {
      const uint32_t vertex = vertex_of(j);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) values[m][j] = at_vertex(columns_[m], vertex, row_bytes_);
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int j = 0; j < kTileRows; ++j) store_shared(address(to, m, j), values[m][j]);
    }
  }
  __device__ __forceinline__ void read(uint32_t tile, int matrix, int j, T& value) const {
    load_shared(address(tile, matrix, j), value);
  }

 private:
  static constexpr int kRowBytes = kWarpChannels * sizeof(T);
  static constexpr int kRowVectors = kRowBytes / kVectorBytes;  // lanes that copy a row
  static constexpr int kRowsAtOnce = kWarpLanes / kRowVectors;  // rows that a warp copies by one instruction

  __device__ static uint32_t address(uint32_t tile, int matrix, int j) {
    return tile + (matrix * kTileRows + j) * kRowBytes + threadIdx.x * uint32_t(sizeof(T));
  }

  const T* columns_[kMatrices + 1];
  uint32_t row_bytes_;
  bool aligned_;
};

// The tiles in flight, of matrices of type T and of sums.
template <typename T, int kMatrices, typename acc_t, int kSums>
struct TileRing {
  static constexpr uint32_t kSumsAt = TileCopy<T, kMatrices>::kTileBytes,
                            kTileBytes = kSumsAt + TileCopy<acc_t, kSums>::kTileBytes;

  const TileCopy<T, kMatrices>& data;
  const TileCopy<acc_t, kSums>& sums;
  int count;
  uint32_t memory;
  uint32_t oldest = memory;  // the tile to be read next, and then to be replaced

  __device__ __forceinline__ void read(int j, Row<T, acc_t>& row) const {
    for (int m = 0; m < kMatrices; ++m) data.read(oldest, m, j, row.data[m]);
    for (int m = 0; m < kSums; ++m) sums.read(oldest + kSumsAt, m, j, row.sums[m]);
  }

  // Replaces the oldest tile by the one of the rows from `first` on, whose nodes the lanes from `lane` on have in
  // `nodes`.
  __device__ __forceinline__ void fetch(int first, uint32_t nodes, int lane) {
    if (first < count) {
      const auto vertex_of = [&](int j) { return __shfl_sync(kAllLanes, nodes, lane + j) & kVertexMask; };
      data.fetch(oldest, vertex_of);
      sums.fetch(oldest + kSumsAt, vertex_of);
    }
    commit_async_copies();
    oldest = oldest == memory + (kRingTiles - 1) * kTileBytes ? memory : oldest + kTileBytes;
  }
};

// Shared memory of the rings of a walk: tiles of so many matrices and sums, nodes, and weights of so many kinds.
template <typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes(int matrices, int sums, int weights) {
  return kRingTiles * kTileRows * kWarpChannels * (matrices * sizeof(T) + sums * sizeof(acc_t)) +
         kNodeSlots * kSlotRows * (kNodeBytes + weights * sizeof(acc_t));
}

}  // namespace grootvl
