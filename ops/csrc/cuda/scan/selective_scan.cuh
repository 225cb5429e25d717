// What the selective scan and its gradients share. How a scan is divided among threads: scan.cuh.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "launch_scan.cuh"

namespace grootvl {

// The inputs in the form that the kernels read. The kernels scan one state: several are scanned one after the other, so
// that the maps of only one are in memory.
struct SelectiveInputs {
  // Autocast must not cast anything here again.
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::Tensor x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size, raw_delta;

  SelectiveInputs(const at::Tensor& x_, const at::Tensor& dt_, const std::optional<at::Tensor>& dt_weight_,
                  const std::optional<at::Tensor>& dt_bias_, const at::Tensor& A_log_, const at::Tensor& B_,
                  const at::Tensor& parent_, const at::Tensor& order_, const at::Tensor& subtree_size_)
      : x(x_.contiguous()),
        dt(dt_),
        parent(parent_.contiguous()),
        order(order_.contiguous()),
        subtree_size(subtree_size_.contiguous()) {
    const auto accumulation = at::toOpMathType(x.scalar_type());
    if (dt_weight_) dt_weight = dt_weight_->to(x.scalar_type());
    raw_delta = (dt_weight_ ? at::linear(dt, dt_weight) : dt).contiguous();
    dt_bias =
        dt_bias_ ? dt_bias_->to(accumulation).contiguous() : at::zeros({x.size(2)}, x.options().dtype(accumulation));
    A_log = A_log_.to(accumulation).view({x.size(2), num_states(A_log_)}).t().contiguous();  // (N, D)
    // Vertices at one distance from each other, so that a column of a larger matrix is not copied.
    const bool columns = B_.stride(0) == B_.size(1) * B_.stride(1);
    B = (columns ? B_ : B_.contiguous()).view({x.size(0), x.size(1), num_states(A_log_)});
  }

  template <typename T, typename acc_t>
  ScanData<T, acc_t> data(int64_t state) const {
    auto data = scan_data<T, acc_t>(x, raw_delta, parent, order, subtree_size);
    data.input_weight = B.const_data_ptr<T>() + state * B.stride(2);
    data.input_weight_stride = B.stride(1);
    data.delta_bias = dt_bias.const_data_ptr<acc_t>();
    data.A_log = A_log.const_data_ptr<acc_t>() + state * x.size(2);
    return data;
  }
};

// The scan of one state, (B, L, D).
at::Tensor scan_state(const SelectiveInputs& inputs, int64_t state, Direction direction);

}  // namespace grootvl
