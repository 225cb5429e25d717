// The walks along a run, and the kernels made of them; what they compute is explained in scan.cuh.
#pragma once

#include "discretise.cuh"
#include "feed.cuh"
#include "stack.cuh"
#include "scan.cuh"

namespace grootvl {

// Shared memory of a walk's ring: batches of rows of so many matrices, and nodes and input weights of rows.
template <typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes(int data, int sums, bool weights) {
  return kDepth * kBatch * 32 * (data * sizeof(T) + sums * sizeof(acc_t)) +
         kNodeSlots * 32 * (4 + weights * sizeof(acc_t));
}
// What the sweep up needs, and the larger of both sweeps.
template <Pass pass, bool kSelective, typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes_up() {
  return ring_bytes<T, acc_t>(1 + num_streams(pass), 0, kSelective);
}
template <Pass pass, bool kSelective, typename T, typename acc_t>
__host__ __device__ constexpr uint32_t ring_bytes_of() {
  constexpr bool kParameters = kSelective && is_backward(pass);
  const uint32_t up = ring_bytes_up<pass, kSelective, T, acc_t>();
  const uint32_t down = ring_bytes<T, acc_t>(1 + kParameters, num_streams(pass), kParameters);
  return up > down ? up : down;
}

// The run that a warp walks, and its lane's channel.
struct RunItem {
  int64_t rows;    // first row of the image in (B, L)
  int64_t column;  // the channel in that row of (B, L, D)
  int64_t at_run;  // of run and channel in (B, runs, D)
  int begin, end, channel;
  unsigned group;      // of 32 channels
  int group_channels;  // that there are in it
  bool valid;          // there is such a run
  bool active;         // and such a channel

  template <typename T, typename acc_t>
  __device__ RunItem(const ScanData<T, acc_t>& data, const Plan& plan) {
    const unsigned groups = (data.channels + 31) / 32;
    const unsigned image = blockIdx.x / groups / plan.runs.capacity, run = blockIdx.x / groups % plan.runs.capacity;
    group = blockIdx.x % groups;
    channel = group * 32 + threadIdx.x;
    group_channels = min(data.channels - int(group) * 32, 32);
    active = channel < data.channels;
    channel = min(channel, data.channels - 1);  // idle lanes read along, and write nothing
    rows = int64_t(image) * data.num_vertices;
    column = rows * data.channels + channel;
    at_run = (int64_t(image) * plan.runs.capacity + run) * data.channels + channel;
    valid = run < plan.runs.count(image);
    if (!valid) return;
    begin = 0, end = data.num_vertices;
    if (plan.runs.cuts == nullptr) return;
    begin = plan.runs.begin(image, run);
    end = plan.runs.end[int64_t(image) * plan.runs.capacity + run];
  }
};

// Sums of a batch of values, each over a warp: value i / (32 / kBatch) for lane i.
template <typename acc_t>
__device__ __forceinline__ acc_t warp_sums(acc_t (&values)[kBatch]) {
  int distance = 16;
#pragma unroll
  for (int rows = kBatch / 2; rows > 0; rows /= 2) {  // half of the lanes go on with the first half of the values
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const acc_t kept = upper ? values[i + rows] : values[i], given = upper ? values[i] : values[i + rows];
      values[i] = kept + __shfl_xor_sync(0xffffffff, given, distance);
    }
    distance /= 2;
  }
#pragma unroll
  for (; distance > 0; distance /= 2) values[0] += __shfl_xor_sync(0xffffffff, values[0], distance);
  return values[0];
}

// What a walk reads of a row.
template <typename T, typename acc_t>
struct Row {
  uint32_t node;
  T data[3];
  acc_t sums[2];
  acc_t input_weight;
};

// Goes over the rows of a run, forwards or backwards in the postorder. `visit(row, j, i, plain)` is called for each row
// in turn, j its place in a batch and i its place in the run, after `read(row, i)` for the rows of a batch, which may
// add what does not pass through the ring; `finish(rows)` after each batch. The last batch is filled up with the last
// row, marked kPast, with places outside of the run: a walk without branches is faster than one that stops on the row.
// All lanes of a warp take the same way. If `long_run`, batches with neither root nor end, most of them then, have code
// of their own, for which `plain` is true_type; in short runs the two would only contend for the instruction cache.
// `input_weights` is null where they are not wanted. The rows pass through `ring` in shared memory.
template <bool kForwards, bool kWeights, typename T, int kData, typename acc_t, int kSums, typename Read,
          typename Visit, typename Finish>
__device__ __forceinline__ void walk(const Plan& plan, const RunItem& item, const RowFeed<T, kData>& data,
                                     const RowFeed<acc_t, kSums>& sums, const T* input_weights,
                                     uint32_t input_weight_bytes, uint32_t ring, bool long_run, Read read, Visit visit,
                                     Finish finish) {
  constexpr uint32_t kSumsAt = RowFeed<T, kData>::kBatchBytes,
                     kSlotBytes = kSumsAt + RowFeed<acc_t, kSums>::kBatchBytes;
  static_assert(kDepth * kSlotBytes + kNodeSlots * 32 * (4 + kWeights * sizeof(acc_t)) ==
                ring_bytes<T, acc_t>(kData, kSums, kWeights));
  const int count = item.end - item.begin, last = count - 1;
  const auto place = [&](int i) { return kForwards ? i : last - i; };
  const uint32_t* run_nodes = plan.nodes + item.rows + item.begin;
  // The nodes of 32 rows, a lane each, come to shared memory, too, in good time, and are marked there if need be.
  const uint32_t nodes_at = ring + kDepth * kSlotBytes, lane_at = threadIdx.x * 4;
  const auto node_slot = [&](int first) { return nodes_at + first / 32 % kNodeSlots * 128; };
  const auto fetch_nodes = [&](int first) {
    copy_async_4_bytes(node_slot(first) + lane_at, &run_nodes[place(min(first + int(threadIdx.x), last))]);
  };
  const auto nodes_of = [&](int first) {
    uint32_t node;
    load_shared(node_slot(first) + lane_at, node);
    return node;
  };
  const auto mark_past = [&](uint32_t node, int first) {
    if (first + int(threadIdx.x) >= count) store_shared(node_slot(first) + lane_at, (node & kVertexMask) | kPast);
  };
  // Their input weights, too, but through a register, since they may be too small for an asynchronous copy.
  const uint32_t weights_at = ring + kDepth * kSlotBytes + kNodeSlots * 128;
  const auto weight_slot = [&](int first) {
    return weights_at + first / 32 % kNodeSlots * uint32_t(32 * sizeof(acc_t));
  };
  T weight{};
  const auto load_weights = [&](int first) {
    if constexpr (kWeights) weight = at_vertex(input_weights, nodes_of(first) & kVertexMask, input_weight_bytes);
  };
  const auto store_weights = [&](int first) {
    if constexpr (kWeights) {
      store_shared(weight_slot(first) + threadIdx.x * uint32_t(sizeof(acc_t)), static_cast<acc_t>(weight));
    }
  };
  uint32_t slot = ring;
  // Sends for the batch at `first` of the run, whose nodes are in the lanes from `lane` on.
  const auto fetch = [&](uint32_t nodes, int first, int lane) {
    if (first < count) {
      const auto vertex_of = [&](int j) { return __shfl_sync(0xffffffff, nodes, lane + j) & kVertexMask; };
      data.fetch(slot, vertex_of);
      sums.fetch(slot + kSumsAt, vertex_of);
    }
    commit_async_copies();
    slot = slot == ring + (kDepth - 1) * kSlotBytes ? ring : slot + kSlotBytes;
  };

  if constexpr (kSums > 0) __threadfence();  // asynchronous copies know no order with the stores of the sums
  __syncwarp();
  for (int first = 0; first < 32 * (kNodeSlots - 1); first += 32) fetch_nodes(first);
  commit_async_copies();
  await_async_copies<0>();
  const uint32_t first_nodes = nodes_of(0);
  mark_past(first_nodes, 0);
  for (int first = 0; first < 32; first += kBatch) fetch(first_nodes, first, first);
  load_weights(0);
  store_weights(0);
  load_weights(32);
  for (int first_of_32 = 0; first_of_32 < count; first_of_32 += 32) {
    await_async_copies<kDepth - 1>();
    fetch_nodes(first_of_32 + 32 * (kNodeSlots - 1));
    const uint32_t nodes = nodes_of(first_of_32 + 32);
    mark_past(nodes, first_of_32 + 32);
    store_weights(first_of_32 + 32);
    load_weights(first_of_32 + 64);
#pragma unroll 1
    for (int lane = 0; lane < 32; lane += kBatch) {
      const int first = first_of_32 + lane;
      if (first >= count) break;
      await_async_copies<kDepth - 1>();
      __syncwarp();
      Row<T, acc_t> rows[kBatch];
      uint32_t flags = 0;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        load_shared(node_slot(first_of_32) + (lane + j) * 4, rows[j].node);
        flags |= rows[j].node;
        for (int m = 0; m < kData; ++m) data.read(slot, m, j, rows[j].data[m]);
        for (int m = 0; m < kSums; ++m) sums.read(slot + kSumsAt, m, j, rows[j].sums[m]);
        if constexpr (kWeights) {
          load_shared(weight_slot(first_of_32) + (lane + j) * uint32_t(sizeof(acc_t)), rows[j].input_weight);
        }
        read(rows[j], place(first + j));
      }
      __syncwarp();
      fetch(nodes, first + 32, lane);
      if (!long_run || flags & (kRoot | kPast)) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) visit(rows[j], j, place(first + j), std::false_type());
      } else {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) visit(rows[j], j, place(first + j), std::true_type());
      }
      finish(rows);
    }
  }
  await_async_copies<0>();  // nodes that were not needed may be on their way to what will be used for something else
}

// The discretisation for a lane's channel; none if x and decay are given.
template <bool kSelective, typename T, typename acc_t>
__device__ __forceinline__ Discretisation<acc_t> discretisation(const ScanData<T, acc_t>& data, const RunItem& item) {
  if constexpr (kSelective) return {data.delta_bias[item.channel], data.A_log[item.channel]};
  return {0, 0};
}

// The sweep up a run. `entering` is what the runs below bring; `visit(stream, node, i, decay, u, contribution,
// plain)`.
template <Pass pass, bool kSelective, typename T, typename acc_t, typename Visit>
__device__ __forceinline__ void walk_up(const ScanData<T, acc_t>& data, const Plan& plan, const RunItem& item,
                                        uint32_t ring, bool long_run, Stack<acc_t> (&stacks)[2],
                                        const acc_t (&entering)[num_streams(pass)], Visit visit) {
  constexpr int kStreams = num_streams(pass);
  const T* columns[] = {data.decay + item.column, data.x + item.column, data.grad + item.column};
  const RowFeed<T, 1 + kStreams> feed(columns, item.channel % 32, item.group_channels, data.channels, data.aligned);
  const RowFeed<acc_t, 0> no_sums(nullptr, 0, 0, 0, true);
  const T* input_weights = data.input_weight + item.rows * data.input_weight_stride;
  const auto discretise = discretisation<kSelective>(data, item);
  acc_t sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = entering[s];
  const auto visit_row = [&](const Row<T, acc_t>& row, int, int i, auto plain) {
    const uint32_t node = row.node;
    acc_t decay = static_cast<acc_t>(row.data[0]), own[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) own[s] = static_cast<acc_t>(row.data[1 + s]);
    if constexpr (kSelective) {
      const auto step = discretise(decay);
      own[0] *= step.delta * row.input_weight;
      decay = step.decay;
    }
    if (!plain && node & kRoot) decay = 0;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      acc_t u = own[s];
      if (!sweeps_up(pass, s)) {  // a vertex's own value is all there is
        visit(s, node, i, decay, u, acc_t(0), plain);
        continue;
      }
      stacks[s].template push_or_add<kPush>(node, sum[s], u);
      sum[s] = decay * u;
      visit(s, node, i, decay, u, sum[s], plain);
      stacks[s].template pop_and_add<kLight>(node, sum[s]);
    }
  };
  walk<true, kSelective>(
      plan, item, feed, no_sums, input_weights, data.input_weight_stride * sizeof(T), ring, long_run, [](auto&, int) {},
      visit_row,
      [&](const auto&) {
        for (int s = 0; s < kStreams; ++s) stacks[s].stay_inside();
      });
}

// (1) Each run by itself.
template <Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    summarise_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  await_kernels_before();
  constexpr int kStreams = num_streams(pass);
  const RunItem item(data, plan);
  if (!item.valid) return;
  Stack<acc_t> stacks[2] = {{0, capacity}, {1, capacity}};
  // The product of the decays along the chain, and the last one, which is not in it yet. Kept with and without the last
  // one instead, ptxas 13.0 takes the wrong one in float64 (docs/kernels.md).
  acc_t product = 1, factor = 1;
  acc_t last_decay = 0, end[kStreams] = {}, chain[kStreams] = {}, bottom[kStreams] = {};
  const acc_t nothing[kStreams] = {};
  const uint32_t ring = shared_address() + stack_bytes<acc_t>(kStreams, capacity);
  walk_up<pass, kSelective>(data, plan, item, ring, false, stacks, nothing,
                            [&](int s, uint32_t node, int, acc_t decay, acc_t u, acc_t contribution, auto plain) {
                              const bool past = !plain && node & kPast;
                              if (!past) end[s] = u;
                              if (node & kChain) {
                                if (s == 0) product *= factor, factor = decay;
                                bottom[s] += product * (u - chain[s]);
                                chain[s] = contribution;
                              }
                              if (s == 0 && !past) last_decay = decay;
                            });
  if (!item.active) return;
  runs.beta[item.at_run] = product;  // without the decay of the last vertex, which is on the chain
  runs.decay[item.at_run] = last_decay;
  for (int s = 0; s < kStreams; ++s) {
    runs.end[s * runs.stride + item.at_run] = end[s];
    runs.bottom[s * runs.stride + item.at_run] = bottom[s];
  }
}

// The pieces, or some of them, that a thread joins for a stream and a channel.
template <typename acc_t>
struct Column {
  const uint32_t* nodes;
  int64_t channels;
  const acc_t *beta, *decay, *end;
  acc_t *bottom, *below;

  struct Piece {
    uint32_t node;
    acc_t beta, decay, end, bottom, below;
  };

  __device__ Column(const Pieces& pieces, const RunData<acc_t>& data, int64_t image, int stream, int channel,
                    int channels)
      : nodes(pieces.nodes + image * pieces.capacity), channels(channels) {
    const int64_t offset = image * pieces.capacity * channels + channel;
    beta = data.beta + offset;
    decay = data.decay + offset;
    end = data.end + stream * data.stride + offset;
    bottom = data.bottom + stream * data.stride + offset;
    below = data.below + stream * data.stride + offset;
  }

  __device__ __forceinline__ Piece read(int piece) const {
    const int64_t i = piece * channels;
    return {nodes[piece], beta[i], decay[i], end[i], bottom[i], below[i]};
  }

  // Calls `visit(piece, values)` for each piece from `first` to `last`, or backwards, with its values, of which only
  // those that it uses are read, a batch ahead. The stack stays inside.
  template <bool kForwards, typename Visit>
  __device__ __forceinline__ void walk(int first, int last, Stack<acc_t>& stack, Visit visit) const {
    const int count = last - first;
    if (count <= 0) return;
    const auto place = [&](int i) { return kForwards ? first + i : last - 1 - i; };
    Piece ahead[kBatch];
    const auto read_ahead = [&](int i) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) ahead[j] = read(place(min(i + j, count - 1)));
    };
    read_ahead(0);
    for (int i = 0; i < count; i += kBatch) {
      Piece values[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) values[j] = ahead[j];
      read_ahead(i + kBatch);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (i + j < count) visit(place(i + j), values[j]);
      }
      stack.stay_inside();
    }
  }
};

// (2) Pieces among themselves, from `first` to `last`, with what enters from below and from above.
template <Pass pass, typename acc_t>
__device__ __forceinline__ void join(const Column<acc_t>& at, int first, int last, bool up, acc_t entering, acc_t above,
                                     Stack<acc_t> stack) {
  using Piece = typename Column<acc_t>::Piece;
  acc_t sum = entering;
  at.template walk<true>(first, last, stack, [&](int piece, const Piece& values) {
    acc_t below = 0;
    stack.template push_or_add<kPush>(values.node, sum, below);
    at.below[piece * at.channels] = up ? below : acc_t(0);
    sum = values.decay * (values.end + values.beta * below);
    stack.template pop_and_add<kLight>(values.node, sum);
    if (values.node & kRoot) stack.clear();
  });
  if (pass == Pass::kUp) return;

  stack.clear();
  acc_t h = above;  // at the bottom of the piece above
  at.template walk<false>(first, last, stack, [&](int piece, const Piece& values) {
    if (values.node & kRoot) h = 0;
    stack.template push_if<kLight>(values.node, h);
    at.bottom[piece * at.channels] = h;
    const acc_t from_above = up ? h - values.decay * (values.end + values.beta * values.below) : h;
    h = values.below + values.bottom + values.beta * values.decay * from_above;
    stack.template pop_if<kPush>(values.node, h);
  });
}

// Which stream, image, section and channel a thread of a grid works on.
struct SectionItem {
  int stream, section, channel;
  int64_t image;
  bool valid;
  int begin, end;  // the section's runs

  template <typename T, typename acc_t>
  __device__ SectionItem(const ScanData<T, acc_t>& data, const Plan& plan, int streams) {
    int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    channel = thread % data.channels, thread /= data.channels;
    section = thread % plan.sections.capacity, thread /= plan.sections.capacity;
    image = thread % data.batch, stream = thread / data.batch;
    valid = stream < streams && section < plan.sections.count(image);
    if (!valid) return;
    begin = 0, end = plan.runs.count(image);
    if (plan.sections.cuts == nullptr) return;
    begin = plan.sections.begin(image, section);
    end = plan.sections.end[image * plan.sections.capacity + section];
  }
};

// Each section by itself, as summarise_runs does it for each run.
template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    summarise_sections(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  const SectionItem item(data, plan, num_streams(pass));
  if (!item.valid) return;
  const bool up = sweeps_up(pass, item.stream);
  const Column<acc_t> at(plan.runs, runs, item.image, item.stream, item.channel, data.channels);
  Stack<acc_t> stack(0, capacity);
  acc_t sum = 0, product = 1, factor = 1, last_decay = 0, end = 0, chain = 0, bottom = 0;
  at.template walk<true>(item.begin, item.end, stack, [&](int, const typename Column<acc_t>::Piece& run) {
    acc_t below = 0;
    stack.template push_or_add<kPush>(run.node, sum, below);
    end = run.end + run.beta * below;
    last_decay = run.decay;
    sum = up ? last_decay * end : acc_t(0);
    if (run.node & kChain) {
      product *= factor;
      bottom += product * (run.bottom + below - chain);
      chain = sum;
      product *= run.beta, factor = last_decay;
    }
    stack.template pop_and_add<kLight>(run.node, sum);
    if (run.node & kRoot) stack.clear();
  });
  const int64_t i = (item.image * plan.sections.capacity + item.section) * data.channels + item.channel;
  if (item.stream == 0) sections.beta[i] = product, sections.decay[i] = last_decay;
  sections.end[item.stream * sections.stride + i] = end;
  sections.bottom[item.stream * sections.stride + i] = bottom;
}

template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    join_sections(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int channel = thread % data.channels;
  const int64_t image = thread / data.channels % data.batch;
  const int stream = thread / data.channels / data.batch;
  if (stream >= num_streams(pass)) return;
  const Column<acc_t> at(plan.sections, sections, image, stream, channel, data.channels);
  join<pass>(at, 0, plan.sections.count(image), sweeps_up(pass, stream), acc_t(0), acc_t(0), Stack<acc_t>(0, capacity));
}

// The runs of each section, with what enters it.
template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    join_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  const SectionItem item(data, plan, num_streams(pass));
  if (!item.valid) return;
  acc_t entering = 0, above = 0;
  if (plan.sections.cuts != nullptr) {
    const int64_t i = item.stream * sections.stride +
                      (item.image * plan.sections.capacity + item.section) * data.channels + item.channel;
    entering = sections.below[i], above = sections.bottom[i];
  }
  const Column<acc_t> at(plan.runs, runs, item.image, item.stream, item.channel, data.channels);
  join<pass>(at, item.begin, item.end, sweeps_up(pass, item.stream), entering, above, Stack<acc_t>(0, capacity));
}

// (3) Each run, with what enters it: nothing, if it is the whole tree. Of small trees (kOnChip) the sums wait in shared
// memory between the sweeps.
template <bool kOnChip, Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    finish_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  await_kernels_before();
  constexpr int kStreams = num_streams(pass);
  const RunItem item(data, plan);
  if (!item.valid) return;
  const uint32_t row_bytes = data.channels * sizeof(T), sum_row_bytes = data.channels * sizeof(acc_t);
  const uint32_t ring = shared_address() + stack_bytes<acc_t>(kStreams, capacity);
  const uint32_t kept = ring + ring_bytes_of<pass, kSelective, T, acc_t>() + threadIdx.x * uint32_t(sizeof(acc_t));
  const auto kept_at = [&](int s, int i) { return kept + (s * data.num_vertices + i) * uint32_t(32 * sizeof(acc_t)); };
  Stack<acc_t> stacks[2] = {{0, capacity}, {1, capacity}};
  const bool whole_tree = plan.runs.cuts == nullptr;
  acc_t entering[kStreams] = {};
  if (!whole_tree) {
    for (int s = 0; s < kStreams; ++s) entering[s] = runs.below[s * runs.stride + item.at_run];
  }
  constexpr bool kParameters = kSelective && is_backward(pass);
  T* out = data.out + item.column;
  acc_t* sums[2] = {data.sums[0] + item.column, data.sums[1] + item.column};
  walk_up<pass, kSelective>(data, plan, item, ring, whole_tree, stacks, entering,
                            [&](int s, uint32_t node, int i, acc_t, acc_t u, acc_t, auto plain) {
                              if (!plain && node & kPast) return;
                              if constexpr (kOnChip) {
                                store_shared(kept_at(s, i), u);
                                return;
                              }
                              if (!item.active) return;
                              const uint32_t vertex = node & kVertexMask;
                              if constexpr (pass == Pass::kUp) {
                                at_vertex(out, vertex, row_bytes) = static_cast<T>(u);
                              } else {
                                at_vertex(sums[s], vertex, sum_row_bytes) = u;
                              }
                            });
  if constexpr (pass == Pass::kUp) return;

  constexpr int kSumsRead = kOnChip ? 0 : kStreams;
  const T* columns[] = {data.decay + item.column, data.x + item.column};
  const acc_t* sum_columns[] = {sums[0], sums[1]};
  const RowFeed<T, 1 + kParameters> feed(columns, item.channel % 32, item.group_channels, data.channels, data.aligned);
  const RowFeed<acc_t, kSumsRead> sum_feed(sum_columns, item.channel % 32, item.group_channels, data.channels,
                                           data.aligned);
  const T* input_weights = data.input_weight + item.rows * data.input_weight_stride;
  T* ddecay = data.ddecay + item.column;
  acc_t* dinput_weights = data.dinput_weight + (item.group * data.batch * data.num_vertices + item.rows);
  const auto discretise = discretisation<kSelective>(data, item);
  acc_t dbias = 0, dA_log = 0, dinput_weight[kBatch];
  acc_t h[kStreams] = {};
  for (int s = 0; s < kStreams; ++s) {
    if (!whole_tree) h[s] = runs.bottom[s * runs.stride + item.at_run];
    stacks[s].clear();
  }
  const auto read_kept = [&](Row<T, acc_t>& row, int i) {
    if constexpr (kOnChip) {
      for (int s = 0; s < kStreams; ++s) load_shared(kept_at(s, i), row.sums[s]);
    }
  };
  const auto visit_row = [&](const Row<T, acc_t>& row, int j, int, auto plain) {
    const uint32_t node = row.node, vertex = node & kVertexMask;
    const bool root = !plain && node & kRoot, write = item.active && (plain || !(node & kPast));
    acc_t decay = static_cast<acc_t>(row.data[0]);
    [[maybe_unused]] typename Discretisation<acc_t>::Step step{};
    if constexpr (kSelective) {
      step = discretise(decay);
      decay = step.decay;
    }
    acc_t from_above[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      const acc_t u = row.sums[s];
      stacks[s].template push_if<kLight>(node, h[s]);
      from_above[s] = sweeps_up(pass, s) ? h[s] - decay * u : h[s];
      h[s] = root ? u : u + decay * from_above[s];
    }
    [[maybe_unused]] acc_t gradient = 0;  // of the decay
    if constexpr (kStreams == 2) {
      gradient = row.sums[0] * from_above[1];
      if constexpr (sweeps_up(pass, 1)) gradient += row.sums[1] * from_above[0];
      if (root) gradient = 0;
    }
    if constexpr (!kParameters) {
      if (write) {
        store_streaming(at_vertex(out, vertex, row_bytes), static_cast<T>(h[kStreams - 1]));
        if constexpr (kStreams == 2) {
          store_streaming(at_vertex(ddecay, vertex, row_bytes), static_cast<T>(gradient));
        }
      }
    } else {
      const acc_t x = static_cast<acc_t>(row.data[1]);
      const acc_t dinput = h[1], by_rate = gradient * decay * discretise.rate;
      const acc_t ddelta = (dinput * x * row.input_weight + by_rate) * step.slope;
      dinput_weight[j] = write ? dinput * x * step.delta : 0;
      if (write) {
        store_streaming(at_vertex(out, vertex, row_bytes), static_cast<T>(dinput * step.delta * row.input_weight));
        store_streaming(at_vertex(ddecay, vertex, row_bytes), static_cast<T>(ddelta));
        dbias += ddelta;
        dA_log += by_rate * step.delta;
      }
    }
#pragma unroll
    for (int s = 0; s < kStreams; ++s) stacks[s].template pop_if<kPush>(node, h[s]);
  };
  walk<false, kParameters>(plan, item, feed, sum_feed, input_weights, data.input_weight_stride * sizeof(T), ring,
                           whole_tree, read_kept, visit_row, [&](const Row<T, acc_t>(&rows)[kBatch]) {
                             for (int s = 0; s < kStreams; ++s) stacks[s].stay_inside();
                             if constexpr (kParameters) {
                               const acc_t sum = warp_sums(dinput_weight);
                               constexpr int kLanesOfRow = 32 / kBatch;
                               uint32_t node = rows[0].node;
#pragma unroll
                               for (int j = 1; j < kBatch; ++j) {
                                 if (threadIdx.x / kLanesOfRow == j) node = rows[j].node;
                               }
                               if (threadIdx.x % kLanesOfRow == 0 && !(node & kPast))
                                 dinput_weights[node & kVertexMask] = sum;
                             }
                           });
  if constexpr (kParameters) {
    if (!item.active) return;
    data.dparameters[item.at_run] = dbias;
    data.dparameters[data.batch * plan.runs.capacity * data.channels + item.at_run] = dA_log;
  }
}

}  // namespace grootvl
