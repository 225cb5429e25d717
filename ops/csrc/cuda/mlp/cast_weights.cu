// Weights in the precision of the products that read them: all weights of a layer in one launch.

#include <algorithm>

#include "../../checks.h"
#include "../common/launch.cuh"
#include "../common/vector.cuh"

namespace grootvl {
namespace {

constexpr int kThreads = 256;
constexpr int kWord = 4;  // values that a thread converts at once

// A matrix (rows, columns), and the result (padded rows, padded columns), whose other values are zeros.
template <typename from_t, typename to_t>
struct Weight {
  const from_t* from;
  to_t* to;
  int64_t count, padded_count;  // values; of the result
  int columns, padded_columns;
  bool words;  // whether the values of both have the same places, and words of them fit
};

template <typename from_t, typename to_t>
struct Weights {
  Weight<from_t, to_t> of[kMaxCastWeights];
};

template <typename from_t, typename to_t>
__global__ void __launch_bounds__(kThreads) cast_kernel(Weights<from_t, to_t> weights) {
  await_kernels_before();
  const auto& weight = weights.of[blockIdx.y];
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  if (weight.words) {
    for (int64_t i = thread * kWord; i < weight.padded_count; i += threads * kWord) {
      from_t values[kWord] = {};
      if (i < weight.count) unpack(values, load<kWord>(weight.from + i));
      store(weight.to + i, values);
    }
    return;
  }
  for (int64_t i = thread; i < weight.padded_count; i += threads) {
    const int64_t row = i / weight.padded_columns;
    const int column = i - row * weight.padded_columns;
    const int64_t at = row * weight.columns + column;
    weight.to[i] = static_cast<to_t>(column < weight.columns && at < weight.count ? weight.from[at] : from_t(0));
  }
}

std::vector<Tensor> cast_weights(std::vector<Tensor> weights, std::vector<int64_t> rows, std::vector<int64_t> columns,
                                 ScalarType dtype) {
  check_cast_weights(weights, rows, columns, dtype);
  const DeviceGuard guard(weights[0]);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = contiguous(weights[i]);
    const bool is_vector = weights[i].dim() == 1;
    const int64_t sizes[] = {rows[i], columns[i]};
    results.push_back(empty(weights[i], is_vector ? Sizes(sizes + 1, 1) : Sizes(sizes, 2), dtype));
  }
  for_floating_type(weights[0].scalar_type(), [&](auto from) {
    for_floating_type(dtype, [&](auto to) {
      using from_t = decltype(from);
      using to_t = decltype(to);
      Weights<from_t, to_t> all{};
      int64_t most = 0;
      for (size_t i = 0; i < weights.size(); ++i) {
        auto& weight = all.of[i];
        weight.from = weights[i].const_data_ptr<from_t>();
        weight.to = results[i].mutable_data_ptr<to_t>();
        weight.count = weights[i].numel();
        weight.padded_count = results[i].numel();
        weight.columns = static_cast<int>(weights[i].size(-1));
        weight.padded_columns = static_cast<int>(columns[i]);
        weight.words = weight.columns == weight.padded_columns && weight.count % kWord == 0 &&
                       weight.padded_count % kWord == 0 && is_aligned(weight.from, sizeof(from_t) * kWord) &&
                       is_aligned(weight.to, sizeof(to_t) * kWord);
        most = std::max(most, weight.padded_count);
      }
      if (most == 0) return;
      const int64_t blocks = (most + kThreads * kWord - 1) / (kThreads * kWord);
      const int64_t at_once = int64_t{8} * current_limits().multiprocessors;
      launch(cast_kernel<from_t, to_t>, dim3(std::min(blocks, at_once), weights.size()), dim3(kThreads), 0,
             current_stream(), all);
    });
  });
  return results;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("cast_weights", TORCH_BOX(&grootvl::cast_weights)); }
