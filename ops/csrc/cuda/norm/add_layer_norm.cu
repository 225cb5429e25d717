// The sum of a map and a branch, and its LayerNorm, in one pass: a residual block adds and then normalises.

#include <tuple>

#include "layer_norm.cuh"

namespace grootvl {
namespace {

// Calls `launch(T, branch_t, out_t, acc_t)` with values of the types of the map, the branch, the normalised map and the
// sums.
template <typename Launch>
void dispatch(const Tensor& x, ScalarType branch_type, ScalarType out_type, Launch launch) {
  const ScalarType type = x.scalar_type();
  dispatch_layer_norm(type, out_type, [&](auto in, auto normed, auto acc) {
    using out_t = decltype(normed);
    if (branch_type == type) return launch(in, in, normed, acc);
    if constexpr (std::is_same_v<decltype(in), float>) {
      // Under autocast a branch is of autocast's type.
      if constexpr (std::is_same_v<out_t, float>) {
        if (branch_type == ScalarType::Half) return launch(in, torch::headeronly::Half(), normed, acc);
        if (branch_type == ScalarType::BFloat16) return launch(in, torch::headeronly::BFloat16(), normed, acc);
      } else {
        if (branch_type == out_type) return launch(in, normed, normed, acc);
      }
    }
    GROOTVL_CHECK(false, "add_layer_norm on CUDA adds a branch of the type of x, ", type,
                  ", or to float32 one of a half precision that is also that of the result, got ", branch_type,
                  " and a result ", out_type);
  });
}

struct Factors {
  Tensor values;
  int64_t image_rows;

  Factors(const std::optional<Tensor>& factors, const Tensor& x)
      : values(factors ? contiguous(to(*factors, accumulation_type(x))) : Tensor()),
        image_rows(factors ? x.numel() / std::max<int64_t>(1, x.size(0) * x.size(-1)) : 0) {}

  template <typename Data>
  void give(Data& data) const {
    if (image_rows == 0) return;
    data.factors = values.const_data_ptr<std::remove_const_t<std::remove_pointer_t<decltype(data.weight)>>>();
    data.image_rows = image_rows;
  }
};

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch_, const Tensor& weight,
                                                  const Tensor& bias, double eps, std::optional<ScalarType> dtype,
                                                  const std::optional<Tensor>& factors_) {
  check_add_layer_norm(x, branch_, weight, bias, factors_);
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, bias);
  const Tensor branch = LayerNormInputs::aligned_if_wide(contiguous(branch_));
  const Factors factors(factors_, x);
  const Tensor sum = empty_like(x), out = empty(x, x.sizes(), dtype.value_or(x.scalar_type()));
  auto sizes = x.sizes().vec();
  sizes.back() = 2;
  const Tensor statistics = empty(x, sizes, accumulation_type(x));
  dispatch(x, branch.scalar_type(), out.scalar_type(), [&](auto in, auto added, auto normed, auto acc) {
    using T = decltype(in);
    using branch_t = decltype(added);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, branch_t, out_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.branch = branch.const_data_ptr<branch_t>();
    factors.give(data);
    data.sum = sum.mutable_data_ptr<T>();
    data.out = out.mutable_data_ptr<out_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const auto [launch, aligned] = inputs.launch("add_layer_norm", kVec, 16, {&branch, &sum, &out});
    launch.with_words<kVec, kVec>(aligned, [&, &launch = launch](auto shape) {
      launch.start(layer_norm_kernel<decltype(shape), T, branch_t, out_t, acc_t>, data);
    });
  });
  return {sum, out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(const Tensor& grad_, const std::optional<Tensor>& grad_sum_,
                                                           const Tensor& x, const Tensor& weight,
                                                           const Tensor& statistics_,
                                                           const std::optional<Tensor>& factors_,
                                                           ScalarType branch_type) {
  check_layer_norm(x, weight, weight);
  check_layer_norm_backward(grad_, x, statistics_);
  check_factors(factors_, x);
  if (grad_sum_) check_like("grad_sum", *grad_sum_, "the sum", x, x.sizes());
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, weight);
  const Factors factors(factors_, x);
  const Tensor grad = LayerNormInputs::aligned_if_wide(contiguous(grad_)), statistics = contiguous(statistics_);
  const Tensor grad_sum = grad_sum_ ? LayerNormInputs::aligned_if_wide(contiguous(*grad_sum_)) : x;
  const bool shared = branch_type == x.scalar_type() && !factors_;  // the gradients of x and branch are one
  const Tensor dx = empty_like(x);
  const Tensor dbranch = shared ? empty(x, {0}, branch_type) : empty(x, x.sizes(), branch_type);
  const ScalarType accumulation = accumulation_type(x);
  Tensor totals = x.numel() == 0 ? zeros(x, {2, x.size(-1)}, accumulation) : Tensor();
  dispatch(x, branch_type, grad.scalar_type(), [&](auto in, auto added, auto normed, auto acc) {
    using T = decltype(in);
    using branch_t = decltype(added);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, branch_t, out_t, acc_t>();
    data.grad = grad.const_data_ptr<out_t>();
    if (grad_sum_) data.grad_sum = grad_sum.const_data_ptr<T>();
    factors.give(data);
    data.statistics = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());
    data.dx = dx.mutable_data_ptr<T>();
    if (!shared) data.dbranch = dbranch.mutable_data_ptr<branch_t>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const auto [launch, aligned] = inputs.launch("add_layer_norm", kVec, 8, {&grad, &grad_sum, &dx, &dbranch});
    const Tensor dparameters = empty_parts(x, {launch.blocks, 2, x.size(-1)}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
    launch.with_words<kVec, kVec>(aligned, [&, &launch = launch](auto shape) {
      layer_norm_backward_kernel<decltype(shape)><<<launch.blocks, launch.block, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals = sum_parts_later(dparameters, 1, {2, x.size(-1)}, accumulation);
  });
  return {dx, dbranch, totals};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("add_layer_norm", TORCH_BOX(&grootvl::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&grootvl::add_layer_norm_backward));
}
