// The selective scan on CUDA: discretisation and tree scan in one.
#include "selective_scan.cuh"

namespace grootvl {

at::Tensor scan_state(const SelectiveInputs& inputs, int64_t state, Direction direction) {
  const at::Tensor& x = inputs.x;
  at::Tensor h = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "selective_scan", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(state);
    data.out = h.mutable_data_ptr<scalar_t>();
    with_pass<false>(direction, [&](auto pass) { return scan<pass(), true>(data, x.options()); });
  });
  return h;
}

namespace {

at::Tensor selective_scan(const at::Tensor& x, const at::Tensor& dt, const std::optional<at::Tensor>& dt_weight,
                          const std::optional<at::Tensor>& dt_bias, const at::Tensor& A_log, const at::Tensor& B,
                          const std::optional<at::Tensor>& C, const at::Tensor& parent, const at::Tensor& order,
                          const at::Tensor& subtree_size, std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const Direction direction = parse_direction(direction_name);
  const c10::cuda::CUDAGuard guard(x.device());
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  const int64_t states = num_states(A_log);
  if (!C && A_log.dim() == 1) return scan_state(inputs, 0, direction);
  if (!C) {
    std::vector<at::Tensor> results;
    for (int64_t n = 0; n < states; ++n) results.push_back(scan_state(inputs, n, direction));
    return at::stack(results, -1);
  }
  const at::Tensor weights = C->reshape({x.size(0), x.size(1), states});
  at::Tensor y = at::zeros(x.sizes(), x.options().dtype(at::toOpMathType(x.scalar_type())));
  for (int64_t n = 0; n < states; ++n) y.addcmul_(weights.narrow(2, n, 1), scan_state(inputs, n, direction));
  return y.to(x.scalar_type());
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("selective_scan", &grootvl::selective_scan); }
