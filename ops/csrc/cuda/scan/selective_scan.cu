// The selective scan on CUDA: discretisation and tree scan in one.
#include "selective_scan.cuh"

namespace grootvl {
namespace {

at::Tensor selective_scan(const at::Tensor& x, const at::Tensor& dt, const at::Tensor& dt_weight,
                          const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& B,
                          const at::Tensor& parent, const at::Tensor& order, const at::Tensor& subtree_size,
                          bool up_only) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  const c10::cuda::CUDAGuard guard(x.device());
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size);
  at::Tensor out = at::empty(x.sizes(), x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "selective_scan", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.out = out.mutable_data_ptr<scalar_t>();
    if (up_only) {
      scan<Pass::kUp, true>(data, x.options());
    } else {
      scan<Pass::kFull, true>(data, x.options());
    }
  });
  return out;
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("selective_scan", &grootvl::selective_scan); }
