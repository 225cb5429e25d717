// Read this first: what the scans compute, and how a scan is divided among threads.
//
// clang-format off
//
// A scan (paper, section 3.2) sweeps over a tree twice. Every vertex v has an input x_v and a decay a_v, which belongs
// to the edge from v to its parent:
//
//     up:    u_v = x_v + sum over the children c of v of a_c u_c
//     down:  h_root = u_root,   h_v = u_v + a_v (h_parent - a_v u_v)
//
// That is the direction "both". The direction "up" is the sweep up alone. The direction "down" is another sweep down
// alone, from x: h_root = x_root, h_v = x_v + a_v h_parent. These two are each other's gradients: that of "up" for x is
// the sweep down of the output's gradient, that of "down" the sweep up of it.
//
// Order. A scan follows the tree's order backwards: a postorder in which the largest subtree of a vertex comes first.
// A warp goes over the vertices in this order for 32 channels, a lane each. It needs one running sum a lane: at a
// vertex, the sum over its children is complete. Only where a leaf begins a new path is the sum pushed on a stack, and
// at a vertex with a larger sibling it is popped. A larger sibling at least doubles a subtree, so that at most log2(L)
// sums are pending. The sweep down does the reverse. All rows of a walk are known before it begins, so they are
// prefetched (ring.cuh).
//
// Runs. One warp for each tree and 32 channels is enough if there are many trees. Otherwise the postorder is cut into
// *runs* of consecutive vertices, which several warps walk at the same time. With S the run length aimed at and n_v the
// size of v's subtree, a vertex ends a run if it is the last of the postorder, or
//
//     n_v >= S  and  floor(n_v / S) != floor(n_parent / S).
//
// It follows that there are at most 2 L / S + 2 runs, that only the last vertex of a run has its parent in another run,
// and that all runs below a run hang on one vertex of it, its *bottom*. The vertices with n_v >= S of a run are a path
// from the bottom to the end, the *chain*; only the last run of a forest can be without one. In the grid of a map, where
// a vertex has at most three children, no run is longer than 3 S (a root with four can have a longer one only if the
// whole tree is smaller than 4 S), and in that of a clip no run is longer than 5 S. An example with S = 4, in which
// vertices are numbered in postorder:
//
//                 14     end of run 4 and root          run   vertices    chain    bottom   end
//                  |                                      1    1 ...  5    4  5         4     5
//                 13     bottom of run 4                  2    6 ...  9    9            9     9
//                /  \                                     3   10 ... 11   10 11        10    11
//              11    12  11: end of run 3                 4   12 ... 14   13 14        13    14
//               |
//              10        bottom of run 3                vertex                4  5   9  10  11  13  14
//             /  \                                      n_v                   4  5   4  10  11  13  14
//            5    9      ends of runs 1 and 2           floor(n_v / 4)        1  1   1   2   2   3   3
//            |    |
//            4    8      bottom of run 1                All other vertices have subtrees smaller than 4. Runs 1 and 2
//           / \   |                                     hang on vertex 10, run 3 hangs on vertex 13.
//          2   3  7
//          |      |                                     A walk over the whole tree pushes a_5 u_5 at vertex 6, a leaf,
//          1      6                                     and pops it at vertex 9, which has the larger sibling 5.
//
// So a channel of a run gets one value from outside at its bottom, E, and one at its end, m, and it depends on both
// linearly:
//
//     u_end    = U + beta E
//     h_bottom = E + P + beta a_end m
//
//     E     what the runs below bring: the sum of a_end u_end over the runs that hang on the bottom
//     m     what comes from above, without this run's own share: h_parent(end) - a_end u_end, or h_parent(end) in a
//           sweep down alone; h_parent(end) is the h_bottom of the run above
//     U     u at the run's end if nothing enters from below (E = 0)
//     P     h at the run's bottom if nothing enters at all (E = m = 0): what the run's own vertices add there
//     beta  the product of the decays from the bottom to the end, without the end's
//     a_end the end's decay, 0 at a root
//
// Three kernels: summarise_runs finds U, P, beta and a_end of each run; join_runs goes over the runs alone, up for all
// E and down for all h_parent(end); finish_runs walks each run once more, with these. A tree of one run needs the last
// kernel only. Many runs are joined on two levels: the sequence of runs is cut into *sections* by the same rule with a
// larger S. A section depends on what enters it as a run does, so that first the sections are summarised and joined,
// then the runs of each section.
//
// A *selective* scan computes its x and decay from the values of a pixel when it reads them, in float32 or better, so
// neither is ever stored in memory; its gradients are those of these values (discretise.cuh).
//
// Several scans. One launch takes several selective scans of the same x: the states of a state space model, or its
// directions. Their results are weighed and summed, y = sum_s C_s h_s: by another kernel (merge.cuh), or, of states of
// which the sum by one sweep is all that is asked for, in the walk itself (walk_states.cuh). Gradients need
// one sweep only where a forward pass has kept of each scan what did not come from the vertex itself: in "down"
// e_v = a_v h_parent, in "up" h_v (gradients.cuh). With g = C_s dy,
//
//     down:  dx_v = g_v + sum over the children c of v of a_c dx_c,   a_v da_v = dx_v e_v,          a sweep up
//     up:    dx_root = g_root,   dx_v = g_v + a_v dx_parent,          a_v da_v = h_v a_v dx_parent, a sweep down
//
// clang-format on
//
// Files, in the order of their use: plan.cuh cuts the postorder; ring.cuh, stack.cuh and walk.cuh go over the rows of
// a run; column.cuh goes over runs; summarise.cuh, join.cuh and finish.cuh, or gradients.cuh, are the three steps;
// launch_scan.cuh launches them; merge.cuh sums up maps of several scans. walk_states.cuh, summarise_states.cuh,
// finish_states.cuh and launch_states.cuh do the same for many states in one walk, short_trees.cuh for few short trees
// by one kernel.
#pragma once

#include <cstdint>

#include "../common/warp.cuh"

namespace grootvl {

constexpr int kWarpChannels = kWarpLanes;  // channels that a warp takes: one for each lane

enum class Sweep { kUp, kDown };  // along the postorder, from the leaves to the root, or against it

// What a scan of each direction, and its backward pass, computes.
enum class Pass {
  kBoth,          // h, both sweeps
  kUp,            // u, the sums over subtrees
  kDown,          // h by a sweep down alone, from x: h_v = x_v + a_v h_parent
  kBothBackward,  // both sweeps for x and for the output's gradient
  kUpBackward,    // u by a sweep up, dx by a sweep down
  kDownBackward,  // dx by a sweep up, h by a sweep down
  // Of selective scans whose forward pass has kept what one sweep needs.
  kUpGradient,    // dx by a sweep down
  kDownGradient,  // dx by a sweep up
};

constexpr bool is_backward(Pass pass) {
  return pass == Pass::kBothBackward || pass == Pass::kUpBackward || pass == Pass::kDownBackward;
}
constexpr bool is_gradient(Pass pass) { return pass == Pass::kUpGradient || pass == Pass::kDownGradient; }
// The operands are the maps that are swept: x, and in a backward pass the output's gradient. An operand is swept up, or
// up and down, before one that is swept down alone, so that in kDownBackward the gradient is operand 0. In a gradient
// pass, the only operand is g.
constexpr int num_operands(Pass pass) { return is_backward(pass) ? 2 : 1; }
constexpr int x_operand(Pass pass) { return pass == Pass::kDownBackward ? 1 : 0; }
constexpr bool sweeps_up(Pass pass, int operand) {
  return pass == Pass::kBothBackward || (operand == 0 && pass != Pass::kDown && pass != Pass::kUpGradient);
}
// How many operands have values that are stored between a sweep up and a sweep down. Where nothing is swept up, the
// sweep down reads x itself.
constexpr int num_between_sweeps(Pass pass) {
  return pass == Pass::kDown || pass == Pass::kUp || is_gradient(pass) ? 0 : num_operands(pass);
}
// Whether a pass sums up the gradients of the parameters of a selective scan.
constexpr bool has_parameter_gradients(Pass pass, bool selective) {
  return selective && (is_backward(pass) || is_gradient(pass));
}
// Whether the sweep down reads x, and of a selective scan the input weights with it.
constexpr bool reads_x_down(Pass pass, bool selective) {
  return pass == Pass::kDown || has_parameter_gradients(pass, selective);
}

// Weights of each pixel, (batch, L) for every scan.
template <typename T>
struct PixelWeights {
  const T* data;
  int64_t vertex_stride;  // from one vertex to the next, also from the last of an image to the first of the next one
  int64_t scan_stride;

  __device__ const T* of(int scan, int64_t row) const { return data + scan * scan_stride + row * vertex_stride; }
};

// The tensors of a pass, contiguous; unused ones are null. A launch takes `scans` scans of `batch` images: (batch, L,
// D) tensors belong to all of its scans, (maps, L, D) tensors have a map for each scan and image, in this order.
template <typename T, typename acc_t>
struct ScanData {
  const T* x;                   // (batch, L, D)
  const T* decay_or_raw_delta;  // the decay, or of a selective scan the step size before bias and softplus: of all
  int64_t raw_delta_stride;     // scans (0), or from one scan to the next
  const T* decay_raw_delta;     // (batch, L, D), or null: of many states, the step size of decays alone
  const T* grad;                // (batch, L, D)
  T* out;                       // (maps, L, D): h or u; in a backward or gradient pass dx
  T* kept;                      // (maps, L, D): for a gradient pass
  T* ddecay_or_raw_delta;       // (maps, L, D)
  T* ddecay_raw_delta;          // likewise, if there is a decay_raw_delta
  // Of a selective scan.
  PixelWeights<T> input_weight;   // B in the paper
  PixelWeights<T> output_weight;  // C, of a gradient pass
  const acc_t* delta_bias;        // (D) of all scans, or of each:
  int64_t delta_bias_stride;
  const acc_t* A_log;     // (scans, D)
  acc_t* dinput_weight;   // (ceil(D / kWarpChannels), maps, L): each a sum over the channels of a warp
  acc_t* doutput_weight;  // likewise, of a gradient pass
  // (2, maps, runs, D): each a sum over a run, of delta_bias and of A_log; in a gradient pass (3, ...), also of dy x.
  acc_t* dparameters;
  acc_t* sums[2];  // (maps, L, D): each operand's values between the sweeps; may be the outputs' memory, row for row
  // (trees, L): the tree of a map is number map / maps_of_tree % trees.
  const int32_t* parent;
  const int32_t* order;
  const int32_t* subtree_size;
  int trees;
  int maps_of_tree;
  int scans;
  int batch;
  int maps;  // scans * batch
  int num_vertices;
  int channels;
  bool aligned;  // rows begin at multiples of 16 bytes

  __device__ int tree_of(int map) const { return map / maps_of_tree % trees; }
};

// What the kernels hand to each other of runs, or of sections: (maps, capacity, D) each. U, P and E of the second
// operand follow those of the first, `stride` values further on.
template <typename acc_t>
struct RunData {
  acc_t* beta;
  acc_t* a_end;
  acc_t* U;
  acc_t* P;  // join overwrites it with h_parent(end)
  acc_t* E;
  int64_t stride;

  __device__ acc_t* h_above() const { return P; }
};

}  // namespace grootvl
