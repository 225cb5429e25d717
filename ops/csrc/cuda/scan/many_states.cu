// Selective scans of one x for the states of a state space model, by one sweep: only y = sum_s C_s h_s is asked for, so
// that no h needs to go through memory.
#include "launch_states.cuh"
#include "selective_scan.cuh"

namespace grootvl {
namespace {

// Calls `run(groups, data)`. `groups` is a constant, the groups of lanes for `count` states; `data` describes as many
// scans as there are states from `first` on, filled up to whole parts.
template <typename Run>
void with_states(const SelectiveInputs& inputs, int64_t first, int64_t count, Run run) {
  for_floating_type(inputs.x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    const auto run_groups = [&](auto groups) {
      constexpr int kStates = warp_states(groups());
      auto data = inputs.data<T, Accumulation<T>>(first, (count + kStates - 1) / kStates * kStates);
      data.output_weight = weights_of<T>(inputs.C, first);
      run(groups, data);
    };
    if (state_groups(count) == 1) {
      run_groups(std::integral_constant<int, 1>());
    } else {
      run_groups(std::integral_constant<int, 4>());
    }
  });
}

// The gradients of `count` states from `first` on. Those of maps are (parts, B, L, D).
struct PartialGradients {
  Tensor x, raw_delta, decay_raw_delta;
  StateGradients parameters;
};

PartialGradients partial_gradients(const SelectiveInputs& inputs, const Tensor& grad, int64_t first, int64_t count,
                                   Direction direction) {
  const Tensor& x = inputs.x;
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2);
  PartialGradients result;
  with_states(inputs, first, count, [&](auto groups, auto data) {
    using T = std::remove_pointer_t<decltype(data.out)>;
    const Tensor kept = empty(x, {batch, length, channels, data.scans}, x.scalar_type());
    data.kept = kept.template mutable_data_ptr<T>();
    with_sweep<false>(direction,
                      [&](auto pass) { scan_states<groups(), pass(), true>(data, count, x, inputs.planned); });
    result.x = empty(x, {data.scans / warp_states(groups()), batch, length, channels}, x.scalar_type());
    result.raw_delta = empty_like(result.x);
    data.grad = grad.const_data_ptr<T>();
    data.out = result.x.template mutable_data_ptr<T>();
    data.ddecay_or_raw_delta = result.raw_delta.template mutable_data_ptr<T>();
    if (inputs.decay_raw_delta.defined()) {
      result.decay_raw_delta = empty_like(result.x);
      data.ddecay_raw_delta = result.decay_raw_delta.template mutable_data_ptr<T>();
    }
    with_sweep<true>(direction, [&](auto pass) {
      result.parameters = scan_states<groups(), pass(), false>(data, count, x, inputs.planned);
    });
  });
  return result;
}

}  // namespace

Tensor weighed_states(const SelectiveInputs& inputs, Direction direction) {
  const Tensor& x = inputs.x;
  Tensor parts;  // (parts, B, L, D)
  with_states(inputs, 0, inputs.scans(), [&](auto groups, auto data) {
    using T = std::remove_pointer_t<decltype(data.out)>;
    parts = empty(x, {data.scans / warp_states(groups()), x.size(0), x.size(1), x.size(2)}, x.scalar_type());
    data.out = parts.template mutable_data_ptr<T>();
    with_sweep<false>(
        direction, [&](auto pass) { scan_states<groups(), pass(), false>(data, inputs.scans(), x, inputs.planned); });
  });
  if (parts.size(0) == 1) return reshaped(parts, x.sizes());
  const Tensor y = empty_like(x);
  merge(parts, Tensor(), 0, x, Tensor(), false, y);
  return y;
}

WeighedStatesGradients weighed_states_gradients(const SelectiveInputs& inputs, const Tensor& grad,
                                                Direction direction) {
  const Tensor& x = inputs.x;
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2), states = inputs.scans();
  const ScalarType type = x.scalar_type(), accumulation = accumulation_type(x);
  // What the scans keep of all states would take much memory if maps are large: then few states are taken at once.
  constexpr int64_t kMostKept = int64_t{1} << 29;  // values
  const int64_t at_once = x.numel() * states <= kMostKept ? states : kLaneStates;
  WeighedStatesGradients result;
  Tensor dB, dC;  // (B, L, N)
  for (int64_t first = 0; first < states; first += at_once) {
    const int64_t count = std::min(at_once, states - first);
    const PartialGradients part = partial_gradients(inputs, grad, first, count, direction);
    const auto& [B, C, of_channels] = part.parameters;
    // The sum over the parts, and over those before.
    const auto sum_maps = [&](const Tensor& maps, Tensor& sum) {
      if (!maps.defined()) return;
      if (count == states && maps.size(0) == 1) {
        sum = reshaped(maps, x.sizes());
        return;
      }
      if (first == 0) sum = empty(x, x.sizes(), accumulation);
      merge(maps, Tensor(), 0, x, Tensor(), first > 0, sum);
      if (first + count == states) sum = to(sum, type);
    };
    sum_maps(part.x, result.x);
    sum_maps(part.raw_delta, result.raw_delta);
    sum_maps(part.decay_raw_delta, result.decay_raw_delta);
    if (count == states && B.size(2) == states && part.x.size(0) == 1) {  // nothing is to be summed or left out
      dB = B, dC = C, result.parameters = of_channels;
      break;
    }
    if (first == 0) {
      dB = empty(x, {batch, length, states}, type), dC = empty_like(dB);
      result.parameters = zeros(x, {1 + states, channels}, accumulation);
    }
    const int64_t parts = part.x.size(0);
    add(select(result.parameters, 0, 0), sum(slice(of_channels, 0, parts), 0, accumulation));
    copy(slice(result.parameters, 1 + first, count), slice(of_channels, parts, count));
    copy(slice(dB, first, count, 2), slice(B, 0, count, 2));
    copy(slice(dC, first, count, 2), slice(C, 0, count, 2));
  }
  result.B = reshaped(dB, inputs.B.sizes()), result.C = reshaped(dC, inputs.C.sizes());
  return result;
}

namespace {

SelectiveInputs stepped_inputs(const Tensor& x, const Tensor& dt, const Tensor& decay_dt, const Tensor& A_log,
                               const Tensor& B, const Tensor& C, const Tensor& parent, const Tensor& order,
                               const Tensor& subtree_size) {
  SelectiveInputs inputs(x, dt, {}, {}, A_log, B, C, parent, order, subtree_size);
  inputs.decay_raw_delta = contiguous(decay_dt);
  return inputs;
}

Tensor stepped_scan(const Tensor& x, const Tensor& dt, const Tensor& decay_dt, const Tensor& A_log, const Tensor& B,
                    const Tensor& C, const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                    std::string_view direction_name) {
  check_stepped_scan(x, dt, decay_dt, A_log, B, C, parent, order, subtree_size);
  const Direction direction = parse_one_sweep(direction_name);
  const DeviceGuard guard(x);
  return weighed_states(stepped_inputs(x, dt, decay_dt, A_log, B, C, parent, order, subtree_size), direction);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> stepped_scan_backward(
    const Tensor& grad, const Tensor& x, const Tensor& dt, const Tensor& decay_dt, const Tensor& A_log, const Tensor& B,
    const Tensor& C, const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
    std::string_view direction_name) {
  check_stepped_scan(x, dt, decay_dt, A_log, B, C, parent, order, subtree_size);
  check_like("grad", grad, "x", x, x.sizes());
  const Direction direction = parse_one_sweep(direction_name);
  const DeviceGuard guard(x);
  const SelectiveInputs inputs = stepped_inputs(x, dt, decay_dt, A_log, B, C, parent, order, subtree_size);
  const WeighedStatesGradients gradients = weighed_states_gradients(inputs, contiguous(grad), direction);
  return {gradients.x,
          gradients.raw_delta,
          gradients.decay_raw_delta,
          copy_as(transpose(slice(gradients.parameters, 1, inputs.scans())), accumulation_type(x)),
          gradients.B,
          gradients.C};
}

}  // namespace

}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("stepped_scan", TORCH_BOX(&grootvl::stepped_scan));
  m.impl("stepped_scan_backward", TORCH_BOX(&grootvl::stepped_scan_backward));
}
