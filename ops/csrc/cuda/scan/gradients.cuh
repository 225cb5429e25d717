// Step 3 of the gradients of selective scans whose forward pass has kept what one sweep needs (scan.cuh).
#pragma once

#include "finish.cuh"

namespace grootvl {

template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    finish_gradients(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  static_assert(is_gradient(pass));
  constexpr bool kUp = sweeps_up(pass, 0);
  await_kernels_before();
  const RunItem item(data, plan);
  if (!item.valid) {
    write_parameter_gradients<3, T, acc_t>(data, plan, item, {});
    return;
  }
  const uint32_t row_bytes = data.channels * sizeof(T);
  Stack<acc_t> stack(0, capacity);
  const bool whole_tree = !plan.runs.several();
  // What enters the next row: the sum over its children, or the gradient of its parent.
  acc_t entering = whole_tree ? acc_t(0) : kUp ? runs.E[item.at_run] : runs.h_above()[item.at_run];

  const T* columns[] = {decay_or_raw_delta(data, item), data.grad + item.column, data.x + item.column,
                        data.kept + item.map_column};
  const TileCopy<T, 4> row_copy(columns, item.lane_channel(), item.warp_channels, data.channels, data.aligned);
  const TileCopy<acc_t, 0> no_sums(nullptr, 0, 0, 0, true);
  const T* weights[] = {data.input_weight.of(item.scan, item.rows), data.output_weight.of(item.scan, item.rows)};
  const uint32_t weight_bytes[] = {uint32_t(data.input_weight.vertex_stride * sizeof(T)),
                                   uint32_t(data.output_weight.vertex_stride * sizeof(T))};
  T *dx = data.out + item.map_column, *draw_deltas = data.ddecay_or_raw_delta + item.map_column;
  acc_t* dinput_weights = data.dinput_weight + item.of_channel_group(data);
  acc_t* doutput_weights = data.doutput_weight + item.of_channel_group(data);
  const Discretisation<acc_t> discretise = discretisation<true>(data, item);
  acc_t dbias = 0, dA_log = 0, dskip = 0;
  acc_t dinput_weight_shares[kTileRows], doutput_weight_shares[kTileRows];
  const auto visit_row = [&](const Row<T, acc_t>& row, int j, int, auto interior) {
    const uint32_t node = row.node, vertex = node & kVertexMask;
    const bool root = !interior && node & kRoot, write = item.active && (interior || !(node & kPast));
    const auto step = discretise(static_cast<acc_t>(row.data[0]));
    const acc_t grad = static_cast<acc_t>(row.data[1]), x = static_cast<acc_t>(row.data[2]),
                kept = static_cast<acc_t>(row.data[3]);
    const acc_t scale = step.delta * row.weights[0];
    acc_t dinput = grad * row.weights[1], h, by_decay;
    if constexpr (kUp) {
      stack.template push_or_add<kPush>(node, entering, dinput);
      entering = root ? acc_t(0) : step.decay * dinput;
      stack.template pop_and_add<kLight>(node, entering);
      h = scale * x + kept;
      by_decay = dinput * kept;
    } else {
      stack.template push_if<kLight>(node, entering);
      const acc_t from_above = root ? acc_t(0) : step.decay * entering;
      dinput += from_above;
      entering = dinput;
      stack.template pop_if<kPush>(node, entering);
      h = kept;
      by_decay = kept * from_above;
    }
    const acc_t by_rate = by_decay * discretise.rate;
    const acc_t draw_delta = (dinput * x * row.weights[0] + by_rate) * step.slope;
    dinput_weight_shares[j] = write ? dinput * x * step.delta : 0;
    doutput_weight_shares[j] = write ? grad * h : 0;
    if (write) {
      store_streaming(at_vertex(dx, vertex, row_bytes), static_cast<T>(dinput * scale));
      store_streaming(at_vertex(draw_deltas, vertex, row_bytes), static_cast<T>(draw_delta));
      dbias += draw_delta;
      dA_log += by_rate * step.delta;
      dskip += grad * x;
    }
  };
  const auto finish_tile = [&](const Row<T, acc_t>(&rows)[kTileRows]) {
    stack.stay_inside();
    write_weight_gradients(rows, dinput_weight_shares, dinput_weights);
    write_weight_gradients(rows, doutput_weight_shares, doutput_weights);
  };
  walk<kUp ? Sweep::kUp : Sweep::kDown, 2>(
      item.nodes(plan), item.length(), row_copy, no_sums, weights, weight_bytes,
      shared_address() + stack_bytes<acc_t>(1, capacity), whole_tree, [](auto&, int) {}, visit_row, finish_tile);
  write_parameter_gradients(data, plan, item, {dbias, dA_log, dskip});
}

}  // namespace grootvl
