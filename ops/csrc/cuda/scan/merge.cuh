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

// A thread takes kSize neighbouring channels.
template <int kSize, typename T, typename acc_t, typename out_t>
__global__ void merge_maps(Merge<T, acc_t, out_t> data) {
  await_kernels_before();
  const unsigned row_vectors = data.channels / kSize, thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t row = thread / row_vectors, i = int64_t(thread) * kSize, size = data.rows * data.channels;
  if (row >= data.rows) return;
  acc_t sum[kSize] = {}, values[kSize];
  if (data.accumulates) unpack(sum, load<kSize>(data.out + i));
#pragma unroll 4
  for (int s = 0; s < data.scans; ++s) {
    unpack(values, load<kSize>(data.maps + s * size + i));
    const acc_t weight = data.weights.data ? static_cast<acc_t>(*data.weights.of(s, row)) : acc_t(1);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[j] += weight * values[j];
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
