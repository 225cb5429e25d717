// The gradients of the selective scan on CUDA. The step sizes are computed again, not stored.
#include "selective_scan.cuh"

namespace grootvl {
namespace {

// Of one state, from the gradient of its h.
struct StateGradients {
  at::Tensor x, raw_delta;  // (B, L, D)
  ParameterGradients parameters;
};

StateGradients state_gradients(const SelectiveInputs& inputs, const at::Tensor& grad_, int64_t state,
                               Direction direction) {
  const at::Tensor &x = inputs.x, grad = grad_.contiguous();
  StateGradients result{at::empty(x.sizes(), x.options()), at::empty(x.sizes(), x.options()), {}};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "selective_scan_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(state);
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = result.x.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = result.raw_delta.mutable_data_ptr<scalar_t>();
    result.parameters = with_pass<true>(direction, [&](auto pass) { return scan<pass(), true>(data, x.options()); });
  });
  return result;
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Gradients selective_scan_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& dt,
                                  const std::optional<at::Tensor>& dt_weight, const std::optional<at::Tensor>& dt_bias,
                                  const at::Tensor& A_log, const at::Tensor& B, const std::optional<at::Tensor>& C,
                                  const at::Tensor& parent, const at::Tensor& order, const at::Tensor& subtree_size,
                                  std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const int64_t states = num_states(A_log);
  std::vector<int64_t> result_sizes = x.sizes().vec();
  if (!C && A_log.dim() == 2) result_sizes.push_back(states);
  check_like("grad", grad, "x", x, result_sizes);
  const Direction direction = parse_direction(direction_name);
  const c10::cuda::CUDAGuard guard(x.device());
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);

  at::Tensor dx, draw_delta, dparameters, dB, dC = at::empty({0}, x.options());
  if (!C && A_log.dim() == 1) {
    StateGradients gradients = state_gradients(inputs, grad, 0, direction);
    dx = gradients.x, draw_delta = gradients.raw_delta;
    dB = gradients.parameters.input_weight, dparameters = gradients.parameters.of_channels;
  } else {  // sums over the states, in the precision of the sums inside a scan
    const auto accumulation = x.options().dtype(at::toOpMathType(x.scalar_type()));
    dx = at::zeros(x.sizes(), accumulation), draw_delta = at::zeros(x.sizes(), accumulation);
    dparameters = at::zeros({1 + states, x.size(2)}, accumulation);
    std::vector<at::Tensor> of_B, of_C;
    const at::Tensor weights = C ? C->reshape({x.size(0), x.size(1), states}) : at::Tensor();
    for (int64_t n = 0; n < states; ++n) {
      const at::Tensor of_state = C ? grad * weights.narrow(2, n, 1) : grad.select(-1, n);
      const StateGradients gradients = state_gradients(inputs, of_state, n, direction);
      dx.add_(gradients.x), draw_delta.add_(gradients.raw_delta);
      dparameters.select(0, 0).add_(gradients.parameters.of_channels.select(0, 0));
      dparameters.select(0, 1 + n).copy_(gradients.parameters.of_channels.select(0, 1));
      of_B.push_back(gradients.parameters.input_weight);
      if (C) {
        of_C.push_back(
            at::mul(grad, scan_state(inputs, n, direction)).sum(-1, false, at::toOpMathType(x.scalar_type())));
      }
    }
    dx = dx.to(x.scalar_type()), draw_delta = draw_delta.to(x.scalar_type());
    dB = at::stack(of_B, -1).view(B.sizes());
    if (C) dC = at::stack(of_C, -1).view(C->sizes()).to(C->scalar_type());
  }
  if (!dt_weight) return {dx, draw_delta, at::empty({0}, x.options()), dparameters, dB, dC};
  const at::Tensor ddt = at::matmul(draw_delta, inputs.dt_weight);
  const at::Tensor ddt_weight = at::mm(draw_delta.flatten(0, 1).t(), dt.flatten(0, 1));
  return {dx, ddt, ddt_weight.to(dt_weight->scalar_type()), dparameters, dB, dC};
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("selective_scan_backward", &grootvl::selective_scan_backward); }
