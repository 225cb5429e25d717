// Rows of a walk on their way from memory: copied asynchronously into shared memory, 32 rows ahead, in chunks of 16
// bytes, so that neither registers nor many instructions are spent on them.
#pragma once

#include "../common/addressing.cuh"

namespace grootvl {

constexpr int kBatch = 8;            // rows that are worked on together
constexpr int kDepth = 32 / kBatch;  // batches on their way
constexpr int kNodeSlots = 4;        // 32 rows each, whose nodes are there or on their way

// Rows of 32 channels of kMatrices (vertices, channels) matrices of one type, of which each lane reads its channel.
template <typename T, int kMatrices>
class RowFeed {
 public:
  static constexpr int kBatchBytes = kMatrices * kBatch * 32 * sizeof(T);

  // `columns` point to this lane's channel at the first vertex. Whole chunks of 16 bytes are copied if `aligned`.
  __device__ RowFeed(const T* const* columns, int channel_in_row, int channels_in_row, int channels, bool aligned)
      : row_bytes_(channels * sizeof(T)), aligned_(aligned) {
    const int chunk = min(int(threadIdx.x) % kChunks, max(channels_in_row * int(sizeof(T)) / 16 - 1, 0));
    for (int m = 0; m < kMatrices; ++m) {
      columns_[m] = aligned ? columns[m] - channel_in_row + chunk * (16 / int(sizeof(T))) : columns[m];
    }
  }

  // Brings a batch of rows to `to`, now or later; `vertex_of(j)` is the j-th row's vertex.
  template <typename VertexOf>
  __device__ __forceinline__ void fetch(uint32_t to, VertexOf vertex_of) const {
    if constexpr (kMatrices == 0) return;
    if (aligned_) {
#pragma unroll
      for (int first = 0; first < kBatch; first += kRowsAtATime) {
        const uint32_t vertex = vertex_of(first + threadIdx.x / kChunks);
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          copy_async_16_bytes(to + (m * kBatch + first) * kRowBytes + threadIdx.x * 16,
                              &at_vertex(columns_[m], vertex, row_bytes_));
        }
      }
      return;
    }
    T values[kMatrices + 1][kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const uint32_t vertex = vertex_of(j);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) values[m][j] = at_vertex(columns_[m], vertex, row_bytes_);
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) store_shared(address(to, m, j), values[m][j]);
    }
  }
  __device__ __forceinline__ void read(uint32_t from, int matrix, int j, T& value) const {
    load_shared(address(from, matrix, j), value);
  }

 private:
  static constexpr int kRowBytes = 32 * sizeof(T), kChunks = kRowBytes / 16, kRowsAtATime = 32 / kChunks;

  __device__ static uint32_t address(uint32_t batch, int matrix, int j) {
    return batch + (matrix * kBatch + j) * kRowBytes + threadIdx.x * uint32_t(sizeof(T));
  }

  const T* columns_[kMatrices + 1];
  uint32_t row_bytes_;
  bool aligned_;
};

}  // namespace grootvl
