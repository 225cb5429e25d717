// The walks along a run, and the kernels made of them; what they compute is explained in tree_scan.cuh.
#pragma once

#include "discretise.cuh"
#include "tree_scan.cuh"

namespace grootvl {

constexpr int kWalkThreads = 128;
// Rows whose loads are in flight together, while as many are worked on.
constexpr int kBatch = 8, kLongBatch = 16;

// Sums that wait, one for each lane: the top in a register, the others in shared memory. Without branches, since a walk
// decides at every row whether to push or to pop.
template <typename acc_t>
class Stack {
 public:
  Stack() = default;
  // `column` is this lane's first entry, `stride` the distance to the next.
  __device__ Stack(acc_t* column, int stride, int capacity) : column_(column), stride_(stride), capacity_(capacity) {}

  __device__ __forceinline__ void push_if(bool condition, acc_t value) {
    if (condition) column_[size_ * stride_] = top_;
    size_ = min(size_ + condition, capacity_ - 1);  // a valid tree does not fill it
    top_ = condition ? value : top_;
  }
  // The top, which is taken off if the condition holds.
  __device__ __forceinline__ acc_t pop_if(bool condition) {
    const acc_t value = top_;
    size_ = max(size_ - condition, 0);  // the last vertex of a run may find nothing waiting
    if (condition) top_ = column_[size_ * stride_];
    return value;
  }
  __device__ void clear() { size_ = 0; }

 private:
  acc_t* column_;
  int stride_;
  int capacity_;
  int size_ = 0;
  acc_t top_ = 0;
};

// Entries of a stack for trees of a size: the sums that wait, the one that an empty stack holds, and one to spare.
inline int stack_capacity(int64_t num_vertices) {
  int capacity = 3;
  while ((int64_t{1} << (capacity - 3)) < num_vertices) ++capacity;
  return capacity;
}

// The stacks of a block's threads in dynamic shared memory.
template <typename acc_t>
__device__ Stack<acc_t> thread_stack(int stream, int capacity) {
  extern __shared__ __align__(16) unsigned char memory[];
  acc_t* column = reinterpret_cast<acc_t*>(memory) + stream * capacity * blockDim.x + threadIdx.x;
  return Stack<acc_t>(column, blockDim.x, capacity);
}

// The run that a warp walks, and its lane's channel.
struct RunItem {
  int64_t rows;    // first row of the image in (B, L)
  int64_t column;  // the channel in that row of (B, L, D)
  int64_t at_run;  // of run and channel in (B, runs, D)
  int begin, end, channel;
  unsigned group;  // of 32 channels
  bool valid;      // there is such a run
  bool active;     // and such a channel

  template <typename T, typename acc_t>
  __device__ RunItem(const ScanData<T, acc_t>& data, const Plan& plan) {
    const unsigned groups = (data.channels + 31) / 32;
    const unsigned warp = blockIdx.x * (kWalkThreads / 32) + threadIdx.x / 32;
    const unsigned image = warp / groups / plan.runs, run = warp / groups % plan.runs;
    group = warp % groups;
    channel = group * 32 + threadIdx.x % 32;
    active = channel < data.channels;
    channel = min(channel, data.channels - 1);  // idle lanes read along, and write nothing
    rows = int64_t(image) * data.num_vertices;
    const int64_t run_rows = int64_t(image) * plan.runs;
    column = rows * data.channels + channel;
    at_run = (run_rows + run) * data.channels + channel;
    valid = image < data.batch;
    if (!valid) return;
    begin = 0, end = data.num_vertices;
    if (plan.cuts == nullptr) return;
    valid = run < plan.run_id[rows + data.num_vertices - 1];
    if (!valid) return;
    if (run > 0) begin = plan.run_end[run_rows + run - 1];
    end = plan.run_end[run_rows + run];
  }
};

// A batch of rows on its way from memory.
template <int kRows, typename T, typename V, int kStreams>
struct Rows {
  uint32_t node[kRows];
  T decay[kRows];
  V value[kStreams][kRows];
  T x[kRows], input_weight[kRows];
};

// Sums of eight values, each over a warp: value i / 4 for lane i.
template <typename acc_t>
__device__ __forceinline__ acc_t warp_sums(const acc_t (&values)[8]) {
  acc_t four[4], two[2];
  const auto halve = [](acc_t first, acc_t second, int distance) {  // half of the lanes go on with the first value
    const bool upper = threadIdx.x & distance;
    return (upper ? second : first) + __shfl_xor_sync(0xffffffff, upper ? first : second, distance);
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = halve(values[i], values[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) two[i] = halve(four[i], four[i + 2], 8);
  acc_t sum = halve(two[0], two[1], 4);
  sum += __shfl_xor_sync(0xffffffff, sum, 2);
  return sum + __shfl_xor_sync(0xffffffff, sum, 1);
}

// Goes over the rows of a run, forwards or backwards in the postorder. `load(batch, j, vertex)` fills row j of a batch,
// `visit(batch, j)` is called for each row in turn, `finish(batch)` after each batch. The last batch is filled up with
// the last row, marked kPast: a walk without branches is faster than one that stops on the row. All lanes of a warp
// take the same way.
template <bool kForwards, int kRows, typename Batch, typename Load, typename Visit, typename Finish>
__device__ __forceinline__ void walk(const Plan& plan, const RunItem& item, Load load, Visit visit, Finish finish) {
  const int count = item.end - item.begin;
  const uint32_t* nodes = plan.nodes + item.rows + (kForwards ? item.begin : item.end - 1);
  const int lane = threadIdx.x % kRows;
  // The nodes of a batch, one in each of the first lanes.
  const auto nodes_from = [&](int first) {
    const int i = min(first + lane, count - 1);
    const uint32_t node = nodes[kForwards ? i : -i];
    return first + lane < count ? node : (node & kVertexMask) | kPast;
  };
  const auto load_batch = [&](Batch& batch, uint32_t batch_nodes) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      batch.node[j] = __shfl_sync(0xffffffff, batch_nodes, j);
      load(batch, j, batch.node[j] & kVertexMask);
    }
  };
  const auto visit_batch = [&](const Batch& batch) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) visit(batch, j);
    finish(batch);
  };
  // One batch is on its way while the other is worked on.
  Batch even, odd;
  load_batch(even, nodes_from(0));
  uint32_t nodes_ahead = nodes_from(kRows);
  for (int first = 0; first < count; first += 2 * kRows) {
    load_batch(odd, nodes_ahead);
    nodes_ahead = nodes_from(first + 2 * kRows);
    visit_batch(even);
    if (first + kRows >= count) return;
    load_batch(even, nodes_ahead);
    nodes_ahead = nodes_from(first + 3 * kRows);
    visit_batch(odd);
  }
}

// The discretisation for a lane's channel; none if x and decay are given.
template <bool kSelective, typename T, typename acc_t>
__device__ __forceinline__ Discretisation<acc_t> discretisation(const ScanData<T, acc_t>& data, const RunItem& item) {
  if constexpr (kSelective) return {data.delta_bias[item.channel], data.A_log[item.channel]};
  return {0, 0};
}

// The sweep up a run. `entering` is what the runs below bring; `visit(stream, node, decay, u, contribution)`.
template <int kRows, Pass pass, bool kSelective, typename T, typename acc_t, typename Visit>
__device__ __forceinline__ void walk_up(const ScanData<T, acc_t>& data, const Plan& plan, const RunItem& item,
                                        Stack<acc_t> (&stacks)[num_streams(pass)],
                                        const acc_t (&entering)[num_streams(pass)], Visit visit) {
  constexpr int kStreams = num_streams(pass);
  using Batch = Rows<kRows, T, T, kStreams>;
  const uint32_t channels = data.channels;
  const T* decays = data.decay + item.column;
  const T* values[2] = {data.x + item.column, is_backward(pass) ? data.grad + item.column : nullptr};
  const T* input_weights = data.input_weight + item.rows * data.input_weight_stride;
  const auto discretise = discretisation<kSelective>(data, item);
  acc_t sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = entering[s];
  const auto load = [&](Batch& batch, int j, uint32_t vertex) {
    const uint32_t at = vertex * channels;
    batch.decay[j] = decays[at];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) batch.value[s][j] = values[s][at];
    if constexpr (kSelective) batch.input_weight[j] = input_weights[vertex * data.input_weight_stride];
  };
  const auto visit_row = [&](const Batch& batch, int j) {
    const uint32_t node = batch.node[j];
    const bool push = node & kPush, light = node & kLight;
    acc_t decay = static_cast<acc_t>(batch.decay[j]), own[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) own[s] = static_cast<acc_t>(batch.value[s][j]);
    if constexpr (kSelective) {
      const auto step = discretise(decay);
      own[0] *= step.delta * static_cast<acc_t>(batch.input_weight[j]);
      decay = step.decay;
    }
    if (node & kRoot) decay = 0;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (!sweeps_up(pass, s)) {  // a vertex's own value is all there is
        visit(s, node, decay, own[s], acc_t(0));
        continue;
      }
      stacks[s].push_if(push, sum[s]);
      const acc_t u = push ? own[s] : own[s] + sum[s];
      const acc_t contribution = decay * u;
      visit(s, node, decay, u, contribution);
      const acc_t waiting = stacks[s].pop_if(light);
      sum[s] = light ? contribution + waiting : contribution;
    }
  };
  walk<true, kRows, Batch>(plan, item, load, visit_row, [](const Batch&) {});
}

// (1) Each run by itself.
template <Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    summarise_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  constexpr int kStreams = num_streams(pass);
  const RunItem item(data, plan);
  if (!item.valid) return;
  Stack<acc_t> stacks[kStreams];
  for (int s = 0; s < kStreams; ++s) stacks[s] = thread_stack<acc_t>(s, capacity);
  acc_t product = 1, before = 1, last_decay = 0, end[kStreams] = {}, chain[kStreams] = {}, bottom[kStreams] = {};
  const acc_t nothing[kStreams] = {};
  walk_up<kBatch, pass, kSelective>(data, plan, item, stacks, nothing,
                                    [&](int s, uint32_t node, acc_t decay, acc_t u, acc_t contribution) {
                                      if (!(node & kPast)) end[s] = u;
                                      if (node & kChain) {
                                        bottom[s] += product * (u - chain[s]);
                                        chain[s] = contribution;
                                        if (s == kStreams - 1) {
                                          before = product;
                                          product *= decay;
                                        }
                                      }
                                      if (s == 0 && !(node & kPast)) last_decay = decay;
                                    });
  if (!item.active) return;
  runs.beta[item.at_run] = before;  // without the decay of the last vertex, which is on the chain
  runs.decay[item.at_run] = last_decay;
  for (int s = 0; s < kStreams; ++s) {
    runs.end[s * runs.stride + item.at_run] = end[s];
    runs.bottom[s * runs.stride + item.at_run] = bottom[s];
  }
}

// (2) The runs among themselves: a thread for each stream, image and channel.
template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    join_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int channel = thread % data.channels;
  const int64_t image = thread / data.channels % data.batch;
  const int stream = thread / data.channels / data.batch;
  if (stream >= num_streams(pass)) return;
  const bool up = sweeps_up(pass, stream);
  const int count = plan.run_id[(image + 1) * data.num_vertices - 1];
  const uint32_t* nodes = plan.run_nodes + image * plan.runs;
  const int64_t offset = image * plan.runs * data.channels + channel;
  const acc_t* beta = runs.beta + offset;
  const acc_t* decay = runs.decay + offset;
  const acc_t* end = runs.end + stream * runs.stride + offset;
  acc_t* bottom = runs.bottom + stream * runs.stride + offset;
  acc_t* below = runs.below + stream * runs.stride + offset;
  Stack<acc_t> stack = thread_stack<acc_t>(0, capacity);

  acc_t sum = 0;
  for (int first = 0; first < count; first += kBatch) {
    uint32_t node[kBatch];
    acc_t u[kBatch], b[kBatch], a[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int run = min(first + j, count - 1);
      const int64_t at = int64_t(run) * data.channels;
      node[j] = nodes[run], u[j] = end[at], b[j] = beta[at], a[j] = decay[at];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j >= count) break;
      stack.push_if(node[j] & kPush, sum);
      if (node[j] & kPush) sum = 0;
      below[int64_t(first + j) * data.channels] = up ? sum : acc_t(0);
      const acc_t contribution = a[j] * (u[j] + b[j] * sum), waiting = stack.pop_if(node[j] & kLight);
      sum = node[j] & kLight ? contribution + waiting : contribution;
      if (node[j] & kRoot) stack.clear();
    }
  }
  if (pass == Pass::kUp) return;

  stack.clear();
  acc_t h = 0;  // at the bottom of the run above
  for (int first = count - 1; first >= 0; first -= kBatch) {
    uint32_t node[kBatch];
    acc_t u[kBatch], b[kBatch], a[kBatch], e[kBatch], p[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int run = max(first - j, 0);
      const int64_t at = int64_t(run) * data.channels;
      node[j] = nodes[run], u[j] = end[at], b[j] = beta[at], a[j] = decay[at], e[j] = below[at], p[j] = bottom[at];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first - j < 0) break;
      if (node[j] & kRoot) h = 0;
      stack.push_if(node[j] & kLight, h);
      bottom[int64_t(first - j) * data.channels] = h;
      const acc_t from_above = up ? h - a[j] * (u[j] + b[j] * e[j]) : h;
      h = e[j] + p[j] + b[j] * a[j] * from_above;
      const acc_t waiting = stack.pop_if(node[j] & kPush);
      if (node[j] & kPush) h = waiting;
    }
  }
}

// (3) Each run, with what enters it: nothing, if it is the whole tree.
template <int kRows, Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    finish_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  constexpr int kStreams = num_streams(pass);
  const RunItem item(data, plan);
  if (!item.valid) return;
  const uint32_t channels = data.channels;
  Stack<acc_t> stacks[kStreams];
  for (int s = 0; s < kStreams; ++s) stacks[s] = thread_stack<acc_t>(s, capacity);
  acc_t entering[kStreams] = {};
  if (plan.cuts != nullptr) {
    for (int s = 0; s < kStreams; ++s) entering[s] = runs.below[s * runs.stride + item.at_run];
  }
  T* out = data.out + item.column;
  acc_t* sums[2] = {data.sums[0] + item.column, is_backward(pass) ? data.sums[1] + item.column : nullptr};
  walk_up<kRows, pass, kSelective>(data, plan, item, stacks, entering,
                                   [&](int s, uint32_t node, acc_t, acc_t u, acc_t) {
                                     if (!item.active || node & kPast) return;
                                     const uint32_t at = (node & kVertexMask) * channels;
                                     if constexpr (pass == Pass::kUp) {
                                       out[at] = static_cast<T>(u);
                                     } else {
                                       sums[s][at] = u;
                                     }
                                   });
  if constexpr (pass == Pass::kUp) return;

  using Batch = Rows<kRows, T, acc_t, kStreams>;
  const T* decays = data.decay + item.column;
  const T* xs = data.x + item.column;
  const T* input_weights = data.input_weight + item.rows * data.input_weight_stride;
  T* ddecay = is_backward(pass) ? data.ddecay + item.column : nullptr;
  acc_t* dinput_weights = data.dinput_weight + (item.group * data.batch * data.num_vertices + item.rows);
  const auto discretise = discretisation<kSelective>(data, item);
  constexpr bool kParameters = kSelective && is_backward(pass);
  acc_t dbias = 0, dA_log = 0, dinput_weight[kRows];
  acc_t h[kStreams] = {};
  for (int s = 0; s < kStreams; ++s) {
    if (plan.cuts != nullptr) h[s] = runs.bottom[s * runs.stride + item.at_run];
    stacks[s].clear();
  }
  const auto load = [&](Batch& batch, int j, uint32_t vertex) {
    const uint32_t at = vertex * channels;
    batch.decay[j] = decays[at];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) batch.value[s][j] = sums[s][at];
    if constexpr (kParameters) {
      batch.x[j] = xs[at];
      batch.input_weight[j] = input_weights[vertex * data.input_weight_stride];
    }
  };
  const auto visit_row = [&](const Batch& batch, int j) {
    const uint32_t node = batch.node[j], at = (node & kVertexMask) * channels;
    const bool push = node & kPush, light = node & kLight, root = node & kRoot;
    const bool write = item.active && !(node & kPast);
    acc_t decay = static_cast<acc_t>(batch.decay[j]);
    typename Discretisation<acc_t>::Step step{};
    if constexpr (kSelective) {
      step = discretise(decay);
      decay = step.decay;
    }
    acc_t from_above[kStreams];
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      const acc_t u = batch.value[s][j];
      stacks[s].push_if(light, h[s]);
      from_above[s] = sweeps_up(pass, s) ? h[s] - decay * u : h[s];
      h[s] = root ? u : u + decay * from_above[s];
    }
    acc_t gradient = 0;  // of the decay
    if constexpr (kStreams == 2) {
      gradient = batch.value[0][j] * from_above[1];
      if constexpr (sweeps_up(pass, 1)) gradient += batch.value[1][j] * from_above[0];
      if (root) gradient = 0;
    }
    if constexpr (!kParameters) {
      if (write) {
        out[at] = static_cast<T>(h[kStreams - 1]);
        if constexpr (kStreams == 2) ddecay[at] = static_cast<T>(gradient);
      }
    } else {
      const acc_t x = static_cast<acc_t>(batch.x[j]), input_weight = static_cast<acc_t>(batch.input_weight[j]);
      const acc_t dinput = h[1], by_rate = gradient * decay * discretise.rate;
      const acc_t ddelta = (dinput * x * input_weight + by_rate) * step.slope;
      dinput_weight[j] = write ? dinput * x * step.delta : 0;
      if (write) {
        out[at] = static_cast<T>(dinput * step.delta * input_weight);
        ddecay[at] = static_cast<T>(ddelta);
        dbias += ddelta;
        dA_log += by_rate * step.delta;
      }
    }
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      const acc_t waiting = stacks[s].pop_if(push);
      h[s] = push ? waiting : h[s];
    }
  };
  walk<false, kRows, Batch>(plan, item, load, visit_row, [&](const Batch& batch) {
    if constexpr (kParameters) {
      const acc_t sum = warp_sums(dinput_weight);
      const int lane = threadIdx.x % 32;
      uint32_t node = batch.node[0];
#pragma unroll
      for (int j = 1; j < kRows; ++j) {
        if (lane / 4 == j) node = batch.node[j];
      }
      if (lane % 4 == 0 && !(node & kPast)) dinput_weights[node & kVertexMask] = sum;
    }
  });
  if constexpr (kParameters) {
    if (!item.active) return;
    data.dparameters[item.at_run] = dbias;
    data.dparameters[data.batch * plan.runs * data.channels + item.at_run] = dA_log;
  }
}

}  // namespace grootvl
