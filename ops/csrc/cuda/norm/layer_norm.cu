#include "layer_norm.cuh"

#include <tuple>

namespace grootvl {
namespace {

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                      std::optional<ScalarType> dtype) {
  check_layer_norm(x, weight, bias);
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, bias);
  const Tensor out = empty(x, x.sizes(), dtype.value_or(x.scalar_type()));
  auto sizes = x.sizes().vec();
  sizes.back() = 2;
  const Tensor statistics = empty(x, sizes, accumulation_type(x));
  dispatch_layer_norm(x.scalar_type(), out.scalar_type(), [&](auto in, auto normed, auto acc) {
    using T = decltype(in);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, NoBranch, out_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.out = out.mutable_data_ptr<out_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const auto [launch, aligned] = inputs.launch("layer_norm", kVec, 16, {&out});
    launch.with_words<kVec, kVec>(aligned, [&, &launch = launch](auto shape) {
      launch.start(layer_norm_kernel<decltype(shape), T, NoBranch, out_t, acc_t>, data);
    });
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x, const Tensor& weight,
                                               const Tensor& statistics_) {
  check_layer_norm(x, weight, weight);
  check_layer_norm_backward(grad_, x, statistics_);
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, weight);
  const Tensor grad = LayerNormInputs::aligned_if_wide(contiguous(grad_)), statistics = contiguous(statistics_);
  const Tensor dx = empty_like(x);
  const ScalarType accumulation = accumulation_type(x);
  Tensor totals = x.numel() == 0 ? zeros(x, {2, x.size(-1)}, accumulation) : Tensor();
  dispatch_layer_norm(x.scalar_type(), grad.scalar_type(), [&](auto in, auto normed, auto acc) {
    using T = decltype(in);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, NoBranch, out_t, acc_t>();
    data.grad = grad.const_data_ptr<out_t>();
    data.statistics = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());
    data.dx = dx.mutable_data_ptr<T>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const auto [launch, aligned] = inputs.launch("layer_norm", kVec, 8, {&grad, &dx});
    const Tensor dparameters = empty_parts(x, {launch.blocks, 2, x.size(-1)}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
    launch.with_words<kVec, kVec>(aligned, [&, &launch = launch](auto shape) {
      layer_norm_backward_kernel<decltype(shape)><<<launch.blocks, launch.block, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals = sum_parts_later(dparameters, 1, {2, x.size(-1)}, accumulation);
  });
  return {dx, totals};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&grootvl::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&grootvl::layer_norm_backward));
}
