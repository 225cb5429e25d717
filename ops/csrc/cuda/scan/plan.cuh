// Cuts the postorder of a tree into runs, and the runs into sections; the rule is in scan.cuh.
#pragma once

#include "../common/assert.cuh"
#include "../common/block_team.cuh"
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
// over its pieces, of which there are at most `capacity`.
struct Pieces {
  int32_t* counts;  // (trees): how many there are; null, as all that follows, if there is only one piece
  int32_t* end;     // (trees, capacity): one past its last element
  uint32_t* nodes;  // (trees, capacity): its last vertex
  int capacity;
  int log2_size;

  __host__ __device__ bool several() const { return counts != nullptr; }
  __device__ int count(int64_t tree) const { return several() ? counts[tree] : 1; }
  __device__ int begin(int64_t tree, int piece) const { return piece > 0 ? end[tree * capacity + piece - 1] : 0; }
  // Whether a vertex with n vertices in its subtree, and `above` in its parent's, ends a piece.
  __device__ bool ends_at(int n, bool root, int above) const {
    return n >> log2_size > 0 && (root || n >> log2_size != above >> log2_size);
  }
};

struct Plan {
  uint32_t* nodes;  // (trees, L)
  Pieces runs, sections;
  // Of several runs, (trees, words_of(L)): a bit for each vertex of the postorder, 1 if it ends a run; and how many
  // runs end in the words before.
  uint32_t* run_ends;
  int32_t* ends_before;
  // Of several sections, (trees, runs.capacity): the run in which the subtree of a run's last vertex begins; and twice
  // the number of its section, plus 1 if it ends one.
  int32_t* first_runs;
  int32_t* sections_of_runs;
};

constexpr int kUncut = 31;  // log2 of a size that no subtree has: there is one piece only

constexpr int64_t max_pieces(int64_t num_vertices, int log2_size) { return 2 * (num_vertices >> log2_size) + 2; }

constexpr int kWordBits = kWarpLanes;  // one for each lane
__host__ __device__ constexpr int64_t words_of(int64_t num_vertices) {
  return (num_vertices + kWordBits - 1) / kWordBits;
}

constexpr int kMarkThreads = 256;

// The nodes of all vertices, and where runs end. A warp takes a word of a tree.
template <typename T, typename acc_t>
__global__ void mark_nodes(ScanData<T, acc_t> data, Plan plan) {
  await_kernels_before();
  const int length = data.num_vertices;
  const int64_t word = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWordBits, words = words_of(length);
  const int64_t tree = word / words;
  if (tree >= data.trees) return;
  const int t = int(word % words) * kWordBits + int(threadIdx.x % kWordBits);  // place in the postorder
  bool ends_run = false;
  if (t < length) {
    const int k = length - 1 - t;  // place in the order
    const int64_t rows = tree * length;
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
    plan.nodes[rows + t] = v | (push ? kPush : 0) | (light ? kLight : 0) | (chain ? kChain : 0) | (root ? kRoot : 0);
    // Roots of small trees in a forest end no run, the end of the postorder does.
    ends_run = t == length - 1 || plan.runs.ends_at(n, root, size[p]);
  }
  if (!plan.runs.several()) return;
  const uint32_t ends = __ballot_sync(kAllLanes, ends_run);
  if (threadIdx.x % kWordBits == 0) plan.run_ends[word] = ends;
}

// The pieces of the trees, a block for each tree. Each thread takes neighbouring words, and then neighbouring runs.
template <typename T, typename acc_t>
__global__ void __launch_bounds__(kMaxBlockThreads) list_pieces(ScanData<T, acc_t> data, Plan plan) {
  __shared__ BlockScratch scratch;
  await_kernels_before();
  BlockTeam team(&scratch);
  const int64_t tree = blockIdx.x;
  const int length = data.num_vertices, words = words_of(length);
  const int32_t *size = data.subtree_size + tree * length, *parent = data.parent + tree * length;
  const Pieces &runs = plan.runs, &sections = plan.sections;
  const uint32_t* run_ends = plan.run_ends + tree * words;
  int32_t* ends_before = plan.ends_before + tree * words;
  // Calls `visit(i)` for each number below `count` that this thread takes.
  const auto share = [&](int count, auto visit) {
    const int of_thread = (count + team.size() - 1) / team.size(), first = min(team.rank() * of_thread, count);
    for (int i = first; i < min(first + of_thread, count); ++i) visit(i);
  };
  // Limited, so that a damaged tree does not lead outside of the arrays.
  const auto set_count = [&](const Pieces& pieces, int found) {
    GROOTVL_ASSERT(found <= pieces.capacity);
    found = min(found, pieces.capacity);
    if (team.rank() == 0) pieces.counts[tree] = found;
    return found;
  };

  int ends = 0, total;
  share(words, [&](int word) { ends += __popc(run_ends[word]); });
  int before = team.exclusive_sum(ends, total);
  share(words, [&](int word) {
    ends_before[word] = before;
    before += __popc(run_ends[word]);
  });
  const int num_runs = set_count(runs, total);
  team.sync();
  const auto run_of = [&](int t) {
    return ends_before[t / kWordBits] + __popc(run_ends[t / kWordBits] & ((1u << t % kWordBits) - 1));
  };
  const int64_t at_runs = tree * runs.capacity;
  int32_t *first_runs = plan.first_runs + at_runs, *sections_of_runs = plan.sections_of_runs + at_runs;
  share(words, [&](int word) {
    int run = ends_before[word];
    for (uint32_t bits = run_ends[word]; bits != 0 && run < num_runs; bits &= bits - 1, ++run) {
      const int t = word * kWordBits + __ffs(bits) - 1;
      const uint32_t node = plan.nodes[tree * length + t], vertex = node & kVertexMask;
      const int n = size[vertex], first = run_of(max(t + 1 - n, 0));  // the run in which its subtree begins
      GROOTVL_ASSERT(t + 1 >= n && first <= run);
      const bool chain = sections.several() && n >> sections.log2_size > 0;
      runs.end[at_runs + run] = t + 1;
      runs.nodes[at_runs + run] = (node & ~(kPush | kChain)) | (first == run ? kPush : 0) | (chain ? kChain : 0);
      if (!sections.several()) continue;
      const unsigned above = min(unsigned(parent[vertex]), unsigned(length - 1));
      first_runs[run] = min(first, run);
      sections_of_runs[run] = t == length - 1 || sections.ends_at(n, node & kRoot, size[above]);
    }
  });
  if (!sections.several()) return;

  team.sync();
  ends = 0;
  share(num_runs, [&](int run) { ends += sections_of_runs[run]; });
  before = team.exclusive_sum(ends, total);
  share(num_runs, [&](int run) {
    const int ends_section = sections_of_runs[run];
    sections_of_runs[run] = 2 * before + ends_section;
    before += ends_section;
  });
  const int num_sections = set_count(sections, total);
  team.sync();
  const int64_t at_sections = tree * sections.capacity;
  share(num_runs, [&](int run) {
    const int section = sections_of_runs[run] / 2;
    if (sections_of_runs[run] % 2 == 0 || section >= num_sections) return;
    const bool leaf = sections_of_runs[first_runs[run]] / 2 == section;
    sections.end[at_sections + section] = run + 1;
    sections.nodes[at_sections + section] = (runs.nodes[at_runs + run] & ~kPush) | (leaf ? kPush : 0);
  });
}

}  // namespace grootvl
