// What the selective scan and its gradients share. How a scan is divided among threads: scan.cuh.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "launch_scan.cuh"

namespace grootvl {

// Inputs in the form that the kernels read: contiguous, except B, which may be a column of a larger matrix.
struct SelectiveInputs {
  // Autocast must not cast anything here again.
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::Tensor x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size, delta;

  SelectiveInputs(const at::Tensor& x_, const at::Tensor& dt_, const at::Tensor& dt_weight_, const at::Tensor& dt_bias_,
                  const at::Tensor& A_log_, const at::Tensor& B_, const at::Tensor& parent_, const at::Tensor& order_,
                  const at::Tensor& subtree_size_)
      : x(x_.contiguous()),
        dt(dt_),
        dt_weight(dt_weight_.to(x_.scalar_type())),
        B(B_.stride(0) == B_.size(1) * B_.stride(1) ? B_ : B_.contiguous()),
        parent(parent_.contiguous()),
        order(order_.contiguous()),
        subtree_size(subtree_size_.contiguous()) {
    const auto accumulation = at::toOpMathType(x.scalar_type());
    dt_bias = dt_bias_.to(accumulation).contiguous();
    A_log = A_log_.to(accumulation).contiguous();
    delta = at::linear(dt, dt_weight).contiguous();
  }

  template <typename T, typename acc_t>
  ScanData<T, acc_t> data() const {
    auto data = scan_data<T, acc_t>(x, delta, parent, order, subtree_size);
    data.input_weight = B.const_data_ptr<T>();
    data.input_weight_stride = B.stride(1);
    data.delta_bias = dt_bias.const_data_ptr<acc_t>();
    data.A_log = A_log.const_data_ptr<acc_t>();
    return data;
  }
};

}  // namespace grootvl
