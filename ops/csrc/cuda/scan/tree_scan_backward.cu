// The gradients of the tree scan on CUDA. How it is divided among threads: scan.cuh.
#include "launch_scan.cuh"

namespace grootvl {
namespace {

std::tuple<at::Tensor, at::Tensor> tree_scan_backward(const at::Tensor& grad_, const at::Tensor& x_,
                                                      const at::Tensor& decay_, const at::Tensor& parent_,
                                                      const at::Tensor& order_, const at::Tensor& subtree_size_,
                                                      std::string_view direction) {
  check_scan(x_, decay_, parent_, order_, subtree_size_);
  check_like("grad", grad_, "x", x_, x_.sizes());
  const c10::cuda::CUDAGuard guard(x_.device());
  const at::Tensor grad = grad_.contiguous(), x = x_.contiguous(), decay = decay_.contiguous(),
                   parent = parent_.contiguous(), order = order_.contiguous(),
                   subtree_size = subtree_size_.contiguous();
  at::Tensor dx = at::empty(x.sizes(), x.options()), ddecay = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "tree_scan_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = scan_data<scalar_t, acc_t>(x, decay, parent, order, subtree_size);
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = dx.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = ddecay.mutable_data_ptr<scalar_t>();
    with_pass<true>(parse_direction(direction), [&](auto pass) { return scan<pass(), false>(data, x.options()); });
  });
  return {dx, ddecay};
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("tree_scan_backward", &grootvl::tree_scan_backward); }
