// The gradient of a bias: sums over the rows of a matrix.

#include "../../checks.h"
#include "../common/launch.cuh"
#include "../common/rows.cuh"
#include "../common/sum.cuh"
#include "../common/vector.cuh"

namespace grootvl {
namespace {

constexpr int kAhead = 8;
constexpr int kBlocks = 4;  // that a multiprocessor runs at a time

// Of `grad` (rows, columns); `parts` (gridDim.y, columns) are sums over the rows of a block.
template <int kWord, typename T, typename acc_t>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    bias_backward_kernel(const T* grad, int64_t rows, int columns, acc_t* parts) {
  await_kernels_before();
  const int first = blockIdx.x * blockDim.x * kWord, column = first + threadIdx.x * kWord;
  const bool inside = column < columns;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  acc_t sums[kWord] = {};
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; inside && row < rows; row += kAhead * step) {
    Vector<T, kWord> words[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) words[i] = load<kWord>(grad + min(row + i * step, rows - 1) * columns + column);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i * step >= rows) break;
#pragma unroll
      for (int k = 0; k < kWord; ++k) sums[k] += static_cast<acc_t>(words[i].values[k]);
    }
  }
  write_block_sums(sums, parts + int64_t(blockIdx.y) * columns + first, columns - first);
}

Tensor bias_backward(const Tensor& grad_) {
  check_columns("grad", grad_);
  const DeviceGuard guard(grad_);
  const Tensor grad = contiguous(grad_);
  const ScalarType accumulation = accumulation_type(grad);
  const int64_t columns = grad.size(1);
  if (grad.numel() == 0) return zeros(grad, {columns}, accumulation);
  Tensor sums;
  for_floating_type(grad.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using acc_t = Accumulation<T>;
    const auto launch_words = [&](auto word) {
      const RowBlocks blocks(grad, word(), kBlocks, kAhead);
      const Tensor parts = empty_parts(grad, {int64_t{blocks.grid.y}, columns}, accumulation);
      launch(bias_backward_kernel<word(), T, acc_t>, blocks.grid, blocks.block, blocks.shared<word(), acc_t>(),
             current_stream(), grad.const_data_ptr<T>(), grad.size(0), columns, parts.mutable_data_ptr<acc_t>());
      sums = sum_parts_later(parts, 1, {columns}, accumulation);
    };
    constexpr int kWord = kVectorBytes / sizeof(T);
    if (columns % kWord == 0 && is_aligned(grad.const_data_ptr())) {
      launch_words(std::integral_constant<int, kWord>());
    } else {
      launch_words(std::integral_constant<int, 1>());
    }
  });
  return sums;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("bias_backward", TORCH_BOX(&grootvl::bias_backward)); }
