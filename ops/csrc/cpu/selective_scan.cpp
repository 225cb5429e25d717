// The selective scan: discretisation by PyTorch's operations, then the tree scan, one state after the other. The
// equations stand in grootvl_ops/reference/scans.py, which also computes the gradients.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "scan.h"

namespace grootvl {
namespace {

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
  const at::Tensor x = x_.to(type), rate = at::exp(A_log.to(type)).neg_().view({-1, states});
  const at::Tensor B = B_.to(type).view({x.size(0), x.size(1), states});

  at::Tensor delta = dt.to(type);
  const std::optional<at::Tensor> bias = dt_bias ? std::optional(dt_bias->to(type)) : std::nullopt;
  if (dt_weight) {
    delta = at::linear(delta, dt_weight->to(type), bias);
  } else if (bias) {
    delta = delta + *bias;
  }
  delta = at::softplus(delta);

  at::Tensor y;
  std::vector<at::Tensor> results;
  for (int64_t n = 0; n < states; ++n) {
    const at::Tensor decay = at::mul(delta, rate.select(1, n)).exp_().contiguous();
    at::Tensor h = at::mul(B.narrow(2, n, 1), x).mul_(delta).contiguous();
    scan_in_place(h, decay, parent, order, direction);
    if (!C_) {
      results.push_back(h.to(x_.scalar_type()));
      continue;
    }
    const at::Tensor weight = C_->to(type).view({x.size(0), x.size(1), states}).narrow(2, n, 1);
    y = n == 0 ? h.mul_(weight) : y.addcmul_(weight, h);
  }
  if (C_) return y.to(x_.scalar_type());
  return A_log.dim() == 1 ? results[0] : at::stack(results, -1);
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) { m.impl("selective_scan", &grootvl::selective_scan); }
