// How a scan is divided among threads.
//
// A scan follows the tree's order backwards: a postorder in which the largest subtree of a vertex comes first. A warp
// that walks along it for 32 channels, a lane each, needs no more than a running sum: at a vertex the sum over its
// children is complete. Only where a leaf begins a new path is the sum put on a stack, and at a vertex with a larger
// sibling it is taken back. Larger siblings at least double a subtree, so no more than log2(L) sums wait. On the way
// down it is the reverse. All the rows of a walk are known ahead, so they can be on their way from memory long before
// they are needed.
//
// One warp on each tree and 32 channels is enough for large batches. Otherwise the postorder is cut into *runs*, pieces
// of consecutive vertices that can be walked side by side. With S the run length aimed at and n_v the subtree size of
// v, a vertex ends a run if
//
//     n_v >= S  and  floor(n_v / S) != floor(n_parent / S).
//
// It follows that at most 2 L / S runs arise; that only the last vertex of a run has its parent in another run; and
// that all runs below a run hang on one vertex of it, its *bottom*. In a grid, where a vertex has at most three
// children, no run is longer than 3 S. The vertices with n_v >= S from the bottom to the end of a run are its *chain*.
//
// What enters a run from outside is therefore one value a channel at the bottom (E, from the runs below) and one at the
// end (from the run above), and the run answers linearly:
//
//     u_end    = U + beta E                       beta: product of the decays from the bottom to the end, the end's
//     excluded h_bottom = E + P + beta a_end m             m = h_parent(end) - a_end u_end: what comes down, the run's
//     own share left out
//
// Three kernels: (1) summarise_runs finds U, beta and P of each run; (2) join_runs walks over the runs alone and finds
// E and h_bottom; (3) finish_runs walks each run with these. A tree of one run needs the last one only.
//
// A *selective* scan computes its x and decay from the values of a pixel when it reads them, in float32 or better, so
// neither ever stands in memory; its gradients are those of the values (discretise.cuh).
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

namespace grootvl {

enum class Pass {
  kUp,            // u, the sums over subtrees
  kFull,          // h, both sweeps
  kUpBackward,    // gradients of kUp: u by a sweep up, dx by a sweep down
  kFullBackward,  // gradients of kFull: both sweeps for x and for the output's gradient
};

constexpr bool is_backward(Pass pass) { return pass == Pass::kUpBackward || pass == Pass::kFullBackward; }
// What is swept: x, and in a backward pass the output's gradient; that of kUp is swept down only.
constexpr int num_streams(Pass pass) { return is_backward(pass) ? 2 : 1; }
constexpr bool sweeps_up(Pass pass, int stream) { return stream == 0 || pass == Pass::kFullBackward; }

// The tensors of a pass, (B, L, D) contiguous unless said otherwise; unused ones are null.
template <typename T, typename acc_t>
struct ScanData {
  const T* x;
  const T* decay;  // of a selective scan the step size before bias and softplus, as in ddecay
  const T* grad;
  T* out;  // h or u; in a backward pass dx
  T* ddecay;
  // Of a selective scan.
  const T* input_weight;  // (B, L), B in the paper; this far from one vertex to the next:
  int64_t input_weight_stride;
  const acc_t* delta_bias;  // (D)
  const acc_t* A_log;       // (D)
  acc_t* dinput_weight;     // (ceil(D / 32), B, L): a sum over 32 channels each
  acc_t* dparameters;       // (2, B, runs, D): a sum over a run each, of delta_bias and of A_log
  acc_t* sums[2];           // each stream's values between the sweeps; may be the outputs' memory, row for row
  const int32_t* parent;
  const int32_t* order;
  const int32_t* subtree_size;
  int64_t batch;
  int num_vertices;
  int channels;
};

// A vertex of the postorder with what a walk must know of it.
constexpr int kVertexBits = 27;
constexpr uint32_t kVertexMask = (1u << kVertexBits) - 1;
constexpr uint32_t kPush =
    1u << 27;  // begins a path that ends at a light vertex; as the end of a run: no run hangs below it
constexpr uint32_t kLight = 1u << 28;  // has a sibling before it in the postorder
constexpr uint32_t kChain = 1u << 29;  // its subtree is at least as large as a run
constexpr uint32_t kRoot = 1u << 30;
constexpr uint32_t kPast = 1u << 31;  // fills up a batch after the end of a run: nothing is to be done

// All arrays per image, over vertices in postorder or over runs (at most `runs`).
struct Plan {
  uint32_t* nodes;        // (B, L)
  int32_t* cuts;          // (B, L): 1 where a run ends; null, as all that follows, if each tree is one run
  const int32_t* run_id;  // (B, L): runs that end up to here, itself included
  int32_t* run_end;       // (B, runs): one past its last vertex
  uint32_t* run_nodes;    // (B, runs): its last vertex
  int runs;
  int log2_run;
};

constexpr int64_t max_runs(int64_t num_vertices, int log2_run) { return 2 * (num_vertices >> log2_run) + 2; }

// What the phases hand to each other: (B, runs, D) each, and a stream's `stride` further for the second stream.
template <typename acc_t>
struct RunData {
  acc_t* beta;
  acc_t* decay;   // of the last vertex, 0 at a root
  acc_t* end;     // U
  acc_t* bottom;  // P; after join_runs h at the bottom of the run above
  acc_t* below;   // E
  int64_t stride;
};

template <typename T, typename acc_t>
__global__ void mark_nodes(ScanData<T, acc_t> data, Plan plan) {
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
  const bool root = v == p;
  const int64_t after = int64_t(k) + n;  // in the order, the sibling before it in the postorder begins here
  const bool light = !root && n > 0 && after < length && unsigned(parent[min(unsigned(order[after]), limit)]) == p;
  // A leaf, but the last one of its tree, whose path ends at the root.
  const unsigned next = k + 1 < length ? min(unsigned(order[k + 1]), limit) : 0;
  const bool push = n == 1 && k + 1 < length && unsigned(parent[next]) != next;
  const int size_in_runs = n >> plan.log2_run;
  plan.nodes[i] = v | (push ? kPush : 0) | (light ? kLight : 0) | (size_in_runs > 0 ? kChain : 0) | (root ? kRoot : 0);
  if (plan.cuts == nullptr) return;
  // Roots of small trees in a forest end no run, the end of the postorder does.
  plan.cuts[i] = t == length - 1 || (size_in_runs > 0 && (root || size_in_runs != size[p] >> plan.log2_run));
}

template <typename T, typename acc_t>
__global__ void list_runs(ScanData<T, acc_t> data, Plan plan) {
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
  plan.run_nodes[image * plan.runs + run] = (node & ~kPush) | (leaf ? kPush : 0);
}

}  // namespace grootvl
