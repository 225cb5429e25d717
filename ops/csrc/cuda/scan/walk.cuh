// How a warp goes over the rows of a run, and the recurrences of the two sweeps (scan.cuh).
#pragma once

#include <type_traits>

#include "discretise.cuh"
#include "plan.cuh"
#include "ring.cuh"
#include "stack.cuh"

namespace grootvl {

// Shared memory of the ring for the sweep up, and for the larger of both sweeps.
template <Pass pass, bool kSelective, typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes_up() {
  return ring_bytes<T, acc_t>(1 + num_operands(pass), 0, kSelective);
}
template <Pass pass, bool kSelective, typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes_of() {
  constexpr bool kReadsX = reads_x_down(pass, kSelective);
  const uint32_t up = ring_bytes_up<pass, kSelective, T, acc_t>();
  const uint32_t down = ring_bytes<T, acc_t>(1 + kReadsX, num_between_sweeps(pass), kSelective && kReadsX);
  if (is_gradient(pass)) return ring_bytes<T, acc_t>(4, 0, 2);
  return up > down ? up : down;
}

// The run that a warp walks, and its lane's channel.
struct RunItem {
  // Number of the scan, first row of the image in (batch, L), of the map in (maps, L), and of its tree in (trees, L).
  int scan;
  int64_t rows, map_rows, tree_rows;
  int64_t column, map_column;  // the channel in those rows of (batch, L, D) and of (maps, L, D)
  int64_t at_run;              // of run and channel in (maps, runs, D)
  int begin, end, channel;
  unsigned channel_group;  // number of the warp's group of kWarpChannels channels
  int warp_channels;       // channels in that group, fewer in the last one
  bool valid;              // there is such a run
  bool active;             // and such a channel

  template <typename T, typename acc_t>
  __device__ RunItem(const ScanData<T, acc_t>& data, const Plan& plan) {
    const unsigned groups = (data.channels + kWarpChannels - 1) / kWarpChannels;
    const unsigned map = blockIdx.x / groups / plan.runs.capacity, run = blockIdx.x / groups % plan.runs.capacity;
    const int64_t tree = data.tree_of(map);
    scan = map / data.batch;
    channel_group = blockIdx.x % groups;
    channel = channel_group * kWarpChannels + threadIdx.x;
    warp_channels = min(data.channels - int(channel_group) * kWarpChannels, kWarpChannels);
    active = channel < data.channels;
    channel = min(channel, data.channels - 1);  // idle lanes read with the others, and write nothing
    map_rows = int64_t(map) * data.num_vertices;
    rows = int64_t(map % data.batch) * data.num_vertices;
    tree_rows = tree * data.num_vertices;
    column = rows * data.channels + channel;
    map_column = map_rows * data.channels + channel;
    at_run = (int64_t(map) * plan.runs.capacity + run) * data.channels + channel;
    valid = run < plan.runs.count(tree);
    if (!valid) return;
    begin = 0, end = data.num_vertices;
    if (!plan.runs.several()) return;
    begin = plan.runs.begin(tree, run);
    end = plan.runs.end[tree * plan.runs.capacity + run];
  }

  __device__ __forceinline__ int length() const { return end - begin; }
  __device__ __forceinline__ const uint32_t* nodes(const Plan& plan) const { return plan.nodes + tree_rows + begin; }
  // Where the map's sums over the warp's channels begin in (groups of channels, maps, L).
  template <typename T, typename acc_t>
  __device__ __forceinline__ int64_t of_channel_group(const ScanData<T, acc_t>& data) const {
    return int64_t(channel_group) * data.maps * data.num_vertices + map_rows;
  }
  // The number of the lane's channel among those of the warp.
  __device__ __forceinline__ int lane_channel() const { return channel % kWarpChannels; }
};

// Goes over the `count` rows of a run, in the direction of a sweep; `nodes` are the run's, in postorder. For each tile
// it calls `read(row, i)` for every row, which may add what does not pass through the rings; `visit(row, j, i,
// interior)` for every row in turn; and `finish(rows)`. Here j is the row's place in the tile and i its place in the
// run. kWeights kinds of `weights`, so many bytes apart, are read. `memory` is the shared memory of the rings.
//
// The last tile is filled up with copies of the last row, marked kPast, with places outside of the run: a walk without
// branches is faster than one that stops at any row. All lanes of a warp take the same branches. If `long_run`, there
// is separate code for tiles that have neither a root nor a kPast row, as most have then; for them `interior` is
// std::true_type. In short runs the two would only compete for the instruction cache.
template <Sweep sweep, int kWeights, typename T, int kMatrices, typename acc_t, int kSums, typename Read,
          typename Visit, typename Finish>
__device__ __forceinline__ void walk(const uint32_t* nodes, int count, const TileCopy<T, kMatrices>& data,
                                     const TileCopy<acc_t, kSums>& sums, const T* const* weights,
                                     const uint32_t* weight_bytes, uint32_t memory, bool long_run, Read read,
                                     Visit visit, Finish finish) {
  constexpr uint32_t kTilesBytes = kRingTiles * TileRing<T, kMatrices, acc_t, kSums>::kTileBytes,
                     kNodesBytes = kNodeSlots * kSlotRows * kNodeBytes;
  static_assert(kTilesBytes + kNodesBytes + kWeights * kNodeSlots * kSlotRows * sizeof(acc_t) ==
                ring_bytes<T, acc_t>(kMatrices, kSums, kWeights));
  const NodeRing<sweep> node_ring(nodes, memory + kTilesBytes, count);
  WeightRing<T, acc_t, kWeights> weight_ring(weights, weight_bytes, memory + kTilesBytes + kNodesBytes);
  TileRing<T, kMatrices, acc_t, kSums> tile_ring{data, sums, count, memory};
  const auto load_weights = [&](int first) {
    if constexpr (kWeights > 0) weight_ring.load(node_ring.own(first) & kVertexMask);
  };
  const auto store_weights = [&](int first) {
    if constexpr (kWeights > 0) weight_ring.store(first);
  };

  if constexpr (kSums > 0) __threadfence();  // asynchronous copies are not ordered with the stores of the sums
  __syncwarp();
  for (int first = 0; first < kSlotRows * (kNodeSlots - 1); first += kSlotRows) node_ring.fetch(first);
  commit_async_copies();
  await_async_copies<0>();
  const uint32_t first_nodes = node_ring.own(0);
  node_ring.mark_past(first_nodes, 0);
  for (int first = 0; first < kSlotRows; first += kTileRows) tile_ring.fetch(first, first_nodes, first);
  load_weights(0);
  store_weights(0);
  load_weights(kSlotRows);
  for (int slot_first = 0; slot_first < count; slot_first += kSlotRows) {
    const int next_first = slot_first + kSlotRows;
    await_async_copies<kRingTiles - 1>();  // the next slot's nodes were committed before the tiles in flight
    node_ring.fetch(slot_first + kSlotRows * (kNodeSlots - 1));
    const uint32_t next_nodes = node_ring.own(next_first);
    node_ring.mark_past(next_nodes, next_first);
    store_weights(next_first);
    load_weights(next_first + kSlotRows);
#pragma unroll 1
    for (int in_slot = 0; in_slot < kSlotRows; in_slot += kTileRows) {
      const int first = slot_first + in_slot;
      if (first >= count) break;
      await_async_copies<kRingTiles - 1>();  // only the oldest tile must have arrived
      __syncwarp();
      Row<T, acc_t> rows[kTileRows];
      uint32_t flags = 0;
#pragma unroll
      for (int j = 0; j < kTileRows; ++j) {
        load_shared(node_ring.address(slot_first, in_slot + j), rows[j].node);
        flags |= rows[j].node;
        tile_ring.read(j, rows[j]);
        weight_ring.read(slot_first, in_slot + j, rows[j].weights);
        read(rows[j], node_ring.place(first + j));
      }
      __syncwarp();  // all lanes have read the tile
      tile_ring.fetch(first + kSlotRows, next_nodes, in_slot);
      if (!long_run || flags & (kRoot | kPast)) {
#pragma unroll
        for (int j = 0; j < kTileRows; ++j) visit(rows[j], j, node_ring.place(first + j), std::false_type());
      } else {
#pragma unroll
        for (int j = 0; j < kTileRows; ++j) visit(rows[j], j, node_ring.place(first + j), std::true_type());
      }
      finish(rows);
    }
  }
  await_async_copies<0>();  // nodes beyond the run may be in flight to memory that will be used for something else
}

// What turns the value read for a row into its decay, for this lane's channel.
template <bool kSelective, typename T, typename acc_t, typename Item>
__device__ __forceinline__ auto discretisation(const ScanData<T, acc_t>& data, const Item& item) {
  if constexpr (kSelective) {
    return Discretisation<acc_t>(data.delta_bias[item.scan * data.delta_bias_stride + item.channel],
                                 data.A_log[int64_t(item.scan) * data.channels + item.channel]);
  } else {
    return GivenDecay<acc_t>();
  }
}

template <typename T, typename acc_t, typename Item>
__device__ __forceinline__ const T* decay_or_raw_delta(const ScanData<T, acc_t>& data, const Item& item) {
  return data.decay_or_raw_delta + item.scan * data.raw_delta_stride + item.column;
}

// The sweep up a run. E is what the runs below bring. Calls `visit(operand, node, i, decay, u, passed_on, interior)`
// for each row and operand, with what the vertex adds to its parent's u.
template <Pass pass, bool kSelective, typename T, typename acc_t, typename Visit>
__device__ __forceinline__ void walk_up(const ScanData<T, acc_t>& data, const Plan& plan, const RunItem& item,
                                        uint32_t ring_memory, bool long_run, Stack<acc_t> (&stacks)[2],
                                        const acc_t (&E)[num_operands(pass)], Visit visit) {
  constexpr int kOperands = num_operands(pass);
  constexpr bool kGradient = is_gradient(pass);  // the operand is the output's gradient, weighed
  const T *x = data.x + item.column, *grad = data.grad + item.column;
  const T* columns[] = {decay_or_raw_delta(data, item), x_operand(pass) == 0 && !kGradient ? x : grad,
                        x_operand(pass) == 0 ? grad : x};
  const TileCopy<T, 1 + kOperands> rows(columns, item.lane_channel(), item.warp_channels, data.channels, data.aligned);
  const TileCopy<acc_t, 0> no_sums(nullptr, 0, 0, 0, true);
  const PixelWeights<T>& weights = kGradient ? data.output_weight : data.input_weight;
  const T* first_weights[] = {weights.of(item.scan, item.rows)};
  const uint32_t weight_bytes[] = {uint32_t(weights.vertex_stride * sizeof(T))};
  const auto discretise = discretisation<kSelective>(data, item);
  acc_t sum[kOperands];  // over the children of the next vertex
  for (int operand = 0; operand < kOperands; ++operand) sum[operand] = E[operand];
  const auto visit_row = [&](const Row<T, acc_t>& row, int, int i, auto interior) {
    const uint32_t node = row.node;
    acc_t decay = static_cast<acc_t>(row.data[0]), own[kOperands];
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) own[operand] = static_cast<acc_t>(row.data[1 + operand]);
    if constexpr (kSelective) {
      const auto step = discretise(decay);
      own[x_operand(pass)] *= kGradient ? row.weights[0] : step.delta * row.weights[0];
      decay = step.decay;
    }
    if (!interior && node & kRoot) decay = 0;
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) {
      acc_t u = own[operand];
      if (!sweeps_up(pass, operand)) {  // a vertex's own value is all there is
        visit(operand, node, i, decay, u, acc_t(0), interior);
        continue;
      }
      stacks[operand].template push_or_add<kPush>(node, sum[operand], u);
      sum[operand] = decay * u;
      visit(operand, node, i, decay, u, sum[operand], interior);
      stacks[operand].template pop_and_add<kLight>(node, sum[operand]);
    }
  };
  walk<Sweep::kUp, kSelective>(
      item.nodes(plan), item.length(), rows, no_sums, first_weights, weight_bytes, ring_memory, long_run,
      [](auto&, int) {}, visit_row,
      [&](const auto&) {
        for (int operand = 0; operand < kOperands; ++operand) stacks[operand].stay_inside();
      });
}

}  // namespace grootvl
