// Step 3 of a scan in runs for many states, and the only one of a tree of one run: y = sum_s C_s h_s, or what the
// gradients need; and the gradients.
#pragma once

#include "walk_states.cuh"

namespace grootvl {

// What enters the first row that a walk visits: the sum over its children, or its parent's value.
template <bool kUp, int kGroups, typename acc_t>
__device__ __forceinline__ void load_entering(States<acc_t>& entering, const StateItem<kGroups>& item, const Plan& plan,
                                              const RunData<acc_t>& runs) {
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) {
    const int64_t i = item.at_run + s * item.state_stride;
    entering[s] = !plan.runs.several() ? acc_t(0) : kUp ? runs.E[i] : runs.h_above()[i];
  }
}

// What a vertex's flags say of the sums that enter it, before and after it is visited.
template <bool kUp, typename acc_t>
__device__ __forceinline__ void before_vertex(uint32_t node, StateStack<acc_t>& stack, States<acc_t>& entering) {
  constexpr uint32_t kFlags = kUp ? kPush : kLight | kRoot;
  if (!(node & kFlags)) return;
  if (kUp || node & kLight) stack.push(entering);
  if (!kUp && !(node & kRoot)) return;
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) entering[s] = 0;
}
template <bool kUp, typename acc_t>
__device__ __forceinline__ void after_vertex(uint32_t node, StateStack<acc_t>& stack, States<acc_t>& entering) {
  constexpr uint32_t kFlags = kUp ? kLight | kRoot : kPush;
  if (!(node & kFlags)) return;
  if constexpr (!kUp) {
    stack.pop(entering);
    return;
  }
  States<acc_t> pending = {};
  if (node & kLight) stack.pop(pending);
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) entering[s] = (node & kRoot ? acc_t(0) : entering[s]) + pending[s];
}

// `data.out` (parts of the states, batch, L, D) gets y, or if kKeeps `data.kept` (batch, L, D, states) what the
// gradients need of each state: h in a sweep up, what came from the parent in a sweep down.
template <int kGroups, Pass pass, bool kKeeps, typename T, typename acc_t>
__global__ void __launch_bounds__(kWarpLanes)
    finish_states(ScanData<T, acc_t> data, int states, Plan plan, RunData<acc_t> runs, int capacity) {
  static_assert(pass == Pass::kUp || pass == Pass::kDown);
  await_kernels_before();
  constexpr bool kUp = pass == Pass::kUp;
  using Item = StateItem<kGroups>;
  const Item item(data, plan, states);
  if (!item.valid) return;
  acc_t* memory = reinterpret_cast<acc_t*>(shared_memory);
  StateStack<acc_t> stack(memory, capacity);
  const StateDecays<acc_t> decays(data, item);
  const acc_t bias = data.delta_bias[item.channel];
  States<acc_t> entering;
  load_entering<kUp>(entering, item, plan, runs);
  acc_t deltas[Item::kOwnRows], inputs[Item::kOwnRows], y[kTileRows];
  const uint32_t row_bytes = data.channels * sizeof(T), kept_row_bytes = row_bytes * data.scans;
  T *out = data.out + item.map_column, *kept = data.kept + item.column * data.scans + item.first_state;
  const T* maps[] = {data.decay_or_raw_delta + item.column, data.x + item.column, own_steps(data, item)};
  const PixelWeights<T> weights[] = {data.input_weight, data.output_weight};
  walk_states<kUp ? Sweep::kUp : Sweep::kDown>(
      data, plan, item, maps, weights, memory + stack_size(capacity), [](uint32_t, int) {},
      [&](const T(&values)[3][Item::kOwnRows]) {
#pragma unroll
        for (int i = 0; i < Item::kOwnRows; ++i) {
          const Steps<acc_t> steps(values[0][i], values[2][i], bias, maps[2] != nullptr);
          deltas[i] = steps.decay.value;
          inputs[i] = static_cast<acc_t>(values[1][i]) * steps.input.value;
        }
      },
      [&](uint32_t node, int j, const States<acc_t>(&weights)[2]) {
        const acc_t delta = item.of_row(deltas, j), input = item.of_row(inputs, j);
        before_vertex<kUp>(node, stack, entering);
        States<acc_t> to_keep;
        y[j] = 0;
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          const acc_t decay = decays(s, delta), from_above = decay * entering[s];  // in a sweep down
          const acc_t h = weights[0][s] * input + (kUp ? entering[s] : from_above);
          y[j] += weights[1][s] * h;
          to_keep[s] = kUp ? h : from_above;
          entering[s] = kUp ? decay * h : h;
        }
        if (kKeeps && item.active && !(node & kPast)) {
          store(&at_vertex(kept, node & kVertexMask, kept_row_bytes), to_keep);
        }
        after_vertex<kUp>(node, stack, entering);
      },
      [&](const uint32_t (&nodes)[Item::kOwnRows]) {
        if constexpr (kKeeps) return;
        acc_t sums[Item::kOwnRows];
        item.sum_groups(y, sums);
#pragma unroll
        for (int i = 0; i < Item::kOwnRows; ++i) {
          if (item.active && !(nodes[i] & kPast)) {
            store_streaming(at_vertex(out, nodes[i] & kVertexMask, row_bytes), static_cast<T>(sums[i]));
          }
        }
      });
}

// The gradients, from that of y, `data.grad`, and what was kept: of x and of raw delta (parts of the states, batch, L,
// D), and of the decays' own raw delta, if they have one. `data.dinput_weight` (2, groups of channels, batch, L,
// states) gets sums over the warp's channels, of B and of C; `data.dparameters` sums over a run, of delta's bias
// (parts, batch, runs, D), and behind them of A_log (states, batch, runs, D). See finish_gradients for a single state.
template <int kGroups, Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWarpLanes)
    finish_state_gradients(ScanData<T, acc_t> data, int states, Plan plan, RunData<acc_t> runs, int capacity) {
  static_assert(is_gradient(pass));
  await_kernels_before();
  constexpr bool kUp = sweeps_up(pass, 0);
  using Item = StateItem<kGroups>;
  constexpr int kOwnRows = Item::kOwnRows, kChannels = Item::kChannels, kStates = Item::kStates;
  const Item item(data, plan, states);
  if (!item.valid) return;
  acc_t* memory = reinterpret_cast<acc_t*>(shared_memory);
  StateStack<acc_t> stack(memory, capacity);
  memory += stack_size(capacity);
  const StateDecays<acc_t> decays(data, item);
  const acc_t bias = data.delta_bias[item.channel];
  States<acc_t> entering, dA_log = {};
  load_entering<kUp>(entering, item, plan, runs);
  acc_t dbias = 0;
  // Of the rows that this group owns.
  acc_t deltas[kOwnRows], slopes[kOwnRows], decay_deltas[kOwnRows], decay_slopes[kOwnRows];
  acc_t grads[kOwnRows], xs[kOwnRows], inputs[kOwnRows];
  acc_t dinputs[kTileRows], ddeltas[kTileRows];  // sums over this lane's states

  // What was kept is copied to shared memory a tile ahead; a lane reads what it has copied itself.
  constexpr uint32_t kBytes = kLaneStates * sizeof(T), kTileBytes = kTileRows * kWarpLanes * kBytes;
  const uint32_t ring = shared_address() +
                        (stack_size(capacity) + 2 * weights_size(kGroups)) * uint32_t(sizeof(acc_t)) +
                        threadIdx.x * kBytes;
  uint32_t current = ring + kTileBytes, ahead = ring;
  const uint32_t row_bytes = data.channels * sizeof(T), kept_row_bytes = row_bytes * data.scans;
  const T* kept = data.kept + item.column * data.scans + item.first_state;
  const auto prefetch = [&](uint32_t nodes, int lane) {
#pragma unroll
    for (int j = 0; j < kTileRows; ++j) {
      const uint32_t vertex = __shfl_sync(kAllLanes, nodes, lane + j) & kVertexMask;
      const char* from = reinterpret_cast<const char*>(&at_vertex(kept, vertex, kept_row_bytes));
      const uint32_t to = ahead + j * kWarpLanes * kBytes;
      if constexpr (kBytes % kVectorBytes == 0) {
#pragma unroll
        for (int i = 0; i < int(kBytes); i += kVectorBytes) copy_async_16_bytes(to + i, from + i);
      } else {
#pragma unroll
        for (int i = 0; i < int(kBytes); i += 4) copy_async_4_bytes(to + i, from + i);
      }
    }
    commit_async_copies();
  };
  // The value that this lane has of a row, after the sum over the channels of kLaneStates gradients of B and as many of
  // C. Lanes of as many channels as there are for each of the values have the same one.
  constexpr int kValues = 2 * kLaneStates, kSameLanes = kChannels / kValues;
  const int value = item.lane_channel / kSameLanes;
  const int64_t of_group = int64_t(value / kLaneStates) * item.channel_groups + item.channel_group;
  acc_t* dweights = data.dinput_weight + (of_group * data.batch + item.image) * data.num_vertices * data.scans +
                    item.first_state + value % kLaneStates;
  const bool writes_weights = item.lane_channel % kSameLanes == 0;
  T *dx = data.out + item.map_column, *draw_deltas = data.ddecay_or_raw_delta + item.map_column;
  T* ddecay_raw_deltas = data.ddecay_raw_delta + item.map_column;
  const T* maps[] = {data.decay_or_raw_delta + item.column, data.grad + item.column, data.x + item.column,
                     own_steps(data, item)};
  const bool has_own_steps = maps[3] != nullptr;
  const PixelWeights<T> weights[] = {data.input_weight, data.output_weight};
  walk_states<kUp ? Sweep::kUp : Sweep::kDown>(
      data, plan, item, maps, weights, memory, prefetch,
      [&](const T(&values)[4][kOwnRows]) {
        await_async_copies<0>();
        const uint32_t free = current;
        current = ahead, ahead = free;
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const Steps<acc_t> steps(values[0][i], values[3][i], bias, has_own_steps);
          deltas[i] = steps.input.value, slopes[i] = steps.input.slope;
          decay_deltas[i] = steps.decay.value, decay_slopes[i] = steps.decay.slope;
          grads[i] = item.active ? static_cast<acc_t>(values[1][i]) : acc_t(0);
          xs[i] = item.active ? static_cast<acc_t>(values[2][i]) : acc_t(0);
          inputs[i] = xs[i] * deltas[i];
        }
      },
      [&](uint32_t node, int j, const States<acc_t>(&weights)[2]) {
        const acc_t delta = item.of_row(decay_deltas, j), grad = item.of_row(grads, j), input = item.of_row(inputs, j);
        T kept_values[kLaneStates];
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          load_shared(current + j * kWarpLanes * kBytes + s * uint32_t(sizeof(T)), kept_values[s]);
        }
        before_vertex<kUp>(node, stack, entering);
        dinputs[j] = ddeltas[j] = 0;
        acc_t shares[kValues];  // of the gradients of B and C
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          const acc_t decay = decays(s, delta), kept = static_cast<acc_t>(kept_values[s]);
          const acc_t from_above = decay * entering[s];  // in a sweep down
          const acc_t dinput = grad * weights[1][s] + (kUp ? entering[s] : from_above);
          const acc_t by_decay = kept * (kUp ? dinput : from_above);
          entering[s] = kUp ? decay * dinput : dinput;
          dinputs[j] += dinput * weights[0][s];
          ddeltas[j] += by_decay * decays.rates[s];
          if (!(node & kPast)) dA_log[s] += by_decay * delta;
          shares[s] = dinput * input;
          shares[kLaneStates + s] = grad * (kUp ? weights[0][s] * input + kept : kept);
        }
        after_vertex<kUp>(node, stack, entering);
        int distance = scatter_sums<1>(shares, kChannels / 2);
#pragma unroll
        for (; distance > 0; distance /= 2) shares[0] += __shfl_xor_sync(kAllLanes, shares[0], distance);
        if (writes_weights && !(node & kPast)) dweights[int64_t(node & kVertexMask) * data.scans] = shares[0];
      },
      [&](const uint32_t (&nodes)[kOwnRows]) {
        acc_t dinput[kOwnRows], ddelta[kOwnRows];
        item.sum_groups(dinputs, dinput);
        item.sum_groups(ddeltas, ddelta);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          if (!item.active || nodes[i] & kPast) continue;
          const uint32_t vertex = nodes[i] & kVertexMask;
          acc_t draw_delta = dinput[i] * xs[i] * slopes[i];
          const acc_t of_decays = ddelta[i] * decays.kLog2 * decay_slopes[i];
          if (has_own_steps) {
            store_streaming(at_vertex(ddecay_raw_deltas, vertex, row_bytes), static_cast<T>(of_decays));
          } else {
            draw_delta += of_decays;
          }
          store_streaming(at_vertex(dx, vertex, row_bytes), static_cast<T>(dinput[i] * deltas[i]));
          store_streaming(at_vertex(draw_deltas, vertex, row_bytes), static_cast<T>(draw_delta));
          dbias += draw_delta;
        }
      });
  dbias = item.sum_groups(dbias);
  if (!item.active) return;
  const int parts = data.scans / kStates, part = item.first_state / kStates;
#pragma unroll
  for (int s = 0; s < kLaneStates; ++s) {
    data.dparameters[item.at_run + (parts + s) * item.state_stride] = dA_log[s] * decays.rates[s] * decays.kLog2;
  }
  if (item.group > 0) return;
  data.dparameters[item.at_run + (part - item.first_state) * item.state_stride] = dbias;
}

}  // namespace grootvl
