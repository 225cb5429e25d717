// The tree scan on CUDA. How it is divided among threads: scan.cuh.
#include "launch_scan.cuh"

namespace grootvl {
namespace {

Tensor tree_scan(const Tensor& x_, const Tensor& decay_, const Tensor& parent, const Tensor& order,
                 const Tensor& subtree_size, std::string_view direction) {
  check_scan(x_, decay_, parent, order, subtree_size);
  const DeviceGuard guard(x_);
  const Tensor x = contiguous(x_), decay = contiguous(decay_);
  const TreeFields tree(parent, order, subtree_size);
  const Tensor out = empty_like(x);
  PlannedTrees planned;
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = scan_data<scalar_t, acc_t>(x, decay, tree);
    data.out = out.mutable_data_ptr<scalar_t>();
    with_pass<false>(parse_direction(direction), [&](auto pass) { return scan<pass(), false>(data, x, planned); });
  });
  return out;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("tree_scan", TORCH_BOX(&grootvl::tree_scan)); }
