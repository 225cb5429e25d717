// Plans scans of many states and launches their kernels.
#pragma once

#include "finish_states.cuh"
#include "launch_scan.cuh"
#include "summarise_states.cuh"

namespace grootvl {

// The gradients of parameters from many states, unset for other passes. The states are filled up as in StateItem.
struct StateGradients {
  Tensor B, C;         // (batch, L, states), of x's type
  Tensor of_channels;  // of delta_bias (parts, D), and behind them of A_log (states, D)
};

// Of `data.scans` states, filled up to whole parts of warp_states(kGroups); the first `states` of them have weights.
template <int kGroups, Pass pass, bool kKeeps, typename T, typename acc_t>
StateGradients scan_states(ScanData<T, acc_t> data, int64_t states, const Tensor& x, PlannedTrees& planned) {
  using Item = StateItem<kGroups>;
  constexpr bool kGradient = is_gradient(pass);
  const int64_t parts = data.scans / Item::kStates, images = parts * data.batch;
  const int64_t length = data.num_vertices, channels = data.channels;
  const std::vector<int64_t> weights_sizes{data.batch, length, data.scans},
      parameter_sizes{parts + data.scans, channels};
  const ScalarType accumulation = accumulation_type(x);
  if (images * length * channels == 0) {
    if (!kGradient) return {};
    return {zeros(x, weights_sizes, x.scalar_type()), zeros(x, weights_sizes, x.scalar_type()),
            zeros(x, parameter_sizes, accumulation)};
  }
  GROOTVL_CHECK(length <= kVertexMask, "a tree may have up to ", kVertexMask, " vertices on CUDA, got ", length);
  const cudaStream_t stream = current_stream();
  const int64_t channel_groups = (channels + Item::kChannels - 1) / Item::kChannels;
  const bool several_runs = !in_one_run(images * channel_groups, length);
  const Plan& plan = planned.make(data, several_runs, x);
  const int capacity = walk_capacity(plan, length);
  const unsigned blocks = blocks_of(images * plan.runs.capacity * channel_groups * kWarpLanes, kWarpLanes);
  const size_t stack = sizeof(acc_t) * stack_size(capacity), weights = sizeof(acc_t) * weights_size(kGroups);
  // Launches a kernel of a warp for each run.
  const auto launch_walk = [&](auto kernel, size_t bytes, const RunData<acc_t>& runs) {
    launch_with_much_shared(kernel, blocks, kWarpLanes, bytes, stream, data, static_cast<int>(states), plan, runs,
                            capacity);
  };

  const HandedOver<acc_t> handed(plan, 1, data.maps, channels, x);
  if (several_runs) {
    launch_walk(summarise_states<kGroups, pass, T, acc_t>, stack + weights, handed.runs);
    join_all_runs<pass>(data, plan, handed, capacity);
  }
  Tensor dweights, dparameters;
  if constexpr (kGradient) {
    dweights = empty(x, {2, channel_groups, data.batch, length, data.scans}, accumulation);
    data.dinput_weight = dweights.mutable_data_ptr<acc_t>();
    // There may be fewer runs than room for them.
    const std::vector<int64_t> sizes{parts + data.scans, data.batch * plan.runs.capacity, channels};
    dparameters = several_runs ? zeros(x, sizes, accumulation) : empty(x, sizes, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
  }
  constexpr size_t kKeptBytes = kGradient ? 2 * kTileRows * kWarpLanes * kLaneStates * sizeof(T) : 0;
  size_t bytes = stack + 2 * weights + kKeptBytes;
  if (!several_runs) bytes = spread_evenly(blocks, kMaxBlocks, bytes);
  if constexpr (kGradient) {
    launch_walk(finish_state_gradients<kGroups, pass, T, acc_t>, bytes, handed.runs);
  } else {
    launch_walk(finish_states<kGroups, pass, kKeeps, T, acc_t>, bytes, handed.runs);
    return {};
  }
  const auto sum_weights = [&](int64_t which) {
    return sum_parts(slice(dweights, which, 1), 1, weights_sizes, x.scalar_type());
  };
  return {sum_weights(0), sum_weights(1), sum_parts(dparameters, parts + data.scans, parameter_sizes, accumulation)};
}

}  // namespace grootvl
