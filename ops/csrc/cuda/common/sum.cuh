// Sums over the threads of a block, and of the parts that the blocks of a kernel have written, in a fixed order.
#pragma once

#include "device.cuh"

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

// The sums of (outer, count, inner) over the middle dimension, as a tensor of `sizes` and `type`, in one launch,
// without PyTorch's dispatcher.
Tensor sum_parts(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type);

// Memory for the parts of `sum_parts_later`.
Tensor empty_parts(const Tensor& like, Sizes sizes, ScalarType type);

// The same as `sum_parts` for gradients of parameters, which nothing reads before the end of a backward pass. Between
// the operations `sums_wait` and `sums_run` it only takes note, and the latter computes the sums of all operations in
// one launch. Parts, and sums, share allocations then.
Tensor sum_parts_later(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type);

// Computes the sums that wait, for whoever reads them at once.
void compute_waiting_sums();

}  // namespace grootvl
