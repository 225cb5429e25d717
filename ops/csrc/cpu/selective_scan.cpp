// The selective scan: each state's decays and inputs in one pass over the map,
// then the tree scan. The equations stand in grootvl_ops/reference/scans.py,
// which also computes the gradients.

#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#include "scan.h"
#include "vector_math.h"

GROOTVL_CONTRACT_PRODUCTS

namespace grootvl {
namespace {

// delta = softplus(raw delta + bias) of a pixel, in place.
template <typename scalar_t>
GROOTVL_VECTORIZED void step_row(scalar_t* delta, const scalar_t* bias, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) delta[c] = softplus(delta[c] + bias[c]);
}

// Decay and input of a pixel for one state, of which B is the pixel's input
// weight and `rate` -exp(A_log). The decay may take the memory of delta.
template <typename scalar_t>
GROOTVL_VECTORIZED void discretise_row(const scalar_t* delta, const scalar_t* x, scalar_t B, const scalar_t* rate,
                                       int64_t channels, scalar_t* decay, scalar_t* input) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    const scalar_t step = delta[c];
    decay[c] = exponential(step * rate[c]);
    input[c] = step * (B * x[c]);
  }
}

// y += C h of a pixel, or y = C h of the first state.
template <typename scalar_t>
GROOTVL_VECTORIZED void weigh_row(const scalar_t* h, scalar_t C, bool first, int64_t channels, scalar_t* y) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) y[c] = C * h[c] + (first ? scalar_t(0) : y[c]);
}

// delta before its bias and softplus, (B, L, D): a copy, which the scan changes.
Tensor raw_delta(const Tensor& dt, const std::optional<Tensor>& dt_weight, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (!dt_weight) return copy_as(dt, type);
  return matrix_product(as_rows(to(dt, type)), transpose(to(*dt_weight, type)), x.sizes());
}

Tensor selective_scan(const Tensor& x_, const Tensor& dt, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, const Tensor& A_log_, const Tensor& B_,
                      const std::optional<Tensor>& C_, const Tensor& parent_, const Tensor& order_,
                      const Tensor& subtree_size, std::string_view direction_name) {
  check_selective_scan(x_, dt, dt_weight, dt_bias, A_log_, B_, C_, parent_, order_, subtree_size);
  const Direction direction = parse_direction(direction_name);
  const auto [parent, order] = checked_tree(parent_, order_);
  const ScalarType type = accumulation_type(x_);
  const int64_t states = num_states(A_log_), pixels = x_.size(0) * x_.size(1), channels = x_.size(2);
  const Tensor x = contiguous(to(x_, type)), A_log = contiguous(to(A_log_, type)), B = contiguous(to(B_, type)),
               C = C_ ? contiguous(to(*C_, type)) : Tensor();
  const Tensor bias = dt_bias ? contiguous(to(*dt_bias, type)) : zeros(x, {channels}, type);
  // A single state needs delta no more after its decay, which takes the memory.
  const Tensor delta = raw_delta(dt, dt_weight, x), decay = states == 1 ? delta : empty_like(x);
  std::vector<int64_t> result_sizes = x.sizes().vec();
  if (!C_ && A_log.dim() == 2) result_sizes.push_back(states);
  const Tensor result = empty(x, result_sizes, C_ ? type : x_.scalar_type());
  const bool in_place = !C_ && A_log.dim() == 1 && result.scalar_type() == type;
  const Tensor h = in_place ? result : empty_like(x);

  const auto for_pixels = [&](auto pixel) {
    parallel_for(0, pixels, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, channels)), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) pixel(i);
    });
  };
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    auto *delta_data = delta.mutable_data_ptr<scalar_t>(), *decay_data = decay.mutable_data_ptr<scalar_t>(),
         *h_data = h.mutable_data_ptr<scalar_t>();
    const auto *x_data = x.const_data_ptr<scalar_t>(), *bias_data = bias.const_data_ptr<scalar_t>(),
               *A_data = A_log.const_data_ptr<scalar_t>(), *B_data = B.const_data_ptr<scalar_t>();
    std::vector<scalar_t> rate(channels);
    for (int64_t n = 0; n < states; ++n) {
      for (int64_t c = 0; c < channels; ++c) rate[c] = -std::exp(A_data[c * states + n]);
      for_pixels([&](int64_t i) {
        const int64_t row = i * channels;
        if (n == 0) step_row(delta_data + row, bias_data, channels);
        discretise_row(delta_data + row, x_data + row, B_data[i * states + n], rate.data(), channels, decay_data + row,
                       h_data + row);
      });
      scan_in_place(h, decay, parent, order, direction);
      if (C_) {
        const auto* C_data = C.const_data_ptr<scalar_t>();
        auto* y_data = result.mutable_data_ptr<scalar_t>();
        for_pixels([&](int64_t i) {
          weigh_row(h_data + i * channels, C_data[i * states + n], n == 0, channels, y_data + i * channels);
        });
      } else if (!in_place) {
        copy(A_log.dim() == 1 ? result : select(result, -1, n), h);
      }
    }
  });
  return to(result, x_.scalar_type());
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) { m.impl("selective_scan", TORCH_BOX(&grootvl::selective_scan)); }
