// The gradients of the selective scans on CUDA. The step sizes are computed again, not stored.
#include "selective_scan.cuh"

namespace grootvl {
namespace {

// Of `count` scans, each on its own.
struct ScanGradients {
  Tensor x, raw_delta;  // (count, B, L, D)
  ParameterGradients parameters;
};

template <typename Run>
ScanGradients scan_gradients(const SelectiveInputs& inputs, const Tensor& grad, int64_t first, int64_t count, Run run) {
  const Tensor& x = inputs.x;
  const std::vector<int64_t> sizes{count, x.size(0), x.size(1), x.size(2)};
  ScanGradients result{empty(x, sizes, x.scalar_type()), empty(x, sizes, x.scalar_type()), {}};
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>(first, count);
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = result.x.mutable_data_ptr<scalar_t>();
    data.ddecay_or_raw_delta = result.raw_delta.mutable_data_ptr<scalar_t>();
    result.parameters = run(data);
  });
  return result;
}

// Of one scan, from the gradient of its h, contiguous. Nothing needs to be kept by the forward pass.
ScanGradients gradients_from_h(const SelectiveInputs& inputs, const Tensor& grad, int64_t state, Direction direction) {
  return scan_gradients(inputs, grad, state, 1, [&](auto data) {
    return with_pass<true>(direction, [&](auto pass) { return scan<pass(), true>(data, inputs.x, inputs.planned); });
  });
}

// Of scans that are weighed by C and summed, from the gradient of the sum, contiguous, and what scan_states has kept.
ScanGradients gradients_from_sum(const SelectiveInputs& inputs, const Tensor& grad, const Tensor& kept, int64_t first,
                                 int64_t count, Direction direction) {
  return scan_gradients(inputs, grad, first, count, [&](auto data) {
    using scalar_t = std::remove_pointer_t<decltype(data.out)>;
    data.output_weight = weights_of<scalar_t>(inputs.C, first);
    data.kept = const_cast<scalar_t*>(kept.const_data_ptr<scalar_t>());
    return with_sweep<true>(direction, [&](auto pass) { return scan<pass(), true>(data, inputs.x, inputs.planned); });
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients selective_scan_backward(const Tensor& grad_, const Tensor& x, const Tensor& dt,
                                  const std::optional<Tensor>& dt_weight, const std::optional<Tensor>& dt_bias,
                                  const Tensor& A_log, const Tensor& B, const std::optional<Tensor>& C,
                                  const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                                  std::string_view direction_name) {
  check_selective_scan(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const int64_t states = num_states(A_log);
  std::vector<int64_t> result_sizes = x.sizes().vec();
  if (!C && A_log.dim() == 2) result_sizes.push_back(states);
  check_like("grad", grad_, "x", x, result_sizes);
  const Direction direction = parse_direction(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size);
  const ScalarType type = x.scalar_type(), accumulation = accumulation_type(x);
  const Sizes map = x.sizes();

  Tensor dx, draw_delta, dparameters, dB, dC = empty(x, {0}, type);
  if (!C && A_log.dim() == 1) {
    const ScanGradients gradients = gradients_from_h(inputs, contiguous(grad_), 0, direction);
    dx = reshaped(gradients.x, map), draw_delta = reshaped(gradients.raw_delta, map);
    dB = gradients.parameters.input_weight;
    dparameters = reshaped(gradients.parameters.of_channels, {2, x.size(2)});
  } else if (C && direction != Direction::kBoth) {
    const WeighedStatesGradients gradients = weighed_states_gradients(inputs, contiguous(grad_), direction);
    dx = gradients.x, draw_delta = gradients.raw_delta, dparameters = gradients.parameters;
    dB = gradients.B, dC = gradients.C;
  } else {  // sums over the states, in the precision of the sums inside a scan
    const bool sums = states > 1;
    dx = empty(x, map, sums ? accumulation : type), draw_delta = empty_like(dx);
    dparameters = zeros(x, {1 + states, x.size(2)}, accumulation);
    // (N, B, L), which the kernels write.
    const Tensor dinput_weights = empty(x, {states, x.size(0), x.size(1)}, accumulation),
                 doutput_weights = empty_like(dinput_weights);
    for (int64_t n = 0; n < states; ++n) {
      const Tensor of_state = contiguous(C ? multiply(grad_, state_of(*C, n)) : select(grad_, -1, n));
      const ScanGradients gradients = gradients_from_h(inputs, of_state, n, direction);
      compute_waiting_sums();
      if (C) {
        const Tensor h = reshaped(scan_maps(inputs, n, 1, direction), map);
        copy(select(doutput_weights, 0, n), sum(multiply(grad_, h), -1, accumulation));
      }
      merge(gradients.x, Tensor(), 0, x, Tensor(), n > 0, dx);
      merge(gradients.raw_delta, Tensor(), 0, x, Tensor(), n > 0, draw_delta);
      copy(select(dinput_weights, 0, n), gradients.parameters.input_weight);
      const Tensor& of_channels = gradients.parameters.of_channels;
      add(select(dparameters, 0, 0), select(of_channels, 0, 0));
      copy(slice(dparameters, 1 + n, 1), select(of_channels, 0, 1));
    }
    dx = to(dx, type), draw_delta = to(draw_delta, type);
    dB = as_weights(dinput_weights, B);
    if (C) dC = as_weights(doutput_weights, *C);
  }
  if (!dt_weight) return {dx, draw_delta, empty(x, {0}, type), dparameters, dB, dC};
  const Tensor rows = as_rows(draw_delta), ddt = matrix_product(rows, inputs.dt_weight, dt.sizes());
  const Tensor ddt_weight = matrix_product(transpose(rows), inputs.dt, dt_weight->sizes());
  return {dx, ddt, to(ddt_weight, dt_weight->scalar_type()), dparameters, dB, dC};
}

Gradients merged_scan_backward(const Tensor& grad_, const Tensor& x, const Tensor& dt, const Tensor& dt_weight,
                               const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                               const Tensor& C, const std::optional<Tensor>& D_skip, const Tensor& parent,
                               const Tensor& order, const Tensor& subtree_size, const Tensor& kept,
                               std::string_view direction_name) {
  check_merged_scan(x, dt, dt_weight, dt_bias, A_log, B, C, D_skip, parent, order, subtree_size, {});
  const Direction direction = parse_one_sweep(direction_name);
  const int64_t groups = A_log.size(0), channels = x.size(2);
  GROOTVL_CHECK(grad_.sizes().equals(x.sizes()), "grad must be ", x.sizes(), ", got ", grad_.sizes());
  check_like("kept", kept, "x", x, {groups, x.size(0), x.size(1), channels});
  const DeviceGuard guard(x);
  const SelectiveInputs inputs(x, dt, dt_weight, dt_bias, A_log, B, C, parent, order, subtree_size, true);
  const ScalarType type = x.scalar_type(), accumulation = accumulation_type(x);
  const Tensor grad = contiguous(to(grad_, type));
  const ScanGradients gradients = gradients_from_sum(inputs, grad, contiguous(kept), 0, groups, direction);
  const Tensor dx = empty_like(inputs.x);
  merge(gradients.x, Tensor(), 0, grad, D_skip ? contiguous(to(*D_skip, accumulation)) : Tensor(), false, dx);
  const Tensor draw_delta = reshaped(gradients.raw_delta, {groups, x.size(0) * x.size(1), channels});
  const Tensor ddt = empty(dt, dt.sizes(), type);
  const Tensor ddt_by_group = matrix_products(draw_delta, inputs.dt_weight);
  copy(ddt,
       strided(ddt_by_group, dt.sizes(), {x.size(1) * dt.size(3), dt.size(3), x.size(0) * x.size(1) * dt.size(3), 1}));
  // Image by image, and then a sum: cuBLAS gives each product of a batch to few multiprocessors, however long it is.
  const int64_t length = x.size(1), rank = dt.size(3);
  const Tensor by_image =
      matrix_products(transposed_matrices(reshaped(gradients.raw_delta, {groups * x.size(0), length, channels})),
                      reshaped(contiguous(inputs.dt), {groups * x.size(0), length, rank}));
  const Tensor ddt_weight = sum(reshaped(by_image, {groups, x.size(0), channels, rank}), 1, accumulation);
  return {dx,
          ddt,
          to(ddt_weight, dt_weight.scalar_type()),
          gradients.parameters.of_channels,
          as_weights(gradients.parameters.input_weight, B),
          as_weights(gradients.parameters.output_weight, C)};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("selective_scan_backward", TORCH_BOX(&grootvl::selective_scan_backward));
  m.impl("merged_scan_backward", TORCH_BOX(&grootvl::merged_scan_backward));
}
