// What belongs to one state, or to some states, of tensors of all.
#pragma once

#include "../common/device.cuh"

namespace grootvl {

// What belongs to one state of weights (B, L) for one or (B, L, N) for several: a (B, L) view.
inline Tensor column_of(const Tensor& weights, int64_t state) {
  return weights.dim() == 2 ? weights : select(weights, 2, state);
}

// The same as a (B, L, 1) view.
inline Tensor state_of(const Tensor& weights, int64_t state) {
  const Tensor column = column_of(weights, state);
  return strided(column, {column.size(0), column.size(1), 1}, {column.stride(0), column.stride(1), 1});
}

inline Tensor multiply(const Tensor& map, const Tensor& weights) { return call("aten::mul", "Tensor", map, weights); }

template <typename T, typename acc_t>
__global__ void add_kernel(acc_t* sum, const T* terms, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < count) sum[i] += static_cast<acc_t>(terms[i]);
}

// sum += terms, of one shape and contiguous; `sum` of the accumulation type of the terms.
inline void add(const Tensor& sum, const Tensor& terms) {
  constexpr int kThreads = 256;
  const int64_t count = sum.numel();
  if (count == 0) return;
  for_floating_type(terms.scalar_type(), [&](auto value) {
    using T = decltype(value);
    add_kernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, current_stream()>>>(
        sum.mutable_data_ptr<Accumulation<T>>(), terms.const_data_ptr<T>(), count);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Weights (B, L, scans), or (B, L) of one scan, from sums (scans B, L), in the type of `like`.
inline Tensor as_weights(const Tensor& sums, const Tensor& like) {
  const Tensor result = empty_like(like);
  const int64_t batch = like.size(0), length = like.size(1);
  if (like.dim() == 2) {
    copy(result, reshaped(sums, like.sizes()));
  } else {
    copy(result, strided(sums, like.sizes(), {length, 1, batch * length}));
  }
  return result;
}

}  // namespace grootvl
