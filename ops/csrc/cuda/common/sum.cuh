// Sums over the threads of a block, and of the parts that the blocks of a kernel have written, in a fixed order.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "launch.cuh"
#include "warp.cuh"

namespace grootvl {

// Writes sums over threadIdx.y of a block's values: kCount for each threadIdx.x, side by side from `to` on, at most
// `most`. It needs shared memory for all values.
template <int kCount, typename acc_t>
__device__ __forceinline__ void write_block_sums(const acc_t (&values)[kCount], acc_t* to, int64_t most) {
  extern __shared__ __align__(16) unsigned char shared[];
  acc_t* of_rows = reinterpret_cast<acc_t*>(shared);  // (blockDim.y, width)
  const int width = blockDim.x * kCount;
  __syncthreads();  // the memory may have been used before
#pragma unroll
  for (int i = 0; i < kCount; ++i) of_rows[threadIdx.y * width + threadIdx.x * kCount + i] = values[i];
  __syncthreads();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < width && i < most; i += blockDim.x * blockDim.y) {
    acc_t total = 0;
    for (unsigned row = 0; row < blockDim.y; ++row) total += of_rows[row * width + i];
    to[i] = total;
  }
}

constexpr int kPartsAhead = 8;  // parts that a thread loads together: the compiler would wait for each one

// `parts` (outer, count, inner) to `sums` (outer, inner). A block has kColumns columns, and blockDim.y threads for
// each.
template <int kColumns, typename acc_t, typename out_t>
__global__ void __launch_bounds__(kMaxBlockThreads)
    sum_parts_kernel(const acc_t* parts, int count, int inner, out_t* sums) {
  await_kernels_before();
  const int column = blockIdx.x * kColumns + threadIdx.x;
  const bool valid = column < inner;
  const acc_t* first = parts + blockIdx.y * int64_t{count} * inner + (valid ? column : 0);
  acc_t sum = 0;
  for (int part = threadIdx.y; part < count; part += kPartsAhead * blockDim.y) {
    acc_t values[kPartsAhead];
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) {
      const int next = part + i * blockDim.y;
      values[i] = next < count ? first[int64_t{next} * inner] : acc_t(0);
    }
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) sum += values[i];
  }
  constexpr int kRows = kWarpLanes / kColumns;  // of a warp
  const auto sum_rows = [&] {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance >= kColumns; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
  };
  sum_rows();
  if (blockDim.y > kRows) {
    __shared__ acc_t of_warps[kMaxBlockThreads / kWarpLanes][kColumns];
    if (threadIdx.y % kRows == 0) of_warps[threadIdx.y / kRows][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y >= kRows) return;
    sum = 0;
    for (unsigned warp = threadIdx.y; warp < blockDim.y / kRows; warp += kRows) sum += of_warps[warp][threadIdx.x];
    sum_rows();
  }
  if (valid && threadIdx.y == 0) sums[blockIdx.y * int64_t{inner} + column] = static_cast<out_t>(sum);
}

// The same with one thread for each column, for many columns.
template <typename acc_t, typename out_t>
__global__ void sum_long_parts_kernel(const acc_t* parts, int64_t count, int64_t inner, out_t* sums) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= inner) return;
  const acc_t* next = parts + blockIdx.y * count * inner + column;
  acc_t sum = 0;
  for (int64_t part = 0; part < count; part += kPartsAhead) {
    acc_t values[kPartsAhead];
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i, next += inner) values[i] = part + i < count ? *next : acc_t(0);
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) sum += values[i];
  }
  sums[blockIdx.y * inner + column] = static_cast<out_t>(sum);
}

// The sums of (outer, count, inner) over the middle dimension, as a tensor of `sizes` and `type`, in one launch,
// without PyTorch's dispatcher.
inline Tensor sum_parts(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type) {
  const Tensor sums = empty(parts, sizes, type);
  const int64_t inner = sums.numel() / outer, count = parts.numel() / std::max<int64_t>(1, sums.numel());
  if (sums.numel() == 0) return sums;
  for_accumulation_type(parts.scalar_type(), [&](auto value) {
    using acc_t = decltype(value);
    for_floating_type(type, [&](auto result) {
      using out_t = decltype(result);
      const auto launch_columns = [&](auto columns) {
        // As many threads share a column as load all parts at once, if a block can have them.
        constexpr int kRows = kWarpLanes / columns();  // of a warp
        constexpr int64_t kMostWarps = kMaxBlockThreads / kWarpLanes;
        const int64_t warps = (count + kPartsAhead * kRows - 1) / (kPartsAhead * kRows);
        const dim3 block(columns(), std::min(std::max<int64_t>(warps, 1), kMostWarps) * kRows);
        launch(sum_parts_kernel<columns(), acc_t, out_t>, dim3((inner + columns() - 1) / columns(), outer), block, 0,
               current_stream(), parts.const_data_ptr<acc_t>(), count, inner, sums.mutable_data_ptr<out_t>());
      };
      constexpr int64_t kManyColumns = 1 << 13, kThreadsForAll = 1 << 15, kMostParts = 1 << 30;
      if (inner >= kThreadsForAll || count > kMostParts) {
        constexpr int kThreads = 256;
        const dim3 blocks((inner + kThreads - 1) / kThreads, outer);
        sum_long_parts_kernel<acc_t, out_t><<<blocks, kThreads, 0, current_stream()>>>(
            parts.const_data_ptr<acc_t>(), count, inner, sums.mutable_data_ptr<out_t>());
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      } else if (inner >= kManyColumns) {
        launch_columns(std::integral_constant<int, kWarpLanes>());
      } else {  // eight columns fill a sector of memory
        launch_columns(std::integral_constant<int, 8>());
      }
    });
  });
  return sums;
}

}  // namespace grootvl
