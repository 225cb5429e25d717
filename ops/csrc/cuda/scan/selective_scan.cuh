// What the selective scans and their gradients share. How a scan is divided among threads: scan.cuh.
#pragma once

#include <optional>

#include "launch_scan.cuh"
#include "merge.cuh"
#include "states.cuh"

namespace grootvl {

// Weights of pixels, which have one distance from each other, so that a column of a larger matrix is not copied.
inline Tensor pixel_weights(const Tensor& weights) {
  return weights.stride(0) == weights.size(1) * weights.stride(1) ? weights : contiguous(weights);
}

// Those of the scans from `first` on, of (B, L) or (B, L, scans).
template <typename T>
PixelWeights<T> weights_of(const Tensor& weights, int64_t first) {
  const int64_t scan_stride = weights.dim() == 3 ? weights.stride(2) : 0;
  return {weights.const_data_ptr<T>() + first * scan_stride, weights.stride(1), scan_stride};
}

// The inputs of several selective scans of one x in the form that the kernels read: N states, or K groups with their
// own step sizes, biases and trees.
struct SelectiveInputs {
  Tensor x, dt, dt_weight, dt_bias, A_log, B, C, raw_delta;
  Tensor decay_raw_delta;  // (B, L, D), where decays have steps of their own
  TreeFields tree;
  mutable PlannedTrees planned;  // by the first scan, for all
  bool grouped;

  // Of `selective_scan`. dt is kept as a matrix (B L, R).
  SelectiveInputs(const Tensor& x_, const Tensor& dt_, const std::optional<Tensor>& dt_weight_,
                  const std::optional<Tensor>& dt_bias_, const Tensor& A_log_, const Tensor& B_,
                  const std::optional<Tensor>& C_, const Tensor& parent, const Tensor& order,
                  const Tensor& subtree_size, bool grouped_ = false)
      : x(contiguous(x_)), tree(parent, order, subtree_size), grouped(grouped_) {
    const ScalarType type = x.scalar_type(), accumulation = accumulation_type(x);
    if (dt_weight_) dt_weight = contiguous(to(*dt_weight_, type));
    if (grouped) {
      dt = as_matrices(dt_);
      raw_delta = matrix_products(dt, transposed_matrices(dt_weight));
    } else {
      dt = as_rows(dt_);
      raw_delta = dt_weight_ ? matrix_product(dt, transpose(dt_weight), x.sizes()) : contiguous(dt_);
    }
    dt_bias = dt_bias_ ? contiguous(to(*dt_bias_, accumulation)) : zeros(x, {x.size(2)}, accumulation);
    A_log = to(A_log_, accumulation);
    A_log = contiguous(A_log.dim() == 2 && !grouped ? transpose(A_log) : A_log);  // (N, D) or (K, D)
    B = pixel_weights(B_);
    if (C_) C = pixel_weights(*C_);
  }

  int64_t scans() const { return A_log.dim() == 2 ? A_log.size(0) : 1; }

  // Of `count` scans from `first` on.
  template <typename T, typename acc_t>
  ScanData<T, acc_t> data(int64_t first, int64_t count) const {
    auto data = scan_data<T, acc_t>(x, raw_delta, tree);
    data.scans = static_cast<int>(count);
    GROOTVL_CHECK(count * data.batch <= INT32_MAX, "the tensors are too large for one scan");
    data.maps = static_cast<int>(count) * data.batch;
    data.input_weight = weights_of<T>(B, first);
    if (decay_raw_delta.defined()) data.decay_raw_delta = decay_raw_delta.const_data_ptr<T>();
    data.delta_bias = dt_bias.const_data_ptr<acc_t>();
    data.A_log = A_log.const_data_ptr<acc_t>() + first * data.channels;
    if (grouped) {
      data.raw_delta_stride = x.numel();
      data.delta_bias_stride = dt_bias.dim() == 2 ? data.channels : 0;
      data.maps_of_tree = std::max(data.batch, 1);
    }
    return data;
  }
};

// h of `count` scans from `first` on, (count, B, L, D). Where `kept` is given, it is set to what gradients_from_sum
// reads, of the same shape.
Tensor scan_maps(const SelectiveInputs& inputs, int64_t first, int64_t count, Direction direction,
                 Tensor* kept = nullptr);

// y = sum_s C_s h_s (B, L, D) of the states of one x by one sweep, and its gradients.
Tensor weighed_states(const SelectiveInputs& inputs, Direction direction);
struct WeighedStatesGradients {
  Tensor x, raw_delta, decay_raw_delta;  // (B, L, D), the last one where decays have steps of their own
  Tensor parameters;                     // (1 + N, D), in the precision of sums: of delta_bias, and of A_log
  Tensor B, C;                           // (B, L, N), or (B, L)
};
WeighedStatesGradients weighed_states_gradients(const SelectiveInputs& inputs, const Tensor& grad, Direction direction);

// out = the sum of maps (scans, batch, L, D), weighed if `weights` (batch, L, scans in all) are given, of which the
// first map's have number `first`; + skip (D, of the accumulation type) times x where given; + what is in out if it
// accumulates. `out` has the type of the maps or the type in which they are added up.
inline void merge(const Tensor& maps, const Tensor& weights, int64_t first, const Tensor& x, const Tensor& skip,
                  bool accumulates, const Tensor& out) {
  for_floating_type(maps.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    const auto run = [&](auto out_value) {
      using out_t = decltype(out_value);
      Merge<scalar_t, acc_t, out_t> data{};
      data.maps = maps.const_data_ptr<scalar_t>();
      if (weights.defined()) data.weights = weights_of<scalar_t>(weights, first);
      if (skip.defined() && !accumulates) {
        data.x = x.const_data_ptr<scalar_t>();
        data.skip = skip.const_data_ptr<acc_t>();
      }
      data.out = out.mutable_data_ptr<out_t>();
      data.accumulates = accumulates;
      data.scans = static_cast<int>(maps.size(0));
      data.channels = static_cast<int>(out.size(2));
      data.rows = out.size(0) * out.size(1);
      merge(data);
    };
    if (out.scalar_type() == maps.scalar_type()) {
      run(scalar_t());
    } else {
      run(acc_t());
    }
  });
}

}  // namespace grootvl
