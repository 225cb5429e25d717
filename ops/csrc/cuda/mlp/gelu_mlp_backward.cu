// Hidden values of an MLP and their gradients, from what its GELU takes and the gradient of what it gives, in one pass:
// what follows each product with these (hidden values), and the sums that are the gradient of a bias.
//
// A thread has the same kWord neighbouring columns of many rows. It loads the words of kAhead rows together.

#include <algorithm>

#include "../../checks.h"
#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "../common/rows.cuh"
#include "../common/sum.cuh"
#include "../common/vector.cuh"

namespace grootvl {
namespace {

constexpr int kThreads = kRowThreads;
constexpr int kAhead = 2;
constexpr int kBlocks = 5;  // that a multiprocessor runs at a time

// Matrices (rows, columns), all contiguous.
template <typename T, typename acc_t>
struct GeluData {
  const T *dhidden, *before;
  T *hidden, *dbefore;
  acc_t* parts;  // (gridDim.y, columns): sums of dbefore over the rows of a block
  int64_t rows;
  int columns;
};

// GELU by its approximation with tanh, v sigmoid(2 u) with u = sqrt(2 / pi) (v + 0.044715 v^3), and its slope.
template <typename acc_t>
__device__ __forceinline__ void gelu(acc_t v, acc_t& result, acc_t& slope) {
  constexpr acc_t kLinear = 1.595769121605731, kCubic = 0.044715 * kLinear;  // of 2 u
  const acc_t square = v * v;
  const acc_t gate = sigmoid(v * (kLinear + kCubic * square));
  result = v * gate;
  slope = gate + (result - result * gate) * (kLinear + 3 * kCubic * square);
}

template <int kWord, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocks) gelu_backward_kernel(GeluData<T, acc_t> data) {
  await_kernels_before();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kWord;
  const bool inside = column < data.columns;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  acc_t sums[kWord] = {};
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; inside && row < data.rows; row += kAhead * step) {
    Vector<T, kWord> before[kAhead], dhidden[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = min(row + i * step, data.rows - 1) * data.columns + column;
      before[i] = load<kWord>(data.before + at);
      dhidden[i] = load<kWord>(data.dhidden + at);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i * step >= data.rows) break;
      acc_t hidden[kWord], dbefore[kWord];
#pragma unroll
      for (int k = 0; k < kWord; ++k) {
        acc_t slope;
        gelu(static_cast<acc_t>(before[i].values[k]), hidden[k], slope);
        dbefore[k] = static_cast<acc_t>(dhidden[i].values[k]) * slope;
        sums[k] += dbefore[k];
      }
      const int64_t at = (row + i * step) * data.columns + column;
      store(data.hidden + at, hidden);
      store(data.dbefore + at, dbefore);
    }
  }
  const int first = blockIdx.x * blockDim.x * kWord;
  write_block_sums(sums, data.parts + int64_t(blockIdx.y) * data.columns + first, data.columns - first);
}

std::tuple<Tensor, Tensor, Tensor> gelu_mlp_backward(const Tensor& dhidden_, const Tensor& before_) {
  check_gelu_mlp_backward(dhidden_, before_);
  const DeviceGuard guard(before_);
  const Tensor dhidden = contiguous(dhidden_), before = contiguous(before_);
  const Tensor hidden = empty_like(before), dbefore = empty_like(before);
  const ScalarType accumulation = accumulation_type(before);
  if (before.numel() == 0) return {hidden, dbefore, zeros(before, {before.size(1)}, accumulation)};
  Tensor sums;
  for_floating_type(before.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using acc_t = Accumulation<T>;
    const auto launch_words = [&](auto word) {
      const RowBlocks blocks(before, word(), kBlocks, kAhead);
      const Tensor parts = empty_parts(before, {int64_t{blocks.grid.y}, before.size(1)}, accumulation);
      GeluData<T, acc_t> data{dhidden.const_data_ptr<T>(),     before.const_data_ptr<T>(),
                              hidden.mutable_data_ptr<T>(),    dbefore.mutable_data_ptr<T>(),
                              parts.mutable_data_ptr<acc_t>(), before.size(0),
                              static_cast<int>(before.size(1))};
      launch(gelu_backward_kernel<word(), T, acc_t>, blocks.grid, blocks.block, blocks.shared<word(), acc_t>(),
             current_stream(), data);
      sums = sum_parts_later(parts, 1, {before.size(1)}, accumulation);
    };
    constexpr int kWord = kVectorBytes / sizeof(T);
    if (before.size(1) % kWord == 0 && is_aligned(dhidden.const_data_ptr()) && is_aligned(before.const_data_ptr())) {
      launch_words(std::integral_constant<int, kWord>());
    } else {
      launch_words(std::integral_constant<int, 1>());
    }
  });
  return {hidden, dbefore, sums};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("gelu_mlp_backward", TORCH_BOX(&grootvl::gelu_mlp_backward)); }
