// The gradients of the selective scan on CUDA. The step sizes are computed again, not stored.
#include "selective_scan.cuh"

namespace grootvl {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients selective_scan_backward(const at::Tensor& grad_, const at::Tensor& x, const at::Tensor& dt,
                                  const at::Tensor& dt_weight, const at::Tensor& dt_bias, const at::Tensor& A_log,
                                  const at::Tensor& B, const at::Tensor& parent, const at::Tensor& order,
                                  const at::Tensor& subtree_size, bool up_only) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  check_like("grad", grad_, "x", x, x.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  const at::Tensor grad = grad_.contiguous();
  at::Tensor dx = at::empty(x.sizes(), x.options()), ddelta = at::empty(x.sizes(), x.options());
  ParameterGradients parameters;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "selective_scan_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = dx.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = ddelta.mutable_data_ptr<scalar_t>();
    parameters =
        up_only ? scan<Pass::kUpBackward, true>(data, x.options()) : scan<Pass::kFullBackward, true>(data, x.options());
  });
  const at::Tensor ddt = at::matmul(ddelta, inputs.dt_weight);
  const at::Tensor ddt_weight = at::mm(ddelta.flatten(0, 1).t(), dt.flatten(0, 1));
  return {dx, ddt, ddt_weight.to(dt_weight.scalar_type()), parameters.of_channels, parameters.input_weight};
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("selective_scan_backward", &grootvl::selective_scan_backward); }
