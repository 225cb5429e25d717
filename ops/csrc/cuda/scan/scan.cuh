// How a scan is divided among threads.
//
// A scan follows the tree's order backwards: a postorder in which the largest subtree of a vertex comes first. A warp
// that walks along it for 32 channels, a lane each, needs no more than a running sum: at a vertex the sum over its
// children is complete. Only where a leaf begins a new path is the sum put on a stack, and at a vertex with a larger
// sibling it is taken back. Larger siblings at least double a subtree, so no more than log2(L) sums wait. On the way
// down it is the reverse. All the rows of a walk are known ahead, so they are on their way from memory long before they
// are needed (feed.cuh).
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
// E and h_bottom; (3) finish_runs walks each run with these. A tree of one run needs the last one only. Many runs are
// joined on two levels: the postorder of runs is cut into *sections* by the same rule with a larger S; a section
// answers as a run does, so that first the sections are summarised and joined, then the runs of each section.
//
// A *selective* scan computes its x and decay from the values of a pixel when it reads them, in float32 or better, so
// neither ever stands in memory; its gradients are those of the values (discretise.cuh).
#pragma once

#include "../common/launch.cuh"

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
  bool aligned;  // rows begin at multiples of 16 bytes
};

// A vertex of the postorder with what a walk must know of it.
constexpr int kVertexBits = 27;
constexpr uint32_t kVertexMask = (1u << kVertexBits) - 1;
constexpr uint32_t kPush =
    1u << 27;  // begins a path that ends at a light vertex; as the end of a run: no run hangs below it
constexpr uint32_t kLight = 1u << 28;  // has a sibling before it in the postorder
constexpr uint32_t kChain = 1u << 29;  // its subtree is at least as large as a run; of the end of a run: as a section
constexpr uint32_t kRoot = 1u << 30;
constexpr uint32_t kPast = 1u << 31;  // fills up a batch after the end of a run: nothing is to be done

// Pieces that each consist of consecutive elements: runs of vertices in postorder, or sections of runs. All arrays per
// image, over the elements or over the pieces, of which there are at most `capacity`.
struct Pieces {
  int32_t* cuts;      // (B, elements): 1 where a piece ends; null, as all that follows, if there is but one
  const int32_t* id;  // (B, elements): pieces of all images that end up to here, itself included
  int32_t* end;       // (B, capacity): one past its last element
  uint32_t* nodes;    // (B, capacity): its last vertex
  int32_t* first;     // (B, capacity): of runs, the one in which the subtree of that vertex begins
  int elements;
  int capacity;
  int log2_size;

  __device__ int count(int64_t image) const {  // a damaged tree must not lead outside of the arrays
    return cuts == nullptr ? 1 : min(id[(image + 1) * elements - 1] - before(image), capacity);
  }
  __device__ int before(int64_t image) const { return image > 0 ? id[image * elements - 1] : 0; }
  // Which of its image's pieces an element, the i-th of all images, is in.
  __device__ int piece(int64_t image, int64_t i) const { return id[i] - cuts[i] - before(image); }
  __device__ int begin(int64_t image, int piece) const { return piece > 0 ? end[image * capacity + piece - 1] : 0; }
  // Whether a vertex with n in its subtree, of which `above` is the parent's, ends a piece.
  __device__ bool cut(int n, bool root, int above) const {
    return n >> log2_size > 0 && (root || n >> log2_size != above >> log2_size);
  }
};

struct Plan {
  uint32_t* nodes;  // (B, L)
  Pieces runs, sections;
};

constexpr int64_t max_pieces(int64_t num_vertices, int log2_size) { return 2 * (num_vertices >> log2_size) + 2; }

// What the phases hand to each other of runs, or of sections: (B, capacity, D) each, and a stream's `stride` further
// for the second stream.
template <typename acc_t>
struct RunData {
  acc_t* beta;
  acc_t* decay;   // of the last vertex, 0 at a root
  acc_t* end;     // U
  acc_t* bottom;  // P; after join_runs h at the bottom of the run above
  acc_t* below;   // E
  int64_t stride;
};

constexpr int kPlanThreads = 256;

template <typename T, typename acc_t>
__global__ void mark_nodes(ScanData<T, acc_t> data, Plan plan) {
  await_kernels_before();
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
  const bool chain = n >> plan.runs.log2_size > 0;
  plan.nodes[i] = v | (push ? kPush : 0) | (light ? kLight : 0) | (chain ? kChain : 0) | (root ? kRoot : 0);
  if (plan.runs.cuts == nullptr) return;
  // Roots of small trees in a forest end no run, the end of the postorder does.
  plan.runs.cuts[i] = t == length - 1 || plan.runs.cut(n, root, size[p]);
}

template <typename T, typename acc_t>
__global__ void list_runs(ScanData<T, acc_t> data, Plan plan) {
  await_kernels_before();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int length = data.num_vertices;
  const Pieces &runs = plan.runs, &sections = plan.sections;
  if (i >= data.batch * length || !runs.cuts[i]) return;
  const int64_t image = i / length, rows = image * length;
  const int t = i % length, run = runs.piece(image, i);
  if (run >= runs.capacity) return;
  const uint32_t node = plan.nodes[i], vertex = node & kVertexMask;
  const int n = data.subtree_size[rows + vertex];
  const int64_t at_first = rows + max(t + 1 - n, 0);  // of its subtree
  const int first = runs.piece(image, at_first);
  const int64_t at = image * runs.capacity + run;
  const bool chain = sections.cuts != nullptr && n >> sections.log2_size > 0;
  runs.end[at] = t + 1;
  runs.nodes[at] = (node & ~(kPush | kChain)) | (first == run ? kPush : 0) | (chain ? kChain : 0);
  if (sections.cuts == nullptr) return;
  const unsigned above = min(unsigned(data.parent[rows + vertex]), unsigned(length - 1));
  runs.first[at] = min(first, run);
  sections.cuts[at] = t == length - 1 || sections.cut(n, node & kRoot, data.subtree_size[rows + above]);
}

static __global__ void list_sections(Plan plan, int64_t batch) {
  await_kernels_before();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Pieces &runs = plan.runs, &sections = plan.sections;
  if (i >= batch * runs.capacity || !sections.cuts[i]) return;
  const int64_t image = i / runs.capacity, first = image * runs.capacity + runs.first[i];
  const int section = sections.piece(image, i);
  if (section >= sections.capacity) return;
  const bool leaf = sections.piece(image, first) == section;
  sections.end[image * sections.capacity + section] = i % runs.capacity + 1;
  sections.nodes[image * sections.capacity + section] = (runs.nodes[i] & ~kPush) | (leaf ? kPush : 0);
}

}  // namespace grootvl
