// Cuts the postorder of a tree into runs, and the runs into sections; the rule is in scan.cuh.
#pragma once

#include "../common/assert.cuh"
#include "../common/launch.cuh"
#include "scan.cuh"

namespace grootvl {

// A node is a vertex in postorder, with what a walk must know of it as flags.
constexpr int kVertexBits = 27;
constexpr uint32_t kVertexMask = (1u << kVertexBits) - 1;
// A leaf that begins a path that ends at a light vertex. Of a run, which its last vertex stands for: no run is below
// it.
constexpr uint32_t kPush = 1u << 27;
constexpr uint32_t kLight = 1u << 28;  // has a sibling before it in the postorder
constexpr uint32_t kChain = 1u << 29;  // its subtree is at least as large as a run; of a run: as a section
constexpr uint32_t kRoot = 1u << 30;
constexpr uint32_t kPast = 1u << 31;  // a copy that fills up the last tile of a run and must change nothing

// Pieces of consecutive elements: runs of vertices in postorder, or sections of runs. All arrays are for each tree,
// over the elements or over the pieces, of which there are at most `capacity`.
struct Pieces {
  int32_t* cuts;      // (trees, elements): 1 where a piece ends; null, as all that follows, if there is only one piece
  const int32_t* id;  // (trees, elements): pieces of all trees that end up to here, itself included
  int32_t* end;       // (trees, capacity): one past its last element
  uint32_t* nodes;    // (trees, capacity): its last vertex
  int32_t* first;     // (trees, capacity): of runs, the one in which the subtree of that vertex begins
  int elements;
  int capacity;
  int log2_size;

  // Limited, so that a damaged tree does not lead outside of the arrays.
  __device__ int count(int64_t tree) const {
    if (cuts == nullptr) return 1;
    const int found = id[(tree + 1) * elements - 1] - before(tree);
    GROOTVL_ASSERT(found <= capacity);
    return min(found, capacity);
  }
  __device__ int before(int64_t tree) const { return tree > 0 ? id[tree * elements - 1] : 0; }
  // Which of its tree's pieces an element, the i-th of all trees, is in.
  __device__ int piece(int64_t tree, int64_t i) const { return id[i] - cuts[i] - before(tree); }
  __device__ int begin(int64_t tree, int piece) const { return piece > 0 ? end[tree * capacity + piece - 1] : 0; }
  // Whether a vertex with n vertices in its subtree, and `above` in its parent's, ends a piece.
  __device__ bool cut(int n, bool root, int above) const {
    return n >> log2_size > 0 && (root || n >> log2_size != above >> log2_size);
  }
};

struct Plan {
  uint32_t* nodes;  // (trees, L)
  Pieces runs, sections;
};

constexpr int kUncut = 31;  // log2 of a size that no subtree has: there is one piece only

constexpr int64_t max_pieces(int64_t num_vertices, int log2_size) { return 2 * (num_vertices >> log2_size) + 2; }

constexpr int kPlanThreads = 256;

// The nodes of all vertices, and where runs end.
template <typename T, typename acc_t>
__global__ void mark_nodes(ScanData<T, acc_t> data, Plan plan) {
  await_kernels_before();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int length = data.num_vertices;
  if (i >= int64_t(data.trees) * length) return;
  const int t = i % length, k = length - 1 - t;  // places in the postorder and in the order
  const int64_t rows = i - t;
  const int32_t* order = data.order + rows;
  const int32_t* parent = data.parent + rows;
  const int32_t* size = data.subtree_size + rows;
  const unsigned limit = length - 1;  // a damaged tree must not lead outside of the arrays
  const unsigned v = min(unsigned(order[k]), limit), p = min(unsigned(parent[v]), limit);
  const int n = size[v];
  const bool root = v == p;
  GROOTVL_ASSERT(unsigned(order[k]) <= limit && unsigned(parent[v]) <= limit);
  GROOTVL_ASSERT(n >= 1 && k + n <= length && (root || n < size[p]));
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

// The nodes of all runs, and where sections end.
template <typename T, typename acc_t>
__global__ void list_runs(ScanData<T, acc_t> data, Plan plan) {
  await_kernels_before();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int length = data.num_vertices;
  const Pieces &runs = plan.runs, &sections = plan.sections;
  if (i >= int64_t(data.trees) * length || !runs.cuts[i]) return;
  const int64_t tree = i / length, rows = tree * length;
  const int t = i % length, run = runs.piece(tree, i);
  GROOTVL_ASSERT(run < runs.capacity);
  if (run >= runs.capacity) return;
  const uint32_t node = plan.nodes[i], vertex = node & kVertexMask;
  const int n = data.subtree_size[rows + vertex];
  const int64_t at_first = rows + max(t + 1 - n, 0);  // of its subtree
  const int first = runs.piece(tree, at_first);
  GROOTVL_ASSERT(t + 1 >= n && first <= run);
  const int64_t at = tree * runs.capacity + run;
  const bool chain = sections.cuts != nullptr && n >> sections.log2_size > 0;
  runs.end[at] = t + 1;
  runs.nodes[at] = (node & ~(kPush | kChain)) | (first == run ? kPush : 0) | (chain ? kChain : 0);
  if (sections.cuts == nullptr) return;
  const unsigned above = min(unsigned(data.parent[rows + vertex]), unsigned(length - 1));
  runs.first[at] = min(first, run);
  sections.cuts[at] = t == length - 1 || sections.cut(n, node & kRoot, data.subtree_size[rows + above]);
}

// The nodes of all sections. Static, since it is the only kernel here that is no template.
static __global__ void list_sections(Plan plan, int64_t trees) {
  await_kernels_before();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const Pieces &runs = plan.runs, &sections = plan.sections;
  if (i >= trees * runs.capacity || !sections.cuts[i]) return;
  const int64_t tree = i / runs.capacity, first = tree * runs.capacity + runs.first[i];
  const int section = sections.piece(tree, i);
  GROOTVL_ASSERT(section < sections.capacity);
  if (section >= sections.capacity) return;
  const bool leaf = sections.piece(tree, first) == section;
  sections.end[tree * sections.capacity + section] = i % runs.capacity + 1;
  sections.nodes[tree * sections.capacity + section] = (runs.nodes[i] & ~kPush) | (leaf ? kPush : 0);
}

}  // namespace grootvl
