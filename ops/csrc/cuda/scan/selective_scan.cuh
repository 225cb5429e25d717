// What the selective scan and its gradients share. How a scan is divided among threads: scan.cuh.
#pragma once

#include <optional>

#include "launch_scan.cuh"
#include "states.cuh"

namespace grootvl {

// The inputs in the form that the kernels read. The kernels scan one state: several are scanned one after the other, so
// that the maps of only one are in memory.
struct SelectiveInputs {
  Tensor x, dt, dt_weight, dt_bias, A_log, B, parent, order, subtree_size, raw_delta;  // dt as a matrix (B L, R)

  SelectiveInputs(const Tensor& x_, const Tensor& dt_, const std::optional<Tensor>& dt_weight_,
                  const std::optional<Tensor>& dt_bias_, const Tensor& A_log_, const Tensor& B_, const Tensor& parent_,
                  const Tensor& order_, const Tensor& subtree_size_)
      : x(contiguous(x_)),
        dt(as_rows(dt_)),
        parent(contiguous(parent_)),
        order(contiguous(order_)),
        subtree_size(contiguous(subtree_size_)) {
    const ScalarType accumulation = accumulation_type(x);
    if (dt_weight_) dt_weight = to(*dt_weight_, x.scalar_type());
    raw_delta = dt_weight_ ? matrix_product(dt, transpose(dt_weight), x.sizes()) : contiguous(dt_);
    dt_bias = dt_bias_ ? contiguous(to(*dt_bias_, accumulation)) : zeros(x, {x.size(2)}, accumulation);
    A_log = contiguous(to(A_log_, accumulation));
    if (A_log.dim() == 2) A_log = contiguous(transpose(A_log));  // (N, D)
    // Vertices at one distance from each other, so that a column of a larger matrix is not copied.
    const bool columns = B_.stride(0) == B_.size(1) * B_.stride(1);
    B = columns ? B_ : contiguous(B_);
  }

  template <typename T, typename acc_t>
  ScanData<T, acc_t> data(int64_t state) const {
    auto data = scan_data<T, acc_t>(x, raw_delta, parent, order, subtree_size);
    data.input_weight = B.const_data_ptr<T>() + (B.dim() == 3 ? state * B.stride(2) : 0);
    data.input_weight_stride = B.stride(1);
    data.delta_bias = dt_bias.const_data_ptr<acc_t>();
    data.A_log = A_log.const_data_ptr<acc_t>() + state * x.size(2);
    return data;
  }
};

// The scan of one state, (B, L, D).
Tensor scan_state(const SelectiveInputs& inputs, int64_t state, Direction direction);

}  // namespace grootvl
