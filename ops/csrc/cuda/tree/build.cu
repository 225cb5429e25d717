// Rooted minimum spanning trees of grids and of graphs.
//
// A tree that fits the shared memory of a block is built by one block, in one kernel. A larger one is built by a team
// of blocks, with the same algorithms in global memory: one cooperative launch, in which the blocks wait for each
// other. The host does not wait for the GPU, and the launches depend on sizes only, so that CUDA graphs can capture
// them.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../../checks.h"
#include "../common/arena.cuh"
#include "../common/device.cuh"
#include "../common/launch.cuh"
#include "rooting.cuh"
#include "spanning.cuh"
#include "team.cuh"

namespace grootvl {
namespace {

using TreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// Bins such that the threads get at most one splitter each.
int bin_shift(int64_t members, int64_t threads) {
  int shift = 0;
  while (((members - 1) >> shift) + 1 > threads) ++shift;
  return shift;
}

// --------------------------------------------------------------------------------------------------------------- Grids

struct GridShape {
  int height;
  int width;
  int root;
  int shift;  // see GridTour

  __host__ __device__ int64_t vertices() const { return static_cast<int64_t>(height) * width; }
  __host__ __device__ int64_t edges() const {
    return static_cast<int64_t>(height - 1) * width + static_cast<int64_t>(height) * (width - 1);
  }
  __device__ GridEdges grid_edges() const { return {height, width}; }
};

// Working memory of the tree of a grid. The forest and then the tour use the same memory.
template <typename Index, typename Word>
struct GridMemory {
  unsigned* masks;
  Forest<Index> forest;
  unsigned* weights;  // of a block, see CopiedWeights; null otherwise
  Word* places;
  Word* steps;
  Word* segments;
  int64_t bytes;

  __host__ __device__ GridMemory(unsigned char* memory, const GridShape& shape, bool copies_weights) {
    const int64_t vertices = shape.vertices();
    const int64_t splitters = ((vertices - 1) >> shape.shift) + 2;
    Arena arena(memory);
    masks = arena.take<unsigned>((vertices + 7) / 8);
    Arena growing = arena;
    forest.best = growing.take<EdgeKey>(vertices);
    forest.label = growing.take<Index>(vertices);
    forest.hook = growing.take<Index>(vertices);
    weights = copies_weights ? growing.take<unsigned>(2 * vertices) : nullptr;
    Arena rooting = arena;
    places = rooting.take<Word>(4 * vertices);
    steps = rooting.take<Word>(2 * vertices);
    segments = rooting.take<Word>(2 * (splitters + 1));
    bytes = growing.used() > rooting.used() ? growing.used() : rooting.used();
  }
};

// `weights`: GivenWeights or CopiedWeights.
template <typename Index, typename Word, typename Team, typename Weights>
__device__ __forceinline__ void build_grid_tree(Team& team, const GridMemory<Index, Word>& memory,
                                                const GridShape& shape, const Weights& weights, int* parent, int* order,
                                                int* subtree_size) {
  const int vertices = static_cast<int>(shape.vertices());
  for (int i = team.rank(); i < (vertices + 7) / 8; i += team.size()) memory.masks[i] = 0;
  grow_forest(team, Grid(shape.grid_edges(), weights, memory.masks), memory.forest, vertices);

  const GridTour tour{memory.masks, vertices, shape.width, shape.root, shape.shift};
  const Ranks<Word> ranks = rank_darts<Word>(team, tour, memory.places, memory.segments);
  root_grid(team, tour, ranks, memory.steps, parent, subtree_size);
  team.sync();
  order_vertices(team, memory.steps, tour.darts(), 0, order);
  if (team.rank() == 0) order[0] = shape.root;
}

// One block for each image, all working memory in shared memory.
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    small_grid_tree_kernel(const float* weights, GridShape shape, int* parent, int* order, int* subtree_size) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  await_kernels_before();
  Arena arena(shared_memory);
  BlockTeam team(arena.take<BlockScratch>(1));
  const GridMemory<uint16_t, uint32_t> memory(shared_memory + arena.used(), shape, true);
  CopiedWeights copied(memory.weights, shape.width);
  copied.copy(team, {weights + blockIdx.x * shape.edges(), shape.grid_edges()});
  const int64_t offset = blockIdx.x * shape.vertices();
  build_grid_tree(team, memory, shape, copied, parent + offset, order + offset, subtree_size + offset);
}

// Teams of blocks, each of which builds the trees of every teams-th image. Cooperative.
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    large_grid_tree_kernel(const float* weights, GridShape shape, int batch, int team_blocks, GridScratch* scratch,
                           unsigned char* workspace, int* parent, int* order, int* subtree_size) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int team_number = blockIdx.x / team_blocks;
  const int teams = gridDim.x / team_blocks;
  GridTeam team(reinterpret_cast<BlockScratch*>(shared_memory), scratch + team_number, blockIdx.x % team_blocks,
                team_blocks);
  const int64_t bytes = GridMemory<int, uint64_t>(nullptr, shape, false).bytes;
  const GridMemory<int, uint64_t> memory(workspace + team_number * bytes, shape, false);
  for (int image = team_number; image < batch; image += teams) {
    const int64_t offset = image * shape.vertices();
    const GivenWeights given{weights + image * shape.edges(), shape.grid_edges()};
    build_grid_tree(team, memory, shape, given, parent + offset, order + offset, subtree_size + offset);
    team.sync();  // before the next image overwrites the memory
  }
}

// -------------------------------------------------------------------------------------------------------------- Graphs
//
// To make one tree of the parts of an unconnected graph, their roots become children of an additional vertex, number
// num_vertices. That tree has as many edges as the graph has vertices, and its tour visits all of them.

struct GraphShape {
  int vertices;
  int edges;
  int root;
  int shift;  // see EdgeTour

  __device__ int above_roots() const { return vertices; }  // the additional vertex
  __host__ __device__ int darts() const { return 2 * vertices; }
  __host__ __device__ int splitters() const { return ((darts() - 1) >> shift) + 2; }
};

// Working memory of the tree of a graph.
template <typename Index, typename Word>
struct GraphMemory {
  Forest<Index> forest;
  int* joined;
  int* lowest;
  int* tails;
  int* following;
  int* first_dart;
  int* tour_start;
  Word* places;
  Word* segments;
  int64_t bytes;

  __host__ __device__ GraphMemory(unsigned char* memory, const GraphShape& shape) {
    const int64_t vertices = shape.vertices;
    Arena arena(memory);
    forest.best = arena.take<EdgeKey>(vertices);
    forest.label = arena.take<Index>(vertices);
    forest.hook = arena.take<Index>(vertices);
    joined = arena.take<int>(vertices);
    lowest = arena.take<int>(vertices);
    tails = arena.take<int>(2 * vertices);
    following = arena.take<int>(2 * vertices);
    first_dart = arena.take<int>(vertices + 1);
    tour_start = arena.take<int>(1);
    places = arena.take<Word>(2 * vertices);
    segments = arena.take<Word>(2 * (int64_t{shape.splitters()} + 1));
    bytes = arena.used();
  }
};

// What the ranks of a tour say of an edge: its lower end, the vertex above it, the size of the subtree below, and the
// rank of the dart down.
struct RootedEdge {
  int child;
  int above;
  int size;
  int down_rank;

  template <typename Word>
  __device__ RootedEdge(const int* tails, const Ranks<Word>& ranks, int edge) {
    const int rank = ranks(2 * edge), back = ranks(2 * edge + 1);
    const int down = rank < back ? 2 * edge : 2 * edge + 1;
    above = tails[down];
    child = tails[down ^ 1];
    size = ((rank < back ? back - rank : rank - back) + 1) / 2;
    down_rank = rank < back ? rank : back;
  }
};

// Siblings are visited from the smallest subtree to the largest, those of one size from the lowest vertex. Of several
// parts the root's comes first, the others by their lowest vertex, which is their root.
__device__ __forceinline__ int visit_key(int child, int above, int size, const GraphShape& shape) {
  return above == shape.above_roots() ? child != shape.root : size;
}

// The minimum spanning tree of a graph as a tour of its edges.
template <typename Index, typename Word, typename Team>
__device__ __forceinline__ Ranks<Word> tour_graph(Team& team, const GraphMemory<Index, Word>& memory,
                                                  const GraphShape& shape, const int2* edges, const float* weights) {
  const int vertices = shape.vertices;
  for (int v = team.rank(); v <= vertices; v += team.size()) {
    memory.first_dart[v] = -1;
    if (v == vertices) break;
    memory.joined[v] = -1;
    memory.lowest[v] = vertices;
  }
  const EdgeList list{edges, weights, memory.joined, shape.edges, vertices};
  const bool connected = grow_forest(team, list, memory.forest, vertices) == 1;
  if (!connected) {
    for (int v = team.rank(); v < vertices; v += team.size()) atomicMin(&memory.lowest[memory.forest.label[v]], v);
    team.sync();
  }

  // Every label but the last of each part joined another one by an edge; the last stands for the edge above the part's
  // root.
  for (int label = team.rank(); label < vertices; label += team.size()) {
    Ends ends;
    if (memory.joined[label] >= 0) {
      ends = list.ends(memory.joined[label]);
    } else {
      const bool main_part = connected || memory.forest.label[shape.root] == label;
      ends = {shape.above_roots(), main_part ? shape.root : memory.lowest[label]};
      if (main_part) *memory.tour_start = 2 * label;
    }
    for (int side = 0; side < 2; ++side) {
      const int dart = 2 * label + side;
      const int tail = side == 0 ? ends.first : ends.second;
      memory.tails[dart] = tail;
      memory.following[dart] = atomicExch(&memory.first_dart[tail], dart);
    }
  }
  team.sync();

  const EdgeTour tour{memory.tails,  memory.following,   memory.first_dart,
                      shape.darts(), *memory.tour_start, shape.shift};
  return rank_darts<Word>(team, tour, memory.places, memory.segments);
}

// One block for each graph, all working memory in shared memory.
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    small_graph_tree_kernel(const int2* edges, const float* weights, GraphShape shape, int* parent, int* order,
                            int* subtree_size) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  await_kernels_before();
  Arena arena(shared_memory);
  BlockTeam team(arena.take<BlockScratch>(1));
  const GraphMemory<uint16_t, uint32_t> memory(shared_memory + arena.used(), shape);
  const int vertices = shape.vertices, above_roots = shape.above_roots();
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * vertices;
  const int64_t first_edge = static_cast<int64_t>(blockIdx.x) * shape.edges;
  const Ranks<uint32_t> ranks = tour_graph(team, memory, shape, edges + first_edge, weights + first_edge);

  // The forest's memory is not needed any more.
  int* sizes = memory.lowest;
  uint32_t* steps = reinterpret_cast<uint32_t*>(memory.forest.best);  // two for each vertex
  static_assert(2 * sizeof(*steps) == sizeof(EdgeKey));
  for (int i = team.rank(); i < vertices; i += team.size()) {
    const RootedEdge edge(memory.tails, ranks, i);
    parent[offset + edge.child] = edge.above == above_roots ? edge.child : edge.above;
    subtree_size[offset + edge.child] = sizes[edge.child] = edge.size;
  }
  team.sync();
  for (int i = team.rank(); i < vertices; i += team.size()) {
    const RootedEdge edge(memory.tails, ranks, i);
    const int key = visit_key(edge.child, edge.above, edge.size, shape);
    int distance = 1;
    for (int dart = memory.first_dart[edge.above]; dart >= 0; dart = memory.following[dart]) {
      const int sibling = memory.tails[dart ^ 1];
      if (sibling == above_roots) continue;
      const int size = sizes[sibling];
      if (edge.above != above_roots && size > sizes[edge.above]) continue;  // the vertex above
      const int sibling_key = visit_key(sibling, edge.above, size, shape);
      if (sibling_key < key || (sibling_key == key && sibling < edge.child)) distance += size;
    }
    steps[edge.down_rank] = pack<uint32_t>(edge.child, distance);
    steps[edge.down_rank + 2 * edge.size - 1] = pack<uint32_t>(edge.child, -distance);
  }
  team.sync();
  order_vertices(team, steps, shape.darts(), -1, order + offset);
}

// Parents and subtree sizes of the trees; for each vertex the rank of the dart down to it, and a key by which siblings
// sort next to each other, in the order of their visit (for equal keys: by vertex). Cooperative, as
// large_grid_tree_kernel.
__global__ void __launch_bounds__(kMaxBlockThreads, 1)
    large_graph_tree_kernel(const int2* edges, const float* weights, GraphShape shape, int batch, int team_blocks,
                            GridScratch* scratch, unsigned char* workspace, int* parent, int* subtree_size,
                            int* down_ranks, int64_t* sibling_keys) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int team_number = blockIdx.x / team_blocks;
  const int teams = gridDim.x / team_blocks;
  GridTeam team(reinterpret_cast<BlockScratch*>(shared_memory), scratch + team_number, blockIdx.x % team_blocks,
                team_blocks);
  using Memory = GraphMemory<int, uint64_t>;
  const Memory memory(workspace + team_number * Memory(nullptr, shape).bytes, shape);
  for (int graph = team_number; graph < batch; graph += teams) {
    const int64_t offset = static_cast<int64_t>(graph) * shape.vertices;
    const int64_t first_edge = static_cast<int64_t>(graph) * shape.edges;
    const Ranks<uint64_t> ranks = tour_graph(team, memory, shape, edges + first_edge, weights + first_edge);
    for (int i = team.rank(); i < shape.vertices; i += team.size()) {
      const RootedEdge edge(memory.tails, ranks, i);
      const int64_t at_child = offset + edge.child;
      parent[at_child] = edge.above == shape.above_roots() ? edge.child : edge.above;
      subtree_size[at_child] = edge.size;
      down_ranks[at_child] = edge.down_rank;
      sibling_keys[at_child] =
          static_cast<int64_t>(edge.above) << 32 | visit_key(edge.child, edge.above, edge.size, shape);
    }
    team.sync();  // before the next graph overwrites the memory
  }
}

// Where among the sorted siblings of a graph (keys, children) those of each parent start: the sizes before them.
__global__ void sibling_starts_kernel(const int64_t* keys, const int64_t* children, const int64_t* cumulative_sizes,
                                      const int* subtree_size, int64_t batch, int64_t vertices, int64_t* starts) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= batch * vertices) return;
  const int64_t graph = i / vertices;
  const int64_t above = keys[i] >> 32;
  if (i % vertices != 0 && keys[i - 1] >> 32 == above) return;
  starts[graph * (vertices + 1) + above] = cumulative_sizes[i] - subtree_size[graph * vertices + children[i]];
}

// The steps of order_vertices along each graph's tour.
__global__ void sibling_steps_kernel(const int64_t* keys, const int64_t* children, const int64_t* cumulative_sizes,
                                     const int* subtree_size, const int* down_ranks, const int64_t* starts,
                                     int64_t batch, int64_t vertices, int* steps) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= batch * vertices) return;
  const int64_t graph = i / vertices;
  const int64_t child = graph * vertices + children[i];
  const int64_t before = cumulative_sizes[i] - subtree_size[child] - starts[graph * (vertices + 1) + (keys[i] >> 32)];
  const int distance = static_cast<int>(before) + 1;
  const int64_t down = 2 * graph * vertices + down_ranks[child];
  steps[down] = distance;
  steps[down + 2 * subtree_size[child] - 1] = -distance;
}

// The preorder from the sums of the steps. The vertex above the roots has place 0, and is left out.
__global__ void order_kernel(const int* places, const int* down_ranks, int64_t batch, int64_t vertices, int* order) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= batch * vertices) return;
  const int64_t graph = i / vertices;
  const int place = places[2 * graph * vertices + down_ranks[i]] - 1;
  order[graph * vertices + place] = static_cast<int>(i % vertices);
}

// ---------------------------------------------------------------------------------------------------------------- Host

// Integers in the order of the weights. -0 equals 0, all NaN are equal and come last.
__global__ void sort_keys_kernel(const double* weights, int64_t count, int64_t* keys) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const double weight = weights[i];
  const int64_t bits = __double_as_longlong(weight);
  constexpr int64_t kMagnitude = 0x7fffffffffffffff;
  keys[i] = weight != weight ? kMagnitude : weight == 0 ? 0 : bits < 0 ? bits ^ kMagnitude : bits;
}

__global__ void scatter_ranks_kernel(const int64_t* sorted, int64_t count, int64_t edges, int* ranks) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  ranks[i / edges * edges + sorted[i]] = static_cast<int>(i % edges);
}

// Edges in 32 bits, of which no number out of range becomes a vertex.
__global__ void narrow_ends_kernel(const int64_t* ends, int64_t count, int64_t num_vertices, int* narrow) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < count) narrow[i] = ends[i] < 0 || ends[i] >= num_vertices ? -1 : static_cast<int>(ends[i]);
}

constexpr int kElementThreads = 256;

unsigned element_blocks(int64_t count) {
  const int64_t blocks = (count + kElementThreads - 1) / kElementThreads;
  GROOTVL_CHECK(blocks < (int64_t{1} << 31), "a batch of ", count, " vertices or edges is too large");
  return static_cast<unsigned>(blocks);
}

// The sorted rows of a matrix, and where each value was. Equal values keep their order.
std::array<Tensor, 2> sort_rows(const Tensor& matrix) {
  return call<2>("aten::sort", "stable", matrix, std::optional(true), int64_t{1}, false);
}

// The weights as the kernels take them: float32, of which only the order counts. float64 weights become their ranks.
Tensor comparable(const Tensor& weights) {
  const Tensor values = contiguous(weights);
  if (weights.scalar_type() == ScalarType::Float) return values;
  const Tensor keys = empty(values, values.sizes(), ScalarType::Long);
  const Tensor ranks = empty(values, values.sizes(), ScalarType::Int);
  const int64_t count = values.numel();
  if (count > 0) {
    const cudaStream_t stream = current_stream();
    sort_keys_kernel<<<element_blocks(count), kElementThreads, 0, stream>>>(values.const_data_ptr<double>(), count,
                                                                            keys.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor sorted = contiguous(sort_rows(keys)[1]);
    scatter_ranks_kernel<<<element_blocks(count), kElementThreads, 0, stream>>>(
        sorted.const_data_ptr<int64_t>(), count, values.size(1), ranks.mutable_data_ptr<int>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return ranks;  // non-negative integers are in the order of the floats with their bits
}

// Shared memory of a block that builds a tree alone, in memory of so many bytes.
int64_t block_bytes(int64_t memory_bytes) {
  Arena arena(nullptr);
  arena.take<BlockScratch>(1);
  return arena.used() + memory_bytes;
}

// Launches a kernel with a block for each tree. If each block can have a multiprocessor of its own, half of the shared
// memory is enough for that, and leaves the rest to the cache.
template <typename Kernel, typename... Arguments>
void launch_trees(Kernel kernel, int64_t trees, int64_t threads, int64_t shared_bytes, const Arguments&... arguments) {
  const DeviceLimits& limits = current_limits();
  const int64_t half = std::min(limits.shared_of_multiprocessor / 2, limits.shared_of_block);
  shared_bytes =
      trees > limits.multiprocessors ? spread_evenly(trees, kMaxBlocks, shared_bytes) : std::max(half, shared_bytes);
  launch_with_much_shared(kernel, static_cast<unsigned>(trees), static_cast<unsigned>(threads), shared_bytes,
                          current_stream(), arguments...);
}

// How the blocks of a cooperative launch are divided among teams.
struct Teams {
  int count;
  int blocks;  // of each
  int threads() const { return blocks * kMaxBlockThreads; }
};

template <typename Kernel>
Teams plan_teams(Kernel kernel, int64_t batch, int64_t members) {
  int blocks_per_multiprocessor = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel, kMaxBlockThreads,
                                                               sizeof(BlockScratch)));
  const int64_t resident = int64_t{blocks_per_multiprocessor} * current_limits().multiprocessors;
  GROOTVL_CHECK(resident > 0, "the GPU cannot run blocks of ", kMaxBlockThreads, " threads of this kernel");
  const int64_t useful = (members + kMaxBlockThreads - 1) / kMaxBlockThreads;
  const int64_t blocks = std::clamp<int64_t>(resident / batch, 1, std::min<int64_t>(useful, kMaxTeamBlocks));
  return {static_cast<int>(std::min(batch, resident / blocks)), static_cast<int>(blocks)};
}

template <typename Kernel>
void launch_teams(Kernel kernel, const Teams& teams, void** arguments) {
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(teams.count * teams.blocks),
                                             dim3(kMaxBlockThreads), arguments, sizeof(BlockScratch),
                                             current_stream()));
}

Tensor team_scratch(const Teams& teams, const Tensor& like) {
  return zeros(like, {static_cast<int64_t>(teams.count * sizeof(GridScratch))}, ScalarType::Byte);
}

Tensor workspace(int64_t bytes, const Tensor& like) { return empty(like, {bytes}, ScalarType::Byte); }

TreeTensors grid_tree(const Tensor& weights, int64_t height, int64_t width, int64_t root) {
  check_grid(weights, height, width, root);
  const DeviceGuard guard(weights);
  const int64_t batch = weights.size(0);
  const int64_t vertices = height * width;
  GROOTVL_CHECK(batch < (int64_t{1} << 31), "a batch may have up to 2^31 maps, got ", batch);
  const Tensor parent = empty(weights, {batch, vertices}, ScalarType::Int);
  const Tensor order = empty_like(parent), subtree_size = empty_like(parent);
  if (vertices == 1) fill(parent, 0), fill(order, 0), fill(subtree_size, 1);
  if (batch == 0 || vertices == 1) return {parent, order, subtree_size};

  const Tensor keys = comparable(weights);
  const float* key_data = static_cast<const float*>(keys.const_data_ptr());
  int* parent_data = parent.mutable_data_ptr<int>();
  int* order_data = order.mutable_data_ptr<int>();
  int* size_data = subtree_size.mutable_data_ptr<int>();

  // As few threads as process the vertices in the same number of turns, since fewer threads synchronise faster.
  const int64_t turns = (vertices + kMaxBlockThreads - 1) / kMaxBlockThreads;
  const int64_t threads = ((vertices + turns - 1) / turns + kWarpLanes - 1) / kWarpLanes * kWarpLanes;
  GridShape shape{static_cast<int>(height), static_cast<int>(width), static_cast<int>(root), 0};
  shape.shift = bin_shift(vertices, threads);
  const int64_t shared_bytes = block_bytes(GridMemory<uint16_t, uint32_t>(nullptr, shape, true).bytes);
  constexpr int64_t kLargest16Bit = 16384;  // darts are counted in the lower half of a 32-bit word
  if (vertices <= kLargest16Bit && shared_bytes <= current_limits().shared_of_block) {
    launch_trees(small_grid_tree_kernel, batch, threads, shared_bytes, key_data, shape, parent_data, order_data,
                 size_data);
    return {parent, order, subtree_size};
  }

  const Teams teams = plan_teams(large_grid_tree_kernel, batch, vertices);
  shape.shift = bin_shift(vertices, teams.threads());
  const int64_t bytes = GridMemory<int, uint64_t>(nullptr, shape, false).bytes;
  const Tensor scratch = team_scratch(teams, weights);
  const Tensor memory = workspace(teams.count * bytes, weights);
  int batch_argument = static_cast<int>(batch);
  int team_blocks = teams.blocks;
  auto* scratch_data = reinterpret_cast<GridScratch*>(scratch.mutable_data_ptr());
  auto* memory_data = reinterpret_cast<unsigned char*>(memory.mutable_data_ptr());
  void* arguments[] = {&key_data,    &shape,       &batch_argument, &team_blocks, &scratch_data,
                       &memory_data, &parent_data, &order_data,     &size_data};
  launch_teams(large_grid_tree_kernel, teams, arguments);
  return {parent, order, subtree_size};
}

// The most vertices or edges of a graph that one block builds, 16 for each thread, and the most darts, which it counts
// in the lower half of a 32-bit word.
constexpr int64_t kSmallGraph = 16 * kMaxBlockThreads, kMaxSmallDarts = INT16_MAX;

TreeTensors graph_tree(const Tensor& edges, const Tensor& weights, int64_t num_vertices, int64_t root) {
  check_graph(edges, weights, num_vertices, root);
  const DeviceGuard guard(weights);
  const int64_t batch = weights.size(0);
  GROOTVL_CHECK(batch < (int64_t{1} << 31), "a batch may have up to 2^31 graphs, got ", batch);
  const Tensor parent = empty(weights, {batch, num_vertices}, ScalarType::Int);
  const Tensor order = empty_like(parent), subtree_size = empty_like(parent);
  if (batch == 0) return {parent, order, subtree_size};

  const Tensor keys = comparable(weights);
  Tensor ends = contiguous(edges);
  if (edges.scalar_type() == ScalarType::Long) {
    const Tensor narrow = empty(ends, ends.sizes(), ScalarType::Int);
    if (ends.numel() > 0) {
      narrow_ends_kernel<<<element_blocks(ends.numel()), kElementThreads, 0, current_stream()>>>(
          ends.const_data_ptr<int64_t>(), ends.numel(), num_vertices, narrow.mutable_data_ptr<int>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    ends = narrow;
  }
  // The kernel loads both ends of an edge at once.
  if (!is_aligned(ends.const_data_ptr(), sizeof(int2))) ends = clone(ends);
  const auto* edge_data = reinterpret_cast<const int2*>(ends.const_data_ptr<int>());
  const float* key_data = static_cast<const float*>(keys.const_data_ptr());
  int* parent_data = parent.mutable_data_ptr<int>();
  int* size_data = subtree_size.mutable_data_ptr<int>();
  GraphShape shape{static_cast<int>(num_vertices), static_cast<int>(weights.size(1)), static_cast<int>(root), 0};
  const int64_t members = std::max(num_vertices, weights.size(1));

  const int64_t threads = std::min<int64_t>((members + kWarpLanes - 1) / kWarpLanes * kWarpLanes, kMaxBlockThreads);
  shape.shift = bin_shift(shape.darts(), threads);
  const int64_t shared_bytes = block_bytes(GraphMemory<uint16_t, uint32_t>(nullptr, shape).bytes);
  if (members <= kSmallGraph && shape.darts() <= kMaxSmallDarts && shared_bytes <= current_limits().shared_of_block) {
    launch_trees(small_graph_tree_kernel, batch, threads, shared_bytes, edge_data, key_data, shape, parent_data,
                 order.mutable_data_ptr<int>(), size_data);
    return {parent, order, subtree_size};
  }

  const Tensor down_ranks = empty_like(parent);
  const Tensor sibling_keys = empty(parent, parent.sizes(), ScalarType::Long);
  const Teams teams = plan_teams(large_graph_tree_kernel, batch, members);
  shape.shift = bin_shift(shape.darts(), teams.threads());
  const int64_t bytes = GraphMemory<int, uint64_t>(nullptr, shape).bytes;
  const Tensor scratch = team_scratch(teams, weights);
  const Tensor memory = workspace(teams.count * bytes, weights);
  int batch_argument = static_cast<int>(batch);
  int team_blocks = teams.blocks;
  auto* scratch_data = reinterpret_cast<GridScratch*>(scratch.mutable_data_ptr());
  auto* memory_data = reinterpret_cast<unsigned char*>(memory.mutable_data_ptr());
  int* rank_data = down_ranks.mutable_data_ptr<int>();
  int64_t* sibling_data = sibling_keys.mutable_data_ptr<int64_t>();
  void* arguments[] = {&edge_data,   &key_data,    &shape,     &batch_argument, &team_blocks, &scratch_data,
                       &memory_data, &parent_data, &size_data, &rank_data,      &sibling_data};
  launch_teams(large_graph_tree_kernel, teams, arguments);

  const auto [sorted_keys, children] = sort_rows(sibling_keys);
  const Tensor sizes = call("aten::gather", "", subtree_size, int64_t{1}, children, false);
  const Tensor cumulative_sizes = cumsum(sizes, 1, ScalarType::Long);
  const Tensor starts = empty(parent, {batch, num_vertices + 1}, ScalarType::Long);
  const Tensor steps = empty(parent, {batch, 2 * num_vertices}, ScalarType::Int);
  const int64_t count = batch * num_vertices;
  const cudaStream_t stream = current_stream();
  sibling_starts_kernel<<<element_blocks(count), kElementThreads, 0, stream>>>(
      sorted_keys.const_data_ptr<int64_t>(), children.const_data_ptr<int64_t>(),
      cumulative_sizes.const_data_ptr<int64_t>(), size_data, batch, num_vertices, starts.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sibling_steps_kernel<<<element_blocks(count), kElementThreads, 0, stream>>>(
      sorted_keys.const_data_ptr<int64_t>(), children.const_data_ptr<int64_t>(),
      cumulative_sizes.const_data_ptr<int64_t>(), size_data, rank_data, starts.const_data_ptr<int64_t>(), batch,
      num_vertices, steps.mutable_data_ptr<int>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor places = cumsum(steps, 1, ScalarType::Int);
  order_kernel<<<element_blocks(count), kElementThreads, 0, stream>>>(places.const_data_ptr<int>(), rank_data, batch,
                                                                      num_vertices, order.mutable_data_ptr<int>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {parent, order, subtree_size};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("grid_tree", TORCH_BOX(&grid_tree));
  m.impl("graph_tree", TORCH_BOX(&graph_tree));
}

}  // namespace grootvl
