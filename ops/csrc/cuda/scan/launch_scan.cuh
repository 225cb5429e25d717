// Plans a scan and launches its kernels.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "../../checks.h"
#include "../common/arena.cuh"
#include "../common/device.cuh"
#include "../common/sum.cuh"
#include "../common/vector.cuh"
#include "finish.cuh"
#include "gradients.cuh"
#include "join.cuh"
#include "plan.cuh"
#include "short_trees.cuh"
#include "summarise.cuh"

namespace grootvl {

// Whether each tree is one run: a scan with so many warps on each multiprocessor keeps the memory busy.
inline bool in_one_run(int64_t warps, int64_t length) {
  return length <= 256 || warps >= 4 * current_limits().multiprocessors;
}

// log2 of the run length aimed at: short runs make many warps, long ones less to join.
inline int choose_log2_run(int64_t length) { return length > 2048 ? 6 : 5; }

// log2 of the section length, with about as many runs in a section as there are sections; kUncut for few runs, which
// take less time to join one after the other.
inline int choose_log2_section(int64_t length, int log2_run) {
  if (length < 8192) return kUncut;
  int log2_runs = 0;
  while ((int64_t{1} << (2 * log2_runs + 1)) < length >> log2_run) ++log2_runs;
  return log2_run + log2_runs;
}

// Whether the rows of all matrices that a walk reads begin at multiples of 16 bytes.
template <typename T, typename acc_t>
bool aligned(const ScanData<T, acc_t>& data) {
  return data.channels * sizeof(T) % kVectorBytes == 0 && is_aligned(data.x) && is_aligned(data.decay_or_raw_delta) &&
         is_aligned(data.grad) && is_aligned(data.kept) && is_aligned(data.sums[0]) && is_aligned(data.sums[1]);
}

// Calls `run` with the pass of a direction as a constant.
template <bool kBackward, typename Run>
auto with_pass(Direction direction, Run run) {
  switch (direction) {
    case Direction::kUp:
      return run(std::integral_constant<Pass, kBackward ? Pass::kUpBackward : Pass::kUp>());
    case Direction::kDown:
      return run(std::integral_constant<Pass, kBackward ? Pass::kDownBackward : Pass::kDown>());
    default:
      return run(std::integral_constant<Pass, kBackward ? Pass::kBothBackward : Pass::kBoth>());
  }
}

// Calls `run` with the pass, or the gradient pass, of a direction of one sweep as a constant.
template <bool kGradient, typename Run>
auto with_sweep(Direction direction, Run run) {
  if (direction == Direction::kUp) {
    return run(std::integral_constant<Pass, kGradient ? Pass::kUpGradient : Pass::kUp>());
  }
  return run(std::integral_constant<Pass, kGradient ? Pass::kDownGradient : Pass::kDown>());
}

// The gradients of a selective scan's parameters, unset for other scans.
struct ParameterGradients {
  Tensor input_weight;   // (maps, L), of x's type
  Tensor output_weight;  // likewise, of a gradient pass
  Tensor of_channels;    // (2, scans, D): of delta_bias and A_log; in a gradient pass (3, ...), also of dy x
};

// A grid of so many threads.
inline unsigned blocks_of(int64_t threads, int threads_of_block) {
  const int64_t count = (threads + threads_of_block - 1) / threads_of_block;
  GROOTVL_CHECK(count <= INT32_MAX, "the tensors are too large for one scan");
  return static_cast<unsigned>(count);
}

// The plan of trees, for one scan of them or for several.
struct PlannedTrees {
  Plan plan{};
  Tensor storage;
  bool made = false;

  // `x`: any tensor on the device.
  template <typename T, typename acc_t>
  const Plan& make(const ScanData<T, acc_t>& data, bool several_runs, const Tensor& x) {
    if (made && plan.runs.several() == several_runs) return plan;
    plan = {};
    made = true;
    const int64_t trees = data.trees, length = data.num_vertices, words = words_of(length);
    Pieces &runs = plan.runs, &sections = plan.sections;
    runs.log2_size = several_runs ? choose_log2_run(length) : kUncut;
    sections.log2_size = several_runs ? choose_log2_section(length, runs.log2_size) : kUncut;
    const bool several_sections = sections.log2_size < kUncut;
    const auto lay_out = [&](unsigned char* memory) {
      Arena arena(memory);
      plan.nodes = arena.take<uint32_t>(trees * length);
      const auto lay_out_pieces = [&](Pieces& pieces, bool several) {
        pieces.capacity = several ? static_cast<int>(max_pieces(length, pieces.log2_size)) : 1;
        if (!several) return;
        pieces.counts = arena.take<int32_t>(trees);
        pieces.end = arena.take<int32_t>(trees * pieces.capacity);
        pieces.nodes = arena.take<uint32_t>(trees * pieces.capacity);
      };
      lay_out_pieces(runs, several_runs);
      lay_out_pieces(sections, several_sections);
      if (several_runs) {
        plan.run_ends = arena.take<uint32_t>(trees * words);
        plan.ends_before = arena.take<int32_t>(trees * words);
      }
      if (several_sections) {
        plan.first_runs = arena.take<int32_t>(trees * runs.capacity);
        plan.sections_of_runs = arena.take<int32_t>(trees * runs.capacity);
      }
      return arena.used();
    };
    storage = empty(x, {lay_out(nullptr)}, ScalarType::Byte);
    lay_out(static_cast<unsigned char*>(storage.mutable_data_ptr()));

    const cudaStream_t stream = current_stream();
    launch(mark_nodes<T, acc_t>, blocks_of(trees * words * kWordBits, kMarkThreads), kMarkThreads, 0, stream, data,
           plan);
    if (several_runs) {
      const int64_t threads = std::min<int64_t>(words_of(words) * kWarpLanes, kMaxBlockThreads);
      launch(list_pieces<T, acc_t>, blocks_of(trees, 1), static_cast<unsigned>(threads), 0, stream, data, plan);
    }
    return plan;
  }
};

// Entries of the stacks of a scan.
inline int walk_capacity(const Plan& plan, int64_t length) {
  if (!plan.runs.several()) return stack_capacity(length);
  const int log2_run = plan.runs.log2_size;
  return stack_capacity(std::max(int64_t{1} << log2_run, length >> log2_run));
}

// Memory for what the kernels hand to each other of runs, and of sections.
template <typename acc_t>
struct HandedOver {
  RunData<acc_t> runs{}, sections{};
  Tensor storage;

  HandedOver(const Plan& plan, int operands, int64_t maps, int64_t channels, const Tensor& x) {
    if (!plan.runs.several()) return;
    const int64_t arrays = 2 + 3 * operands, of_runs = maps * plan.runs.capacity * channels,
                  of_sections = plan.sections.several() ? maps * plan.sections.capacity * channels : 0;
    storage = empty(x, {arrays * (of_runs + of_sections)}, accumulation_type(x));
    acc_t* next = storage.template mutable_data_ptr<acc_t>();
    const auto take = [&](int64_t stride) {
      RunData<acc_t> data{};
      data.stride = stride;
      data.beta = next;
      data.a_end = data.beta + stride;
      data.U = data.a_end + stride;
      data.P = data.U + operands * stride;
      data.E = data.P + operands * stride;
      next += arrays * stride;
      return data;
    };
    runs = take(of_runs);
    if (of_sections > 0) sections = take(of_sections);
  }
};

// Step 2 of a scan in runs: launches the kernels that find what enters each run.
template <Pass pass, typename T, typename acc_t>
void join_all_runs(const ScanData<T, acc_t>& data, const Plan& plan, const HandedOver<acc_t>& handed, int capacity) {
  constexpr int kOperands = num_operands(pass);
  const int64_t maps = data.maps, channels = data.channels;
  const cudaStream_t stream = current_stream();
  const size_t bytes = stack_bytes<acc_t>(1, capacity);
  const unsigned section_blocks = blocks_of(kOperands * maps * plan.sections.capacity * channels, kWalkThreads);
  if (plan.sections.several()) {
    launch(summarise_sections<pass, T, acc_t>, section_blocks, kWalkThreads, bytes, stream, data, plan, handed.runs,
           handed.sections, capacity);
    launch(join_sections<pass, T, acc_t>, blocks_of(kOperands * maps * channels, kWalkThreads), kWalkThreads, bytes,
           stream, data, plan, handed.sections, capacity);
  }
  launch(join_runs<pass, T, acc_t>, section_blocks, kWalkThreads, bytes, stream, data, plan, handed.runs,
         handed.sections, capacity);
}

// Scans short trees by one kernel (short_trees.cuh), unless they are so many that other kernels are faster.
template <bool kSelective, typename T, typename acc_t>
bool scan_if_short(const ScanData<T, acc_t>& data) {
  const int64_t blocks = int64_t{data.maps} * ((data.channels + kShortTreeChannels - 1) / kShortTreeChannels);
  if (data.num_vertices > kShortTreeRows || blocks > current_limits().multiprocessors) return false;
  const int64_t bytes = ShortTreeMemory<acc_t>(nullptr, data.num_vertices).bytes;
  if (bytes > current_limits().shared_of_block) return false;
  launch_with_much_shared(scan_short_trees<kSelective, T, acc_t>, static_cast<unsigned>(blocks), kShortTreeThreads,
                          bytes, current_stream(), data);
  return true;
}

template <Pass pass, bool kSelective, typename T, typename acc_t>
ParameterGradients scan(ScanData<T, acc_t> data, const Tensor& x, PlannedTrees& planned) {
  constexpr int kOperands = num_operands(pass);
  const int64_t maps = data.maps, length = data.num_vertices, channels = data.channels;
  const ScalarType accumulation = accumulation_type(x);
  constexpr bool kParameterGradients = has_parameter_gradients(pass, kSelective);
  constexpr int kChannelGradients = is_gradient(pass) ? 3 : 2;
  if (maps * length * channels == 0) {
    if (!kParameterGradients) return {};
    const Tensor of_weights = zeros(x, {maps, length}, x.scalar_type());
    return {of_weights, of_weights, zeros(x, {kChannelGradients, data.scans, channels}, accumulation)};
  }
  GROOTVL_CHECK(length <= kVertexMask, "a tree may have up to ", kVertexMask, " vertices on CUDA, got ", length);
  const cudaStream_t stream = current_stream();
  const int64_t groups = (channels + kWarpChannels - 1) / kWarpChannels;
  if constexpr (pass == Pass::kBoth) {
    if (scan_if_short<kSelective>(data)) return {};
  }
  const bool several_runs = !in_one_run(maps * groups, length);
  const Plan& plan = planned.make(data, several_runs, x);

  // Where u is between the sweeps: on chip, if a column is short enough (a longer one would leave room for too few
  // warps, of which a selective scan needs more); in the outputs, if these are as precise; or in memory of its own.
  const bool on_chip = pass == Pass::kBoth && !several_runs && length <= (kSelective ? 64 : 256);
  Tensor sums;
  if constexpr (std::is_same_v<T, acc_t>) {
    data.sums[0] = is_backward(pass) ? data.ddecay_or_raw_delta : data.out;
    data.sums[1] = data.out;
  } else if (num_between_sweeps(pass) > 0 && !on_chip) {
    sums = empty(x, {kOperands, maps, length, channels}, accumulation);
    for (int operand = 0; operand < kOperands; ++operand) {
      data.sums[operand] = sums.mutable_data_ptr<acc_t>() + operand * maps * length * channels;
    }
  }
  data.aligned = aligned(data);

  Tensor dinput_weight, doutput_weight, dparameters;
  if constexpr (kParameterGradients) {
    dinput_weight = empty(x, {groups, maps, length}, accumulation);
    data.dinput_weight = dinput_weight.mutable_data_ptr<acc_t>();
    if (is_gradient(pass)) {
      doutput_weight = empty_like(dinput_weight);
      data.doutput_weight = doutput_weight.mutable_data_ptr<acc_t>();
    }
    dparameters =
        empty_parts(x, {kChannelGradients, data.scans, data.batch * plan.runs.capacity, channels}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
  }

  const int capacity = walk_capacity(plan, length);
  const unsigned run_blocks = blocks_of(maps * plan.runs.capacity * groups * kWalkThreads, kWalkThreads);
  const size_t stacks_bytes = stack_bytes<acc_t>(kOperands, capacity);
  const size_t walk_bytes = stacks_bytes + ring_bytes_of<pass, kSelective, T, acc_t>();
  const HandedOver<acc_t> handed(plan, kOperands, maps, channels, x);
  if (several_runs) {
    // Up to 48 KiB, the most that a kernel may use without setting an attribute.
    const size_t up_bytes = stacks_bytes + ring_bytes_up<pass, kSelective, T, acc_t>();
    launch(summarise_runs<pass, kSelective, T, acc_t>, run_blocks, kWalkThreads, up_bytes, stream, data, plan,
           handed.runs, capacity);
    join_all_runs<pass>(data, plan, handed, capacity);
  }
  const auto finish = [&] {
    if constexpr (is_gradient(pass)) {
      return finish_gradients<pass, T, acc_t>;
    } else {
      if constexpr (pass == Pass::kBoth) {
        if (on_chip) return finish_runs<true, pass, kSelective, T, acc_t>;
      }
      return finish_runs<false, pass, kSelective, T, acc_t>;
    }
  }();
  // The scan of long trees in full precision is bound by memory: it finds more in the cache if fewer trees are walked
  // at a time.
  const bool memory_bound = !kSelective && std::is_same_v<T, acc_t> && length > 256;
  size_t finish_bytes = walk_bytes + (on_chip ? sizeof(acc_t) * kOperands * length * kWarpChannels : 0);
  if (!several_runs) finish_bytes = spread_evenly(run_blocks, memory_bound ? 7 : kMaxBlocks, finish_bytes);
  launch_with_much_shared(finish, run_blocks, kWalkThreads, finish_bytes, stream, data, plan, handed.runs, capacity);
  if (!kParameterGradients) return {};
  const auto sum_of_groups = [&](const Tensor& parts) { return sum_parts(parts, 1, {maps, length}, x.scalar_type()); };
  return {sum_of_groups(dinput_weight), is_gradient(pass) ? sum_of_groups(doutput_weight) : Tensor(),
          sum_parts_later(dparameters, kChannelGradients * data.scans, {kChannelGradients, data.scans, channels},
                          accumulation)};
}

// The fields of trees as the kernels read them, (trees, L) contiguous: of one tree that was expanded to a batch, the
// one.
struct TreeFields {
  Tensor parent, order, subtree_size;

  TreeFields(const Tensor& parent_, const Tensor& order_, const Tensor& subtree_size_) {
    const auto expanded = [](const Tensor& field) { return field.stride(0) == 0 && field.size(0) > 1; };
    const bool one = expanded(parent_) && expanded(order_) && expanded(subtree_size_);
    const auto field = [one](const Tensor& all) {
      return contiguous(one ? strided(all, {1, all.size(1)}, {all.size(1), all.stride(1)}) : all);
    };
    parent = field(parent_), order = field(order_), subtree_size = field(subtree_size_);
  }
};

template <typename T, typename acc_t>
ScanData<T, acc_t> scan_data(const Tensor& x, const Tensor& decay, const TreeFields& tree) {
  GROOTVL_CHECK(x.size(0) <= INT32_MAX && x.size(1) <= INT32_MAX && x.size(2) <= INT32_MAX,
                "x is too large: ", x.sizes());
  ScanData<T, acc_t> data{};
  data.x = x.const_data_ptr<T>();
  data.decay_or_raw_delta = decay.const_data_ptr<T>();
  data.parent = tree.parent.const_data_ptr<int32_t>();
  data.order = tree.order.const_data_ptr<int32_t>();
  data.subtree_size = tree.subtree_size.const_data_ptr<int32_t>();
  data.scans = 1;
  data.batch = data.maps = static_cast<int>(x.size(0));
  data.trees = static_cast<int>(tree.parent.size(0));
  data.maps_of_tree = 1;
  data.num_vertices = static_cast<int>(x.size(1));
  data.channels = static_cast<int>(x.size(2));
  return data;
}

}  // namespace grootvl
