// The scan of maps of any size: the three phases of tree_scan.cuh as kernels of their own over global memory. A warp
// takes one run and 32 channels, a lane each, so that all its threads take the same path. Instead of writing to parents
// it keeps the sums that wait on a stack: where a leaf begins a new path the running sum is pushed, and at a vertex
// with a larger sibling it is popped. On the way down it is the reverse. The larger siblings at least double a subtree,
// so 32 entries are enough for 2^31 vertices.
#pragma once

#include "tree_scan.cuh"

namespace grootvl {

// A vertex of the postorder with what a walk must know of it.
constexpr int kVertexBits = 27;
constexpr uint32_t kVertexMask = (1u << kVertexBits) - 1;
constexpr uint32_t kLeaf = 1u << 27;   // has no children
constexpr uint32_t kLight = 1u << 28;  // has a sibling before it in the postorder
constexpr uint32_t kChain = 1u << 29;  // its subtree is at least as large as a run
constexpr uint32_t kRoot = 1u << 30;
constexpr int kStackSize = 32;
constexpr int kBatch = 8;  // rows whose loads are in flight together

template <typename acc_t>
struct Stack {
  acc_t values[kStackSize];
  int size = 0;
  __device__ void push(acc_t value) {
    if (size < kStackSize) values[size++] = value;
  }
  __device__ acc_t pop() { return size > 0 ? values[--size] : acc_t(0); }
};

// The plan of a scan: all arrays per image, over vertices in postorder or over runs (at most `runs`).
struct Plan {
  uint32_t* nodes;        // (B, L)
  int32_t* cuts;          // (B, L): 1 where a run ends
  const int32_t* run_id;  // (B, L): runs that end up to here, itself included
  int32_t* run_end;       // (B, runs)
  uint32_t* run_nodes;    // (B, runs): its last vertex; kLeaf here means that no run hangs below it
  int runs;
  int log2_run;
};

// Runs and channels of a pass: (stream, B, runs, D).
template <typename acc_t>
struct RunData {
  acc_t* beta;    // (B, runs, D)
  acc_t* decay;   // (B, runs, D): of the last vertex
  acc_t* end;     // U
  acc_t* bottom;  // P, then h at the bottom of the run above
  acc_t* below;   // E
  int64_t stream_stride;
};

template <typename T>
__global__ void mark_runs(ScanData<T> data, Plan plan) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int length = data.num_vertices;
  if (i >= data.batch * length) return;
  const int t = i % length, k = length - 1 - t;
  const int64_t rows = i - t;
  const int32_t* order = data.order + rows;
  const int32_t* parent = data.parent + rows;
  const int32_t* size = data.subtree_size + rows;
  const unsigned limit = length - 1;  // a damaged tree must not lead outside of the arrays
  const unsigned v = min(unsigned(order[k]), limit), p = min(unsigned(parent[v]), limit);
  const int n = size[v];
  const int64_t after = int64_t(k) + n;  // in the order, the sibling before it in the postorder begins here
  const bool light = v != p && n > 0 && after < length && unsigned(parent[min(unsigned(order[after]), limit)]) == p;
  plan.nodes[i] =
      v | (n == 1 ? kLeaf : 0) | (light ? kLight : 0) | (n >> plan.log2_run > 0 ? kChain : 0) | (v == p ? kRoot : 0);
  plan.cuts[i] = ends_run(n, size[p], v == p, t == length - 1, plan.log2_run);
}

template <typename T>
__global__ void list_runs(ScanData<T> data, Plan plan) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int length = data.num_vertices;
  if (i >= data.batch * length || !plan.cuts[i]) return;
  const int64_t image = i / length, rows = image * length;
  const int t = i % length, run = plan.run_id[i] - 1;
  if (run >= plan.runs) return;
  const uint32_t node = plan.nodes[i];
  const int first = max(t + 1 - data.subtree_size[rows + (node & kVertexMask)], 0);  // of its subtree
  const bool leaf = plan.run_id[rows + first] - plan.cuts[rows + first] == run;
  plan.run_end[image * plan.runs + run] = t + 1;
  plan.run_nodes[image * plan.runs + run] = (node & ~kLeaf) | (leaf ? kLeaf : 0);
}

// The run and channel of a warp's lane.
struct RunItem {
  int64_t rows, run_rows;  // offsets of the image in (B, L) and (B, runs)
  int run, begin, end, channel;
  bool valid;

  template <typename T>
  __device__ RunItem(const ScanData<T>& data, const Plan& plan) {
    const int groups = (data.channels + 31) / 32;
    const int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    channel = warp % groups * 32 + threadIdx.x % 32;
    run = warp / groups % plan.runs;
    const int64_t image = warp / groups / plan.runs;
    rows = image * data.num_vertices;
    run_rows = image * plan.runs;
    valid = image < data.batch && run < plan.run_id[rows + data.num_vertices - 1];
    if (!valid) return;
    begin = run > 0 ? plan.run_end[run_rows + run - 1] : 0;
    end = plan.run_end[run_rows + run];
    valid = channel < data.channels;
  }
};

// Walks up a run. Calls visit(stream, vertex's row, node, is_last, decay, u, contribution) for each vertex.
template <int kStreams, bool kGradUp, typename T, typename acc_t, typename Visit>
__device__ void walk_up(const ScanData<T>& data, const Plan& plan, const RunItem& item,
                        const acc_t (&entering)[kStreams], Visit visit) {
  const uint32_t* nodes = plan.nodes + item.rows;
  Stack<acc_t> stack[kStreams];
  acc_t sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = entering[s];
  for (int first = item.begin; first < item.end; first += kBatch) {
    uint32_t node[kBatch];
    acc_t decay[kBatch], value[kStreams][kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) node[j] = nodes[min(first + j, item.end - 1)];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t at = (item.rows + (node[j] & kVertexMask)) * data.channels + item.channel;
      decay[j] = static_cast<acc_t>(data.decay[at]);
      value[0][j] = static_cast<acc_t>(data.x[at]);
      if constexpr (kStreams == 2) value[1][j] = static_cast<acc_t>(data.grad[at]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j >= item.end) break;
      const bool last = first + j + 1 == item.end;
      const int64_t at = (item.rows + (node[j] & kVertexMask)) * data.channels + item.channel;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (s == 1 && !kGradUp) {  // swept down only
          visit(s, at, node[j], last, decay[j], value[s][j], acc_t(0));
          continue;
        }
        if (node[j] & kLeaf) {
          stack[s].push(sum[s]);
          sum[s] = 0;
        }
        const acc_t u = value[s][j] + sum[s], contribution = decay[j] * u;
        visit(s, at, node[j], last, decay[j], u, contribution);
        if (node[j] & kRoot) {
          sum[s] = 0;
          stack[s].size = 0;
        } else {
          sum[s] = node[j] & kLight && !last ? stack[s].pop() + contribution : contribution;
        }
      }
    }
  }
}

// (1) Each run by itself.
template <typename T, typename acc_t, Pass pass>
__global__ void summarise_runs(ScanData<T> data, Plan plan, RunData<acc_t> runs) {
  constexpr int kStreams = is_backward(pass) ? 2 : 1;
  const RunItem item(data, plan);
  if (!item.valid) return;
  acc_t product = 1, chain[kStreams] = {}, bottom[kStreams] = {};
  const acc_t nothing[kStreams] = {};
  const int64_t at_run = (item.run_rows + item.run) * data.channels + item.channel;
  walk_up<kStreams, pass == Pass::kFullBackward>(
      data, plan, item, nothing,
      [&](int s, int64_t, uint32_t node, bool last, acc_t decay, acc_t u, acc_t contribution) {
        if (node & kChain) {
          bottom[s] += product * (u - chain[s]);
          chain[s] = contribution;
          if (s == kStreams - 1 && !last) product *= decay;
        }
        if (last) {
          runs.end[s * runs.stream_stride + at_run] = u;
          runs.decay[at_run] = node & kRoot ? acc_t(0) : decay;
        }
      });
  runs.beta[at_run] = product;
  for (int s = 0; s < kStreams; ++s) runs.bottom[s * runs.stream_stride + at_run] = bottom[s];
}

// (2) The runs among themselves: a thread for each stream, image and channel.
template <typename T, typename acc_t, Pass pass>
__global__ void join_runs(ScanData<T> data, Plan plan, RunData<acc_t> runs) {
  constexpr int kStreams = is_backward(pass) ? 2 : 1;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int channel = thread % data.channels;
  const int64_t image = thread / data.channels % data.batch, s = thread / data.channels / data.batch;
  if (s >= kStreams) return;
  const bool up = s == 0 || pass == Pass::kFullBackward;
  const int count = plan.run_id[(image + 1) * data.num_vertices - 1];
  const uint32_t* nodes = plan.run_nodes + image * plan.runs;
  const int64_t offset = image * plan.runs * data.channels + channel;
  const acc_t* beta = runs.beta + offset;
  const acc_t* decay = runs.decay + offset;
  const acc_t* end = runs.end + s * runs.stream_stride + offset;
  acc_t* bottom = runs.bottom + s * runs.stream_stride + offset;
  acc_t* below = runs.below + s * runs.stream_stride + offset;
  Stack<acc_t> stack;
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
      if (node[j] & kLeaf) {
        stack.push(sum);
        sum = 0;
      }
      below[int64_t(first + j) * data.channels] = up ? sum : acc_t(0);
      const acc_t contribution = a[j] * (u[j] + b[j] * sum);
      if (node[j] & kRoot || !up) {
        sum = 0;
        stack.size = 0;
      } else {
        sum = node[j] & kLight ? stack.pop() + contribution : contribution;
      }
    }
  }
  if constexpr (pass == Pass::kUp) return;
  stack.size = 0;
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
      bottom[int64_t(first - j) * data.channels] = h;
      if (node[j] & kRoot) {
        stack.size = 0;
      } else if (node[j] & kLight) {
        stack.push(h);
      }
      const acc_t from_above = up ? h - a[j] * (u[j] + b[j] * e[j]) : h;
      h = e[j] + p[j] + b[j] * a[j] * from_above;
      if (node[j] & kLeaf) h = stack.pop();
    }
  }
}

// (3) Each run again, now that it is known what enters it. `sums` holds each stream's values between the sweeps:
// (stream, B, L, D).
template <typename T, typename acc_t, Pass pass>
__global__ void finish_runs(ScanData<T> data, Plan plan, RunData<acc_t> runs, acc_t* sums, int64_t sums_stride) {
  constexpr int kStreams = is_backward(pass) ? 2 : 1;
  constexpr bool kGradUp = pass == Pass::kFullBackward;
  const RunItem item(data, plan);
  if (!item.valid) return;
  const int64_t at_run = (item.run_rows + item.run) * data.channels + item.channel;
  acc_t entering[kStreams];
  for (int s = 0; s < kStreams; ++s) entering[s] = runs.below[s * runs.stream_stride + at_run];
  walk_up<kStreams, kGradUp>(data, plan, item, entering, [&](int s, int64_t at, uint32_t, bool, acc_t, acc_t u, acc_t) {
    if constexpr (pass == Pass::kUp) {
      data.out[at] = static_cast<T>(u);
    } else {
      sums[s * sums_stride + at] = u;
    }
  });
  if constexpr (pass == Pass::kUp) return;

  const uint32_t* nodes = plan.nodes + item.rows;
  Stack<acc_t> stack[kStreams];
  acc_t h[kStreams];
  for (int s = 0; s < kStreams; ++s) h[s] = runs.bottom[s * runs.stream_stride + at_run];
  for (int first = item.end - 1; first >= item.begin; first -= kBatch) {
    uint32_t node[kBatch];
    acc_t decay[kBatch], value[kStreams][kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) node[j] = nodes[max(first - j, item.begin)];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t at = (item.rows + (node[j] & kVertexMask)) * data.channels + item.channel;
      decay[j] = static_cast<acc_t>(data.decay[at]);
#pragma unroll
      for (int s = 0; s < kStreams; ++s) value[s][j] = sums[s * sums_stride + at];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first - j < item.begin) break;
      const int64_t at = (item.rows + (node[j] & kVertexMask)) * data.channels + item.channel;
      const bool root = node[j] & kRoot, last = first - j == item.end - 1;
      const acc_t a = decay[j];
      acc_t from_above[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        const acc_t u = value[s][j];
        if (root) {
          stack[s].size = 0;
        } else if (node[j] & kLight && !last) {
          stack[s].push(h[s]);
        }
        from_above[s] = s == 0 || kGradUp ? h[s] - a * u : h[s];
        h[s] = root ? u : u + a * from_above[s];
      }
      data.out[at] = static_cast<T>(h[kStreams - 1]);
      if constexpr (kStreams == 2) {
        acc_t gradient = value[0][j] * from_above[1];
        if constexpr (kGradUp) gradient += value[1][j] * from_above[0];
        data.ddecay[at] = static_cast<T>(root ? acc_t(0) : gradient);
      }
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (node[j] & kLeaf) h[s] = stack[s].pop();
      }
    }
  }
}

}  // namespace grootvl
