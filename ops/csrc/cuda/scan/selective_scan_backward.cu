// The gradients of the selective scan on CUDA. The step sizes are computed again, not stored.
#include "selective_scan.cuh"

namespace grootvl {
namespace {

// Of one state, from the gradient of its h.
struct StateGradients {
  Tensor x, raw_delta;  // (B, L, D)
  ParameterGradients parameters;
};

StateGradients state_gradients(const SelectiveInputs& inputs, const Tensor& grad_, int64_t state, Direction direction) {
  const Tensor &x = inputs.x, grad = contiguous(grad_);
  StateGradients result{empty_like(x), empty_like(x), {}};
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(state);
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = result.x.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = result.raw_delta.mutable_data_ptr<scalar_t>();
    result.parameters = with_pass<true>(direction, [&](auto pass) { return scan<pass(), true>(data, x); });
  });
  return result;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(const Tensor& grad, const Tensor& x, const Tensor& dt,
                                  const std::optional<Tensor>& dt_weight, const std::optional<Tensor>& dt_bias,
                                  const Tensor& A_log, const Tensor& B, const std::optional<Tensor>& C,
                                  const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                                  std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const int64_t states = num_states(A_log);
  std::vector<int64_t> result_sizes = x.sizes().vec();
  if (!C && A_log.dim() == 2) result_sizes.push_back(states);
  check_like("grad", grad, "x", x, result_sizes);
  const Direction direction = parse_direction(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);

  Tensor dx, draw_delta, dparameters, dB, dC = empty(x, {0}, x.scalar_type());
  if (!C && A_log.dim() == 1) {
    StateGradients gradients = state_gradients(inputs, grad, 0, direction);
    dx = gradients.x, draw_delta = gradients.raw_delta;
    dB = gradients.parameters.input_weight, dparameters = gradients.parameters.of_channels;
  } else {  // sums over the states, in the precision of the sums inside a scan
    const ScalarType accumulation = accumulation_type(x);
    dx = zeros(x, x.sizes(), accumulation), draw_delta = zeros(x, x.sizes(), accumulation);
    dparameters = zeros(x, {1 + states, x.size(2)}, accumulation);
    dB = empty(x, B.sizes(), B.scalar_type());
    if (C) dC = empty(x, C->sizes(), C->scalar_type());
    for (int64_t n = 0; n < states; ++n) {
      const Tensor of_state = C ? multiply(grad, state_of(*C, n)) : select(grad, -1, n);
      const StateGradients gradients = state_gradients(inputs, of_state, n, direction);
      add(dx, gradients.x), add(draw_delta, gradients.raw_delta);
      add(select(dparameters, 0, 0), select(gradients.parameters.of_channels, 0, 0));
      copy(select(dparameters, 0, 1 + n), select(gradients.parameters.of_channels, 0, 1));
      copy(column_of(dB, n), gradients.parameters.input_weight);
      if (C) copy(column_of(dC, n), sum(multiply(grad, scan_state(inputs, n, direction)), -1, accumulation));
    }
    dx = to(dx, x.scalar_type()), draw_delta = to(draw_delta, x.scalar_type());
  }
  if (!dt_weight) return {dx, draw_delta, empty(x, {0}, x.scalar_type()), dparameters, dB, dC};
  const Tensor rows = as_rows(draw_delta), ddt = matrix_product(rows, inputs.dt_weight, dt.sizes());
  const Tensor ddt_weight = matrix_product(transpose(rows), inputs.dt, dt_weight->sizes());
  return {dx, ddt, to(ddt_weight, dt_weight->scalar_type()), dparameters, dB, dC};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("selective_scan_backward", TORCH_BOX(&grootvl::selective_scan_backward));
}
