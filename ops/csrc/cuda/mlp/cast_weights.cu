// Weights in the precision of the products that read them: many weights in one launch.

#include <algorithm>

#include "../../checks.h"
#include "../common/launch.cuh"
#include "../common/shares.cuh"
#include "../common/vector.cuh"
#include "../common/warp.cuh"

namespace grootvl {
namespace {

constexpr int kWord = 4;        // values that a thread converts at once
constexpr int kWordsAhead = 4;  // words that it loads together: the compiler would wait for each one
constexpr int kThreadValues = kWord * kWordsAhead;
constexpr int kMostWeights = 64;  // of a launch

// A matrix (rows, columns), and the result (padded rows, padded columns), with zeros where the matrix has no values.
// The result may also have fewer rows or columns.
template <typename from_t, typename to_t>
struct Weight {
  const from_t* from;
  to_t* to;
  int64_t count, padded_count;  // values; of the result
  int columns, padded_columns;
  int first_block;
  bool words;  // whether the values of both have the same places, and words of them fit
};

template <typename from_t, typename to_t>
struct Weights {
  Weight<from_t, to_t> of[kMostWeights];
  int count, blocks;
};
static_assert(sizeof(Weights<double, double>) <= 4096, "the parameters of a kernel");

template <int kThreads, typename from_t, typename to_t>
__device__ __forceinline__ void cast_block(const Weights<from_t, to_t>& weights, int block) {
  const Weight<from_t, to_t>& weight = find_share(weights.of, weights.count, block);
  const int64_t first = int64_t(block - weight.first_block) * (kThreads * kThreadValues);
  if (weight.words) {
    from_t values[kWordsAhead][kWord] = {};
#pragma unroll
    for (int i = 0; i < kWordsAhead; ++i) {
      const int64_t at = first + (i * kThreads + threadIdx.x) * kWord;
      if (at < weight.count) unpack(values[i], load<kWord>(weight.from + at));
    }
#pragma unroll
    for (int i = 0; i < kWordsAhead; ++i) {
      const int64_t at = first + (i * kThreads + threadIdx.x) * kWord;
      if (at < weight.padded_count) store(weight.to + at, values[i]);
    }
    return;
  }
  const int64_t end = std::min(first + kThreads * kThreadValues, weight.padded_count);
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const int64_t row = i / weight.padded_columns;
    const int column = i - row * weight.padded_columns;
    const int64_t at = row * weight.columns + column;
    weight.to[i] = static_cast<to_t>(column < weight.columns && at < weight.count ? weight.from[at] : from_t(0));
  }
}

template <int kThreads, typename from_t, typename to_t>
__global__ void __launch_bounds__(kThreads) cast_kernel(const __grid_constant__ Weights<from_t, to_t> weights) {
  await_kernels_before();
  for (int block = blockIdx.x; block < weights.blocks; block += gridDim.x) cast_block<kThreads>(weights, block);
}

// By at most `most` blocks.
template <int kThreads>
void cast(std::vector<Tensor> weights, const std::vector<Tensor>& results, int64_t most) {
  constexpr int64_t kBlockValues = kThreads * kThreadValues;
  for_floating_type(weights[0].scalar_type(), [&](auto from) {
    for_floating_type(results[0].scalar_type(), [&](auto to) {
      using from_t = decltype(from);
      using to_t = decltype(to);
      Weights<from_t, to_t> all{};
      const auto launch_all = [&] {
        if (all.blocks > 0) {
          launch(cast_kernel<kThreads, from_t, to_t>, dim3(std::min<int64_t>(all.blocks, most)), dim3(kThreads), 0,
                 current_stream(), all);
        }
        all.count = all.blocks = 0;
      };
      for (size_t i = 0; i < weights.size(); ++i) {
        weights[i] = contiguous(weights[i]);
        const int64_t blocks = (results[i].numel() + kBlockValues - 1) / kBlockValues;
        constexpr int64_t kMostBlocks = INT32_MAX / 2;
        GROOTVL_CHECK(blocks <= kMostBlocks, "a weight is too large: ", results[i].sizes());
        if (blocks == 0) continue;
        if (all.count == kMostWeights || all.blocks + blocks > kMostBlocks) launch_all();
        auto& weight = all.of[all.count++];
        weight.from = weights[i].const_data_ptr<from_t>();
        weight.to = results[i].mutable_data_ptr<to_t>();
        weight.count = weights[i].numel();
        weight.padded_count = results[i].numel();
        weight.columns = static_cast<int>(weights[i].size(-1));
        weight.padded_columns = static_cast<int>(results[i].size(-1));
        weight.first_block = all.blocks;
        weight.words = weight.columns == weight.padded_columns && weight.count % kWord == 0 &&
                       weight.padded_count % kWord == 0 && is_aligned(weight.from, sizeof(from_t) * kWord) &&
                       is_aligned(weight.to, sizeof(to_t) * kWord);
        all.blocks += static_cast<int>(blocks);
      }
      launch_all();
    });
  });
}

// Converts weights into tensors that are there; if `beside` the kernels of another stream, which need the
// multiprocessors more than this needs them, by few blocks.
void cast_weights_into(std::vector<Tensor> results, std::vector<Tensor> weights, bool beside) {
  GROOTVL_CHECK(results.size() == weights.size() && !results.empty(), "results and weights must be as many, got ",
                results.size(), " and ", weights.size());
  std::vector<int64_t> rows, columns;
  for (size_t i = 0; i < results.size(); ++i) {
    const Tensor& result = results[i];
    GROOTVL_CHECK(result.is_contiguous() && result.dim() >= 1 && result.dim() == weights[i].dim() &&
                      result.scalar_type() == results[0].scalar_type() && result.device() == weights[0].device(),
                  "results must be contiguous, of one type, on the device of the weights, and vectors and matrices as "
                  "these are");
    rows.push_back(result.dim() == 1 ? 1 : result.size(0));
    columns.push_back(result.size(-1));
  }
  check_cast_weights(weights, rows, columns, results[0].scalar_type());
  const DeviceGuard guard(weights[0]);
  if (beside) {
    cast<kMaxBlockThreads>(std::move(weights), results, std::max(1, current_limits().multiprocessors / 4));
  } else {
    cast<256>(std::move(weights), results, INT32_MAX);
  }
}

std::vector<Tensor> cast_weights(std::vector<Tensor> weights, std::vector<int64_t> rows, std::vector<int64_t> columns,
                                 ScalarType dtype) {
  check_cast_weights(weights, rows, columns, dtype);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool is_vector = weights[i].dim() == 1;
    const int64_t sizes[] = {rows[i], columns[i]};
    results.push_back(empty(weights[i], is_vector ? Sizes(sizes + 1, 1) : Sizes(sizes, 2), dtype));
  }
  cast_weights_into(results, std::move(weights), /*beside=*/false);
  return results;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("cast_weights", TORCH_BOX(&grootvl::cast_weights));
  m.impl("cast_weights_into", TORCH_BOX(&grootvl::cast_weights_into));
}
