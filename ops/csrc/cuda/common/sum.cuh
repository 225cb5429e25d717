// Sums of the parts that the blocks of a kernel have written, in a fixed order.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace grootvl {

// `parts` (outer, count, inner) to `sums` (outer, inner). A block has blockDim.x columns, and blockDim.y threads for
// each.
template <typename acc_t, typename out_t>
__global__ void sum_parts_kernel(const acc_t* parts, int64_t count, int64_t inner, out_t* sums) {
  extern __shared__ char shared[];
  acc_t* of_threads = reinterpret_cast<acc_t*>(shared) + threadIdx.x;
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool valid = column < inner;
  const acc_t* first = parts + blockIdx.y * count * inner + (valid ? column : 0);
  acc_t sum = 0;
  constexpr int kAhead = 8;  // parts that are loaded together: the compiler would wait for each one
  for (int64_t part = threadIdx.y; part < count; part += kAhead * blockDim.y) {
    acc_t values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t next = part + i * blockDim.y;
      values[i] = next < count ? first[next * inner] : acc_t(0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += values[i];
  }
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y >= half && threadIdx.y < 2 * half) of_threads[threadIdx.y * blockDim.x] = sum;
    __syncthreads();
    if (threadIdx.y < half) sum += of_threads[(threadIdx.y + half) * blockDim.x];
  }
  if (valid && threadIdx.y == 0) sums[blockIdx.y * inner + column] = static_cast<out_t>(sum);
}

// The sums of (outer, count, inner) over the middle dimension, as a tensor of `sizes` and `type`, in one launch,
// without PyTorch's dispatcher.
inline Tensor sum_parts(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type) {
  const Tensor sums = empty(parts, sizes, type);
  const int64_t inner = sums.numel() / outer, count = parts.numel() / std::max<int64_t>(1, sums.numel());
  if (sums.numel() == 0) return sums;
  for_accumulation_type(parts.scalar_type(), [&](auto value) {
    using acc_t = decltype(value);
    // Eight columns fill a sector of memory. Several threads share a column where there are many parts and few columns.
    constexpr int64_t kManyColumns = 1 << 13;
    const dim3 block = count < 64 ? dim3(256, 1) : inner >= kManyColumns ? dim3(64, 4) : dim3(8, 64);
    const dim3 blocks((inner + block.x - 1) / block.x, outer);
    const size_t shared = block.y > 1 ? sizeof(acc_t) * block.x * block.y : 0;
    for_floating_type(type, [&](auto result) {
      using out_t = decltype(result);
      sum_parts_kernel<acc_t, out_t><<<blocks, block, shared, current_stream()>>>(
          parts.const_data_ptr<acc_t>(), count, inner, sums.mutable_data_ptr<out_t>());
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sums;
}

}  // namespace grootvl
