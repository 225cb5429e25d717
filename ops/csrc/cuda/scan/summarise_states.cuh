// Step 1 of a scan in runs for many states: U, P, beta and a_end of each run and state (scan.cuh).
#pragma once

#include "walk_states.cuh"

namespace grootvl {

template <int kGroups, Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWarpLanes)
    summarise_states(ScanData<T, acc_t> data, int states, Plan plan, RunData<acc_t> runs, int capacity) {
  await_kernels_before();
  constexpr bool kUp = sweeps_up(pass, 0);
  using Item = StateItem<kGroups>;
  const Item item(data, plan, states);
  if (!item.valid) return;
  acc_t* memory = reinterpret_cast<acc_t*>(shared_memory);
  StateStack<acc_t> stack(memory, capacity);
  const StateDecays<acc_t> decays(data, item);
  const acc_t bias = data.delta_bias[item.channel];
  // As in summarise_runs, where the names are explained.
  States<acc_t> sum = {}, product, factor, a_end = {}, U = {}, from_chain = {}, P = {};
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) product[s] = factor[s] = 1;
  acc_t deltas[Item::kOwnRows], inputs[Item::kOwnRows];
  const T* maps[] = {data.decay_or_raw_delta + item.column, (is_gradient(pass) ? data.grad : data.x) + item.column,
                     own_steps(data, item)};
  const PixelWeights<T> weights[] = {is_gradient(pass) ? data.output_weight : data.input_weight};
  walk_states<Sweep::kUp>(
      data, plan, item, maps, weights, memory + stack_size(capacity), [](uint32_t, int) {},
      [&](const T(&values)[3][Item::kOwnRows]) {
#pragma unroll
        for (int i = 0; i < Item::kOwnRows; ++i) {
          const Steps<acc_t> steps(values[0][i], values[2][i], bias, maps[2] != nullptr);
          deltas[i] = steps.decay.value;
          inputs[i] = static_cast<acc_t>(values[1][i]) * (is_gradient(pass) ? acc_t(1) : steps.input.value);
        }
      },
      [&](uint32_t node, int j, const States<acc_t>(&weights)[1]) {
        const acc_t delta = item.of_row(deltas, j), input = item.of_row(inputs, j);
        if (kUp && node & kPush) {
          stack.push(sum);
#pragma unroll
          for (int s = 0; s < kLaneStates; ++s) sum[s] = 0;
        }
        const bool root = node & kRoot, past = node & kPast, chain = node & kChain;
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          const acc_t decay = root ? acc_t(0) : decays(s, delta);
          const acc_t u = weights[0][s] * input + (kUp ? sum[s] : acc_t(0));
          if (kUp) sum[s] = decay * u;
          if (chain) {
            product[s] *= factor[s], factor[s] = decay;
            P[s] += product[s] * (u - from_chain[s]);
            if (kUp) from_chain[s] = sum[s];
          }
          if (!past) U[s] = u, a_end[s] = decay;
        }
        if (kUp && node & kLight) {
          States<acc_t> pending;
          stack.pop(pending);
#pragma unroll
          for (int s = 0; s < kLaneStates; ++s) sum[s] += pending[s];
        }
      },
      [](const auto&) {});
  if (!item.active) return;
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) {
    const int64_t i = item.at_run + s * item.state_stride;
    runs.beta[i] = product[s], runs.a_end[i] = a_end[s], runs.U[i] = U[s], runs.P[i] = P[s];
  }
}

}  // namespace grootvl
