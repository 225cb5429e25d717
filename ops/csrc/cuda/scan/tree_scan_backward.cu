// The gradients of the tree scan on CUDA. How it is divided among threads: scan.cuh.
#include "launch_scan.cuh"

namespace grootvl {
namespace {

std::tuple<Tensor, Tensor> tree_scan_backward(const Tensor& grad_, const Tensor& x_, const Tensor& decay_,
                                              const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                                              std::string_view direction) {
  check_scan(x_, decay_, parent, order, subtree_size);
  check_like("grad", grad_, "x", x_, x_.sizes());
  const DeviceGuard guard(x_);
  const Tensor grad = contiguous(grad_), x = contiguous(x_), decay = contiguous(decay_);
  const TreeFields tree(parent, order, subtree_size);
  const Tensor dx = empty_like(x), ddecay = empty_like(x);
  PlannedTrees planned;
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = scan_data<scalar_t, acc_t>(x, decay, tree);
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = dx.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = ddecay.mutable_data_ptr<scalar_t>();
    with_pass<true>(parse_direction(direction), [&](auto pass) { return scan<pass(), false>(data, x, planned); });
  });
  return {dx, ddecay};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("tree_scan_backward", TORCH_BOX(&grootvl::tree_scan_backward));
}
