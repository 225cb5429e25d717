// The selective scan on CUDA: discretisation and tree scan in one.
#include "selective_scan.cuh"

namespace grootvl {

Tensor scan_state(const SelectiveInputs& inputs, int64_t state, Direction direction) {
  const Tensor& x = inputs.x;
  const Tensor h = empty_like(x);
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(state);
    data.out = h.mutable_data_ptr<scalar_t>();
    with_pass<false>(direction, [&](auto pass) { return scan<pass(), true>(data, x); });
  });
  return h;
}

namespace {

Tensor selective_scan(const Tensor& x, const Tensor& dt, const std::optional<Tensor>& dt_weight,
                      const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                      const std::optional<Tensor>& C, const Tensor& parent, const Tensor& order,
                      const Tensor& subtree_size, std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const Direction direction = parse_direction(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  const int64_t states = num_states(A_log);
  if (!C && A_log.dim() == 1) return scan_state(inputs, 0, direction);
  if (!C) {
    const Tensor result = empty(x, {x.size(0), x.size(1), x.size(2), states}, x.scalar_type());
    for (int64_t n = 0; n < states; ++n) copy(select(result, -1, n), scan_state(inputs, n, direction));
    return result;
  }
  const Tensor y = zeros(x, x.sizes(), accumulation_type(x));
  for (int64_t n = 0; n < states; ++n) {
    add(y, multiply(to(scan_state(inputs, n, direction), y.scalar_type()), state_of(*C, n)));
  }
  return to(y, x.scalar_type());
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("selective_scan", TORCH_BOX(&grootvl::selective_scan)); }
