// The selective scan: each state's decays and inputs in one pass over the map,
// then the tree scan. The equations stand in grootvl_ops/reference/scans.py,
// which also computes the gradients.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "scan.h"
#include "vector_math.h"

namespace grootvl {
namespace {

// delta = softplus(raw delta + bias) of a pixel, in place.
template <typename scalar_t>
GROOTVL_VECTORIZED void step_row(scalar_t* delta, const scalar_t* bias, int64_t channels) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) delta[c] = softplus(delta[c] + bias[c]);
}

// Decay and input of a pixel for one state, of which B is the pixel's input
// weight and `rate` -exp(A_log).
template <typename scalar_t>
GROOTVL_VECTORIZED void discretise_row(const scalar_t* delta, const scalar_t* x, scalar_t B, const scalar_t* rate,
                                       int64_t channels, scalar_t* decay, scalar_t* input) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    decay[c] = exponential(delta[c] * rate[c]);
    input[c] = delta[c] * (B * x[c]);
  }
}

at::Tensor selective_scan(const at::Tensor& x_, const at::Tensor& dt, const std::optional<at::Tensor>& dt_weight,
                          const std::optional<at::Tensor>& dt_bias, const at::Tensor& A_log, const at::Tensor& B_,
                          const std::optional<at::Tensor>& C_, const at::Tensor& parent_, const at::Tensor& order_,
                          const at::Tensor& subtree_size, std::string_view direction_name) {
  check_selective_scan(x_, dt, dt_weight, dt_bias, A_log, B_, C_, parent_, order_, subtree_size);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Direction direction = parse_direction(direction_name);
  const auto [parent, order] = checked_tree(parent_, order_);
  const auto type = accumulation_type(x_);
  const int64_t states = num_states(A_log);
  const int64_t batch = x_.size(0), length = x_.size(1), channels = x_.size(2);
  const at::Tensor x = x_.to(type).contiguous();
  const at::Tensor rate = at::exp(A_log.to(type)).neg_().view({channels, states}).t().contiguous();
  const auto by_state = [&](const at::Tensor& weights) {  // (N, B, L)
    return weights.to(type).view({batch, length, states}).permute({2, 0, 1}).contiguous();
  };
  const at::Tensor B = by_state(B_), C = C_ ? by_state(*C_) : at::Tensor();
  const at::Tensor bias = dt_bias ? dt_bias->to(type).contiguous() : at::zeros({channels}, x.options());
  at::Tensor delta = dt_weight ? at::linear(dt.to(type), dt_weight->to(type)).contiguous()
                               : at::empty(x.sizes(), x.options()).copy_(dt);

  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, channels));
  const auto for_pixels = [&](auto pixel) {
    at::parallel_for(0, batch * length, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pixel(i);
    });
  };
  at::Tensor decay = at::empty(x.sizes(), x.options()), y;
  std::vector<at::Tensor> results;
  AT_DISPATCH_FLOATING_TYPES(type, "selective_scan", [&] {
    auto *delta_data = delta.mutable_data_ptr<scalar_t>(), *decay_data = decay.mutable_data_ptr<scalar_t>();
    const auto *x_data = x.const_data_ptr<scalar_t>(), *bias_data = bias.const_data_ptr<scalar_t>();
    for_pixels([&](int64_t i) { step_row(delta_data + i * channels, bias_data, channels); });
    for (int64_t n = 0; n < states; ++n) {
      const auto *B_data = B.const_data_ptr<scalar_t>() + n * batch * length,
                 *rate_data = rate.const_data_ptr<scalar_t>() + n * channels;
      at::Tensor h = at::empty(x.sizes(), x.options());
      auto* h_data = h.mutable_data_ptr<scalar_t>();
      for_pixels([&](int64_t i) {
        const int64_t row = i * channels;
        discretise_row(delta_data + row, x_data + row, B_data[i], rate_data, channels, decay_data + row, h_data + row);
      });
      scan_in_place(h, decay, parent, order, direction);
      if (!C_) {
        results.push_back(h.to(x_.scalar_type()));
        continue;
      }
      const at::Tensor weight = C.select(0, n).unsqueeze(-1);
      y = n == 0 ? h.mul_(weight) : y.addcmul_(weight, h);
    }
  });
  if (C_) return y.to(x_.scalar_type());
  return A_log.dim() == 1 ? results[0] : at::stack(results, -1);
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) { m.impl("selective_scan", &grootvl::selective_scan); }
