// Sums over the maps of several scans.
#pragma once

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "launch_scan.cuh"

namespace grootvl {

// out = sum over the scans s of w_s maps_s, + skip x, + what is in out already.
template <typename T, typename acc_t, typename out_t>
struct Merge {
  const T* maps;            // (scans, batch, L, D)
  PixelWeights<T> weights;  // no data: all are 1
  const T* x;               // (batch, L, D), or null for none
  const acc_t* skip;        // (D)
  out_t* out;               // (batch, L, D)
  bool accumulates;
  int scans;
  int channels;
  int64_t rows;  // batch L
};

// Adds kCount maps from number `first` on to the sums of kSize channels at i of a map's `size` values. All maps are read
// before any is added, because a read takes long.
template <int kCount, bool kWeighs, int kSize, typename T, typename acc_t, typename out_t>
__device__ __forceinline__ void add_maps(const Merge<T, acc_t, out_t>& data, int first, int64_t row, int64_t size,
                                         int64_t i, acc_t (&sum)[kSize]) {
  Vector<T, kSize> maps[kCount];
  acc_t weights[kCount], values[kSize];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    maps[j] = load<kSize>(data.maps + (first + j) * size + i);
    weights[j] = kWeighs ? static_cast<acc_t>(*data.weights.of(first + j, row)) : acc_t(1);
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    unpack(values, maps[j]);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[k] += weights[j] * values[k];
  }
}

template <bool kWeighs, int kSize, typename T, typename acc_t, typename out_t>
__device__ __forceinline__ void add_all_maps(const Merge<T, acc_t, out_t>& data, int64_t row, int64_t size, int64_t i,
                                             acc_t (&sum)[kSize]) {
  int s = 0;
  for (; s + 8 <= data.scans; s += 8) add_maps<8, kWeighs>(data, s, row, size, i, sum);
  for (; s + 4 <= data.scans; s += 4) add_maps<4, kWeighs>(data, s, row, size, i, sum);
  for (; s < data.scans; ++s) add_maps<1, kWeighs>(data, s, row, size, i, sum);
}

// A thread takes kSize neighbouring channels.
template <int kSize, typename T, typename acc_t, typename out_t>
__global__ void merge_maps(Merge<T, acc_t, out_t> data) {
  await_kernels_before();
  const unsigned row_vectors = data.channels / kSize, thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t row = thread / row_vectors, i = int64_t(thread) * kSize, size = data.rows * data.channels;
  if (row >= data.rows) return;
  acc_t sum[kSize] = {}, values[kSize];
  if (data.accumulates) unpack(sum, load<kSize>(data.out + i));
  if (data.weights.data != nullptr) {
    add_all_maps<true>(data, row, size, i, sum);
  } else {
    add_all_maps<false>(data, row, size, i, sum);
  }
  if (data.x != nullptr) {
    acc_t skip[kSize];
    unpack(values, load<kSize>(data.x + i));
    unpack(skip, load<kSize>(data.skip + thread % row_vectors * kSize));
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += skip[j] * values[j];
  }
  store(data.out + i, sum);
}

template <typename T, typename acc_t, typename out_t>
void merge(const Merge<T, acc_t, out_t>& data) {
  if (data.rows * data.channels == 0) return;
  constexpr int kThreads = 256, kSize = kVectorBytes / sizeof(T);
  const bool vectors = data.channels % kSize == 0 && is_aligned(data.maps) && is_aligned(data.x) &&
                       is_aligned(data.skip) && is_aligned(data.out);
  const int64_t threads = data.rows * data.channels / (vectors ? kSize : 1);
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  GROOTVL_CHECK(blocks <= UINT32_MAX / kThreads, "the tensors are too large for one scan");
  launch(vectors ? merge_maps<kSize, T, acc_t, out_t> : merge_maps<1, T, acc_t, out_t>, static_cast<unsigned>(blocks),
         kThreads, 0, current_stream(), data);
}

}  // namespace grootvl
