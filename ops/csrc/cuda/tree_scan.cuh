// What both kinds of scan kernels share: the four passes, and how a tree is cut into runs.
//
// A scan follows the tree's order backwards: a postorder in which the largest subtree of a vertex comes first. One
// thread can walk it with a running sum, but L steps are a long way. So the postorder is cut into *runs*, pieces of
// consecutive vertices that can be walked side by side. With S the run length aimed at and n_v the subtree size of v, a
// vertex ends a run if
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
// Three phases: (1) each run finds U, beta and P; (2) a walk over the runs alone finds E and h_bottom; (3) each run is
// finished.
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

// The tensors of a pass, all (B, L, D) contiguous; unused ones are null.
template <typename T>
struct ScanData {
  const T* x;
  const T* decay;
  const T* grad;
  T* out;  // h or u; in a backward pass dx
  T* ddecay;
  const int32_t* parent;
  const int32_t* order;
  const int32_t* subtree_size;
  int64_t batch;
  int num_vertices;
  int channels;
};

constexpr int max_runs(int num_vertices, int log2_run) { return 2 * (num_vertices >> log2_run) + 2; }

// Whether a vertex ends a run; `is_last` marks the end of the postorder. Roots of small trees in a forest end none.
__device__ inline bool ends_run(int size, int parent_size, bool is_root, bool is_last, int log2_run) {
  const int runs = size >> log2_run;
  return is_last || (runs > 0 && (is_root || runs != parent_size >> log2_run));
}

}  // namespace grootvl
