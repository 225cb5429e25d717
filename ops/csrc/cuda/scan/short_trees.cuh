// The scan "both" of few short trees by one kernel, in which nothing passes through memory but the operands and the
// result (scan.cuh).
//
// Where few warps would walk, a row takes as long as the longest chain of its instructions. Here a block has a tree and
// 16 channels. All of its threads compute, into shared memory, what does not depend on other rows. A walk is left with
// the recurrences, of which each step is a choice and a multiplication with addition. With s_t what the vertex in row t
// of the postorder and its larger siblings pass on to their parent, and n_t the size of its subtree:
//
//     up:    s_t = a_t x_t + a_t s_(t-1)                 the row before is v's last child; of a leaf, this term is 0
//                          + s_(t-n_t)                   if v has larger siblings, which come before its subtree
//     then   u_t = x_t + s_(t-1)                         or x_t for a leaf
//     down:  h_t = (1 - a_t^2) u_t + a_t h_parent        the parent is in the next row, or further on
//
// It needs no stack: all rows are in shared memory, so s_(t-n_t) and h_parent are read where they are, at the beginning
// of a tile of rows, or chosen among the registers of the tile. A row loads nothing itself: whether or not it needed
// the value, the next row would wait for the load.
#pragma once

#include "../common/arena.cuh"
#include "walk.cuh"

namespace grootvl {

constexpr int kShortTreeWarps = 16, kShortTreeThreads = kShortTreeWarps * kWarpLanes;
constexpr int kShortTreeChannels = 16;
constexpr int kShortTreeRowsAtOnce = kShortTreeThreads / kShortTreeChannels;

// What a walk must know of a row, in one word: another row whose value it may need, and flags.
constexpr int kShortTreeRows = 1 << 8;
constexpr uint32_t kElsewhere = kShortTreeRows - 1;
constexpr uint32_t kInTile = 1u << 16;  // times 2^d: that row is d rows before this one in the walk, in the same tile
constexpr uint32_t kReadsElsewhere = 1u << 24;  // the walk needs the value
constexpr uint32_t kBegins = 1u << 25;          // up: a leaf without larger siblings; down: a root
constexpr uint32_t kAddsBefore = 1u << 26;      // up: a leaf whose larger siblings end in the row before
static_assert(kTileRows <= 8);

__host__ __device__ constexpr int whole_tiles(int64_t length) {
  return static_cast<int>((length + kTileRows - 1) / kTileRows * kTileRows);
}

// The shared memory of a block.
template <typename acc_t>
struct ShortTreeMemory {
  struct __align__(2 * sizeof(acc_t)) Pair {
    acc_t decay, own;  // x, or for the walk down (1 - a^2) u
  };
  uint16_t* row_of;               // (L): of each vertex
  uint16_t* parent_rows;          // (rows)
  uint32_t *rows_up, *rows_down;  // (rows): the words of the walks
  Pair* pairs;                    // (rows, channels)
  acc_t* values;                  // (rows, channels): s, then h
  int64_t bytes;

  __host__ __device__ ShortTreeMemory(unsigned char* memory, int64_t length) {
    const int64_t count = whole_tiles(length);
    Arena arena(memory);
    row_of = arena.take<uint16_t>(length);
    parent_rows = arena.take<uint16_t>(count);
    rows_up = arena.take<uint32_t>(count);
    rows_down = arena.take<uint32_t>(count);
    pairs = arena.take<Pair>(count * kShortTreeChannels);
    values = arena.take<acc_t>(count * kShortTreeChannels);
    bytes = arena.used();
  }
};

// The tree and the channel of a thread.
template <typename T, typename acc_t>
struct ShortTreeItem {
  int scan, channel;
  int64_t rows, tree_rows, column, map_column;  // as in RunItem
  bool active;                                  // there is such a channel

  __device__ explicit ShortTreeItem(const ScanData<T, acc_t>& data) {
    const unsigned groups = (data.channels + kShortTreeChannels - 1) / kShortTreeChannels;
    const unsigned map = blockIdx.x / groups;
    scan = map / data.batch;
    channel = blockIdx.x % groups * kShortTreeChannels + threadIdx.x % kShortTreeChannels;
    active = channel < data.channels;
    channel = min(channel, data.channels - 1);  // idle threads read with the others, and write nothing
    rows = int64_t(map % data.batch) * data.num_vertices;
    tree_rows = int64_t(data.tree_of(map)) * data.num_vertices;
    column = rows * data.channels + channel;
    map_column = int64_t(map) * data.num_vertices * data.channels + channel;
  }
};

// The word of a row in tile place `place`, counted as the walk goes, which needs the value of `row`, so many rows
// before it. In a damaged tree the distance may be negative.
__device__ __forceinline__ uint32_t reads_elsewhere(int row, int place, int distance) {
  return row | kReadsElsewhere | (unsigned(distance) <= unsigned(place) ? kInTile << distance : 0);
}

// One of the two walks. Each row, of which `rows` has the words, gets `step(word, decay, own, before, elsewhere)`,
// where `before` is the result of the row before in the walk, and `elsewhere` that of the row that the word names.
template <Sweep sweep, typename acc_t, typename Step>
__device__ __forceinline__ void walk_short_tree(const ShortTreeMemory<acc_t>& memory, const uint32_t* rows,
                                                int num_rows, Step step) {
  using Pair = typename ShortTreeMemory<acc_t>::Pair;
  const Pair* pairs = memory.pairs + threadIdx.x;
  acc_t* values = memory.values + threadIdx.x;
  const auto row_of = [&](int tile, int i) {
    const int t = tile * kTileRows + i;
    return sweep == Sweep::kUp ? t : num_rows - 1 - t;
  };
  uint32_t next_words[kTileRows];
  Pair next_pairs[kTileRows];
  const auto load = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      next_words[i] = rows[row_of(tile, i)];
      next_pairs[i] = pairs[row_of(tile, i) * kShortTreeChannels];
    }
  };
  const int tiles = num_rows / kTileRows;
  load(0);
  acc_t before = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    uint32_t words[kTileRows];
    Pair own[kTileRows];
    acc_t elsewhere[kTileRows], results[kTileRows];
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      words[i] = next_words[i], own[i] = next_pairs[i];
      elsewhere[i] = values[(words[i] & kElsewhere) * kShortTreeChannels];
    }
    if (tile + 1 < tiles) load(tile + 1);
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
#pragma unroll
      for (int distance = 2; distance <= i; ++distance) {
        if (words[i] & kInTile << distance) elsewhere[i] = results[i - distance];
      }
      before = results[i] = step(words[i], own[i].decay, own[i].own, before, elsewhere[i]);
      values[row_of(tile, i) * kShortTreeChannels] = before;
    }
  }
}

template <bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kShortTreeThreads) scan_short_trees(ScanData<T, acc_t> data) {
  await_kernels_before();
  const ShortTreeItem item(data);
  const int length = data.num_vertices, num_rows = whole_tiles(length);
  const ShortTreeMemory<acc_t> memory(shared_memory, length);
  const uint32_t row_bytes = data.channels * sizeof(T);
  const int of_channel = threadIdx.x % kShortTreeChannels, first_of_thread = threadIdx.x / kShortTreeChannels;
  const auto at = [&](int row) { return row * kShortTreeChannels + of_channel; };

  // The operands of some vertices, loaded before anything is known of the tree.
  constexpr int kAtOnce = 4;
  const auto discretise = discretisation<kSelective>(data, item);
  const T *steps = decay_or_raw_delta(data, item), *x = data.x + item.column;
  const T* input_weights = data.input_weight.of(item.scan, item.rows);
  const uint32_t weight_bytes = data.input_weight.vertex_stride * sizeof(T);
  T step[kAtOnce], own[kAtOnce], weight[kAtOnce];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const uint32_t vertex = min(first + j * kShortTreeRowsAtOnce, length - 1);
      step[j] = at_vertex(steps, vertex, row_bytes);
      own[j] = at_vertex(x, vertex, row_bytes);
      if constexpr (kSelective) weight[j] = at_vertex(input_weights, vertex, weight_bytes);
    }
  };
  load(first_of_thread);

  // The rows. A damaged tree must not lead outside of the arrays.
  const int32_t *order = data.order + item.tree_rows, *parent = data.parent + item.tree_rows;
  const int32_t* subtree_size = data.subtree_size + item.tree_rows;
  const unsigned last = length - 1;
  const auto vertex_in = [&](int row) { return min(unsigned(order[last - row]), last); };
  const auto row_of = [&](unsigned vertex) { return min(unsigned(memory.row_of[min(vertex, last)]), last); };
  for (int row = threadIdx.x; row < length; row += kShortTreeThreads) memory.row_of[vertex_in(row)] = row;
  __syncthreads();
  for (int row = threadIdx.x; row < num_rows; row += kShortTreeThreads) {
    memory.parent_rows[row] = row < length ? row_of(parent[vertex_in(row)]) : row;
  }
  for (int first = first_of_thread;;) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int vertex = first + j * kShortTreeRowsAtOnce;
      if (vertex >= length) break;
      acc_t decay = static_cast<acc_t>(step[j]), value = static_cast<acc_t>(own[j]);
      if constexpr (kSelective) {
        const auto discrete = discretise(decay);
        decay = discrete.decay;
        value *= discrete.delta * static_cast<acc_t>(weight[j]);
      }
      memory.pairs[at(row_of(vertex))] = {decay, value};
    }
    first += kAtOnce * kShortTreeRowsAtOnce;
    if (first >= length) break;
    load(first);
  }
  for (int row = length + first_of_thread; row < num_rows; row += kShortTreeRowsAtOnce) memory.pairs[at(row)] = {0, 0};
  __syncthreads();
  for (int row = threadIdx.x; row < num_rows; row += kShortTreeThreads) {
    const int place = row % kTileRows, parent_row = memory.parent_rows[row];
    const int size = row < length ? min(max(subtree_size[vertex_in(row)], 1), row + 1) : 1, before = row - size;
    GROOTVL_ASSERT(row >= length || (size == subtree_size[vertex_in(row)] && parent_row >= row));
    const bool root = parent_row == row, larger = !root && before >= 0 && memory.parent_rows[before] == parent_row;
    memory.rows_up[row] = size == 1 ? (larger ? kAddsBefore : kBegins)
                          : larger  ? reads_elsewhere(before, place, size)
                                    : 0;
    memory.rows_down[row] = root ? kBegins
                            : parent_row == row + 1
                                ? 0
                                : reads_elsewhere(parent_row, kTileRows - 1 - place, parent_row - row);
  }
  __syncthreads();

  const bool walks = threadIdx.x < kShortTreeChannels;
  if (walks) {
    walk_short_tree<Sweep::kUp>(memory, memory.rows_up, num_rows,
                                [](uint32_t word, acc_t decay, acc_t x, acc_t before, acc_t larger) {
                                  acc_t sum = decay * x;
                                  if (word & kReadsElsewhere) sum += larger;
                                  if (word & kBegins) before = 0;
                                  return (word & kAddsBefore ? acc_t(1) : decay) * before + sum;
                                });
  }
  __syncthreads();
  for (int row = first_of_thread; row < length; row += kShortTreeRowsAtOnce) {
    auto& pair = memory.pairs[at(row)];
    const bool leaf = memory.rows_up[row] & (kBegins | kAddsBefore), root = memory.rows_down[row] & kBegins;
    const acc_t u = leaf ? pair.own : pair.own + memory.values[at(row - 1)];
    pair = {root ? acc_t(0) : pair.decay, root ? u : u - pair.decay * (pair.decay * u)};
  }
  __syncthreads();
  if (walks) {
    walk_short_tree<Sweep::kDown>(memory, memory.rows_down, num_rows,
                                  [](uint32_t word, acc_t decay, acc_t own, acc_t before, acc_t h_parent) {
                                    if (word & kReadsElsewhere) before = h_parent;
                                    if (word & kBegins) before = 0;
                                    return decay * before + own;
                                  });
  }
  __syncthreads();
  if (!item.active) return;
  T* out = data.out + item.map_column;
  for (int vertex = first_of_thread; vertex < length; vertex += kShortTreeRowsAtOnce) {
    at_vertex(out, vertex, row_bytes) = static_cast<T>(memory.values[at(row_of(vertex))]);
  }
}

}  // namespace grootvl
