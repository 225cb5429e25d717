// The norms by PyTorch's operations: what they save over the same in Python is the host's time. The equations stand in
// grootvl_ops/reference/norms.py, which also computes the gradients.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "scan.h"

namespace grootvl {
namespace {

std::tuple<at::Tensor, at::Tensor> gated_norm(const at::Tensor& h, const at::Tensor& x, const at::Tensor& z,
                                              const at::Tensor& C, const at::Tensor& D_skip, const at::Tensor& h_weight,
                                              const at::Tensor& h_bias, const at::Tensor& out_weight,
                                              const at::Tensor& out_bias, double eps) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = accumulation_type(h);
  const at::IntArrayRef channels = h.sizes().slice(2);
  auto [y, h_mean, h_scale] = at::native_layer_norm(h.to(type), channels, h_weight.to(type), h_bias.to(type), eps);
  y.mul_(C.to(type).unsqueeze(-1)).addcmul_(D_skip.to(type), x.to(type));
  auto [out, y_mean, y_scale] = at::native_layer_norm(y, channels, out_weight.to(type), out_bias.to(type), eps);
  out.mul_(at::silu(z.to(type)));
  return {out.to(h.scalar_type()), at::cat({h_mean, h_scale, y_mean, y_scale}, -1)};
}

std::tuple<at::Tensor, at::Tensor> layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                              double eps, std::optional<at::ScalarType> dtype) {
  check_layer_norm(x, weight, bias);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = accumulation_type(x);
  const auto [out, mean, scale] = at::native_layer_norm(x.to(type), {x.size(-1)}, weight.to(type), bias.to(type), eps);
  return {out.to(dtype.value_or(x.scalar_type())), at::cat({mean, scale}, -1)};
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) {
  m.impl("gated_norm", &grootvl::gated_norm);
  m.impl("layer_norm", &grootvl::layer_norm);
}
