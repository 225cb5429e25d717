// Step 3 of a scan in runs, and the only one of a tree of one run: the sweeps of each run, with what enters it.
#pragma once

#include "walk.cuh"

namespace grootvl {

// Sums of a tile of values, each over a warp: value i / (kWarpLanes / kTileRows) for lane i.
template <typename acc_t>
__device__ __forceinline__ acc_t warp_sums(acc_t (&values)[kTileRows]) {
  int distance = scatter_sums<1>(values, kWarpLanes / 2);
#pragma unroll
  for (; distance > 0; distance /= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  return values[0];
}

// Writes the gradients of the weights of a tile's pixels, of which each lane has its channel's share in `shares`.
template <typename T, typename acc_t>
__device__ __forceinline__ void write_weight_gradients(const Row<T, acc_t> (&rows)[kTileRows],
                                                       acc_t (&shares)[kTileRows], acc_t* gradients) {
  const acc_t sum = warp_sums(shares);
  constexpr int kRowLanes = kWarpLanes / kTileRows;
  uint32_t node = rows[0].node;
#pragma unroll
  for (int j = 1; j < kTileRows; ++j) {
    if (threadIdx.x / kRowLanes == j) node = rows[j].node;
  }
  if (threadIdx.x % kRowLanes == 0 && !(node & kPast)) gradients[node & kVertexMask] = sum;
}

// The gradient of a vertex's decay: `from_above` has h_parent - a u of each operand, or h_parent of one that is only
// swept down. 0 in a forward pass.
template <Pass pass, typename T, typename acc_t>
__device__ __forceinline__ acc_t decay_gradient(const Row<T, acc_t>& row, bool root,
                                                const acc_t (&from_above)[num_operands(pass)]) {
  acc_t gradient = 0;
  if constexpr (is_backward(pass)) {
    gradient = row.sums[0] * from_above[1];
    if constexpr (sweeps_up(pass, 1)) gradient += row.sums[1] * from_above[0];
    if (root) gradient = 0;
  }
  return gradient;
}

// Where a lane keeps u between the two sweeps of a run: of small trees in shared memory, by place in the run; otherwise
// in global memory, by vertex.
template <typename T, typename acc_t>
struct SumsBetweenSweeps {
  uint32_t on_chip;
  acc_t* columns[2];

  __device__ __forceinline__ uint32_t on_chip_address(const ScanData<T, acc_t>& data, int operand, int place) const {
    return on_chip + (operand * data.num_vertices + place) * uint32_t(kWarpChannels * sizeof(acc_t));
  }
};

// Writes a run's sums for the gradients of parameters, of delta_bias, A_log and, if there are three, dy x. The room of
// a run that does not exist gets zeros, which are summed up too.
template <int kCount, typename T, typename acc_t>
__device__ __forceinline__ void write_parameter_gradients(const ScanData<T, acc_t>& data, const Plan& plan,
                                                          const RunItem& item, const acc_t (&gradients)[kCount]) {
  if (!item.active) return;
  const int64_t stride = int64_t(data.maps) * plan.runs.capacity * data.channels;
#pragma unroll
  for (int i = 0; i < kCount; ++i) data.dparameters[i * stride + item.at_run] = gradients[i];
}

// Nothing enters a run that is the whole tree. u is kept on chip between the sweeps if kOnChip.
template <bool kOnChip, Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    finish_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  await_kernels_before();
  constexpr int kOperands = num_operands(pass);
  constexpr bool kParameterGradients = has_parameter_gradients(pass, kSelective);
  const RunItem item(data, plan);
  if (!item.valid) {
    if constexpr (kParameterGradients) write_parameter_gradients<2, T, acc_t>(data, plan, item, {});
    return;
  }
  const uint32_t row_bytes = data.channels * sizeof(T), sum_row_bytes = data.channels * sizeof(acc_t);
  const uint32_t ring = shared_address() + stack_bytes<acc_t>(kOperands, capacity);
  const uint32_t on_chip = ring + ring_bytes_of<pass, kSelective, T, acc_t>() + threadIdx.x * uint32_t(sizeof(acc_t));
  Stack<acc_t> stacks[2] = {{0, capacity}, {1, capacity}};
  const bool whole_tree = !plan.runs.several();
  acc_t E[kOperands] = {};
  if (!whole_tree) {
    for (int operand = 0; operand < kOperands; ++operand) E[operand] = runs.E[operand * runs.stride + item.at_run];
  }
  T* out = data.out + item.map_column;
  const SumsBetweenSweeps<T, acc_t> sums{on_chip, {data.sums[0] + item.map_column, data.sums[1] + item.map_column}};
  if constexpr (pass != Pass::kDown) {
    walk_up<pass, kSelective>(data, plan, item, ring, whole_tree, stacks, E,
                              [&](int operand, uint32_t node, int place, acc_t, acc_t u, acc_t, auto interior) {
                                if (!interior && node & kPast) return;
                                if constexpr (kOnChip) {
                                  store_shared(sums.on_chip_address(data, operand, place), u);
                                  return;
                                }
                                if (!item.active) return;
                                const uint32_t vertex = node & kVertexMask;
                                if constexpr (pass == Pass::kUp) {
                                  at_vertex(out, vertex, row_bytes) = static_cast<T>(u);
                                } else {
                                  at_vertex(sums.columns[operand], vertex, sum_row_bytes) = u;
                                }
                              });
  }
  if constexpr (pass == Pass::kUp) return;

  constexpr int kSumsPrefetched = kOnChip ? 0 : num_between_sweeps(pass);
  constexpr bool kReadsX = reads_x_down(pass, kSelective);
  const T* columns[] = {decay_or_raw_delta(data, item), data.x + item.column};
  const acc_t* sum_columns[] = {sums.columns[0], sums.columns[1]};
  const TileCopy<T, 1 + kReadsX> row_copy(columns, item.lane_channel(), item.warp_channels, data.channels,
                                          data.aligned);
  const TileCopy<acc_t, kSumsPrefetched> sum_copy(sum_columns, item.lane_channel(), item.warp_channels, data.channels,
                                                  data.aligned);
  const T* input_weights[] = {data.input_weight.of(item.scan, item.rows)};
  const uint32_t weight_bytes[] = {uint32_t(data.input_weight.vertex_stride * sizeof(T))};
  T* ddecay_or_raw_delta = data.ddecay_or_raw_delta + item.map_column;
  acc_t* dinput_weights = data.dinput_weight + item.of_channel_group(data);
  // A selective scan alone is asked for what a gradient pass needs, and then perhaps for nothing else.
  constexpr bool kMayKeep = pass == Pass::kDown && kSelective;
  const bool wants_out = !kMayKeep || data.out != nullptr, keeps = kMayKeep && data.kept != nullptr;
  T* kept = data.kept + item.map_column;
  const auto discretise = discretisation<kSelective>(data, item);
  acc_t dbias = 0, dA_log = 0, dinput_weight_shares[kTileRows];
  acc_t h[kOperands] = {};  // of the next row's parent
  for (int operand = 0; operand < kOperands; ++operand) {
    if (!whole_tree) h[operand] = runs.h_above()[operand * runs.stride + item.at_run];
    stacks[operand].clear();
  }
  const auto read_on_chip = [&](Row<T, acc_t>& row, int place) {
    if constexpr (kOnChip) {
      for (int operand = 0; operand < kOperands; ++operand) {
        load_shared(sums.on_chip_address(data, operand, place), row.sums[operand]);
      }
    }
  };
  const auto visit_row = [&](const Row<T, acc_t>& row, int j, int, auto interior) {
    const uint32_t node = row.node, vertex = node & kVertexMask;
    const bool root = !interior && node & kRoot, write = item.active && (interior || !(node & kPast));
    const auto step = discretise(static_cast<acc_t>(row.data[0]));
    acc_t from_above[kOperands];
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) {
      acc_t u;
      if constexpr (num_between_sweeps(pass) > 0) {
        u = row.sums[operand];
      } else {
        u = static_cast<acc_t>(row.data[1]);
        if constexpr (kSelective) u *= step.delta * row.weights[0];
      }
      stacks[operand].template push_if<kLight>(node, h[operand]);
      from_above[operand] = sweeps_up(pass, operand) ? h[operand] - step.decay * u : h[operand];
      h[operand] = root ? u : u + step.decay * from_above[operand];
    }
    const acc_t ddecay = decay_gradient<pass>(row, root, from_above);
    const acc_t result = pass == Pass::kDownBackward ? row.sums[0] : h[kOperands - 1];  // h, or dx in a backward pass
    if constexpr (!kParameterGradients) {
      if (write) {
        if (wants_out) store_streaming(at_vertex(out, vertex, row_bytes), static_cast<T>(result));
        if (keeps) {
          store_streaming(at_vertex(kept, vertex, row_bytes),
                          static_cast<T>(root ? acc_t(0) : step.decay * from_above[0]));
        }
        if constexpr (is_backward(pass)) {
          store_streaming(at_vertex(ddecay_or_raw_delta, vertex, row_bytes), static_cast<T>(ddecay));
        }
      }
    } else {
      const acc_t x = static_cast<acc_t>(row.data[1]);
      const acc_t dinput = result, by_rate = ddecay * step.decay * discretise.rate;
      const acc_t draw_delta = (dinput * x * row.weights[0] + by_rate) * step.slope;
      dinput_weight_shares[j] = write ? dinput * x * step.delta : 0;
      if (write) {
        store_streaming(at_vertex(out, vertex, row_bytes), static_cast<T>(dinput * step.delta * row.weights[0]));
        store_streaming(at_vertex(ddecay_or_raw_delta, vertex, row_bytes), static_cast<T>(draw_delta));
        dbias += draw_delta;
        dA_log += by_rate * step.delta;
      }
    }
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) stacks[operand].template pop_if<kPush>(node, h[operand]);
  };
  const auto finish_tile = [&](const Row<T, acc_t>(&rows)[kTileRows]) {
    for (int operand = 0; operand < kOperands; ++operand) stacks[operand].stay_inside();
    if constexpr (kParameterGradients) write_weight_gradients(rows, dinput_weight_shares, dinput_weights);
  };
  walk<Sweep::kDown, kSelective && kReadsX>(item.nodes(plan), item.length(), row_copy, sum_copy, input_weights,
                                            weight_bytes, ring, whole_tree, read_on_chip, visit_row, finish_tile);
  if constexpr (kParameterGradients) write_parameter_gradients(data, plan, item, {dbias, dA_log});
}

}  // namespace grootvl
