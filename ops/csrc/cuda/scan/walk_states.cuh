// How a warp walks a run for many states of a state space model at once: selective scans of one x, of which only the
// weighed sum y = sum_s C_s h_s is asked for (scan.cuh).
//
// A lane has one channel and kLaneStates neighbouring states of it, so that a row's values are read, and its step size
// computed, once for all of them, and no state goes through memory. kGroups groups of lanes have different states of
// the same kWarpLanes / kGroups channels:
//
//     kGroups = 4    8 channels, 16 states: lane = 8 group + channel
//     kGroups = 1    32 channels, 4 states
//
// What all groups need of a row is loaded and computed by one of them, and handed to the others by shuffles: of each
// tile of kTileRows rows a group *owns* kTileRows / kGroups, one after the other. It also adds up, and writes, what the
// groups have for these rows. Rows are loaded into registers one tile ahead of their use, nodes one slot ahead.
#pragma once

#include "discretise.cuh"
#include "plan.cuh"
#include "ring.cuh"

namespace grootvl {

constexpr int kLaneStates = 4;

template <typename acc_t>
using States = acc_t[kLaneStates];

// The groups of lanes for so many states, and how many states a warp then has.
constexpr int state_groups(int64_t states) { return states <= kLaneStates ? 1 : 4; }
constexpr int warp_states(int groups) { return groups * kLaneStates; }

// The run, channel and states of a lane. The states are split into parts of warp_states(kGroups); the last part is
// filled up with copies of the last state that have no weights. RunData and `kept` have room for them.
template <int kGroups>
struct StateItem {
  static constexpr int kChannels = kWarpLanes / kGroups, kStates = warp_states(kGroups), kOwnRows = kTileRows / kGroups;

  int group, lane_channel;
  int channel;
  unsigned channel_group, channel_groups;  // number of the warp's group of kChannels channels, and of all
  int image, first_state, states;
  int64_t map;                   // in (parts of the states, batch)
  int64_t rows, tree_rows;       // first row of the image in (batch, L), and of its tree in (trees, L)
  int64_t column, map_column;    // the channel in those rows of (batch, L, D), and in those of (parts, batch, L, D)
  int64_t at_run, state_stride;  // of run and channel in (states, batch, runs, D), and from one state to the next
  int begin, end;
  bool valid;   // there is such a run
  bool active;  // and such a channel

  template <typename T, typename acc_t>
  __device__ StateItem(const ScanData<T, acc_t>& data, const Plan& plan, int states) : states(states) {
    channel_groups = (data.channels + kChannels - 1) / kChannels;
    const unsigned run = blockIdx.x / channel_groups % plan.runs.capacity;
    map = blockIdx.x / channel_groups / plan.runs.capacity;
    image = map % data.batch;
    group = threadIdx.x / kChannels, lane_channel = threadIdx.x % kChannels;
    first_state = map / data.batch * kStates + group * kLaneStates;
    channel_group = blockIdx.x % channel_groups;
    channel = channel_group * kChannels + lane_channel;
    active = channel < data.channels;
    channel = min(channel, data.channels - 1);  // idle lanes read with the others, and write nothing
    const int64_t tree = data.tree_of(image);
    rows = int64_t(image) * data.num_vertices;
    tree_rows = tree * data.num_vertices;
    column = rows * data.channels + channel;
    map_column = map * data.num_vertices * data.channels + channel;
    state_stride = int64_t(data.batch) * plan.runs.capacity * data.channels;
    at_run = first_state * state_stride + (int64_t(image) * plan.runs.capacity + run) * data.channels + channel;
    valid = run < plan.runs.count(tree);
    begin = 0, end = data.num_vertices;
    if (!valid || !plan.runs.several()) return;
    begin = plan.runs.begin(tree, run);
    end = plan.runs.end[tree * plan.runs.capacity + run];
  }

  // The value that the group which owns row j of a tile has for it, in each lane.
  template <typename acc_t>
  __device__ __forceinline__ acc_t of_row(const acc_t (&own)[kOwnRows], int j) const {
    if constexpr (kGroups == 1) return own[j];
    return __shfl_sync(kAllLanes, own[j % kOwnRows], lane_channel + j / kOwnRows * kChannels);
  }
  // The sums over the groups of a value for each row of a tile: those of the rows that this group owns.
  template <typename acc_t>
  __device__ __forceinline__ void sum_groups(acc_t (&values)[kTileRows], acc_t (&own)[kOwnRows]) const {
    scatter_sums<kOwnRows>(values, kWarpLanes / 2);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) own[i] = values[i];
  }
  template <typename acc_t>
  __device__ __forceinline__ acc_t sum_groups(acc_t value) const {
#pragma unroll
    for (int distance = kChannels; distance < kWarpLanes; distance *= 2) {
      value += __shfl_xor_sync(kAllLanes, value, distance);
    }
    return value;
  }
};

// The decay of each state, exp(-exp(A_log) delta), as a power of 2.
template <typename acc_t>
struct StateDecays {
  States<acc_t> rates;

  template <typename T, int kGroups>
  __device__ StateDecays(const ScanData<T, acc_t>& data, const StateItem<kGroups>& item) {
#pragma unroll
    for (int s = 0; s < kLaneStates; ++s) {
      const int64_t state = min(item.first_state + s, item.states - 1);
      rates[s] = -exp(data.A_log[state * data.channels + item.channel]) / kLog2;
    }
  }
  __device__ __forceinline__ acc_t operator()(int s, acc_t delta) const { return power_of_2(delta * rates[s]); }

  static constexpr acc_t kLog2 = 0.693147180559945309;  // log(2): what the rates are to be multiplied by for base e

 private:
  __device__ static __forceinline__ float power_of_2(float x) { return exp2_without_denormals(x); }
  __device__ static __forceinline__ double power_of_2(double x) { return exp2(x); }
};

// The map of the decays' own step sizes, or null.
template <int kGroups, typename T, typename acc_t>
__device__ __forceinline__ const T* own_steps(const ScanData<T, acc_t>& data, const StateItem<kGroups>& item) {
  return data.decay_raw_delta == nullptr ? nullptr : data.decay_raw_delta + item.column;
}

// The step sizes of a row's input and of its decays.
template <typename acc_t>
struct Steps {
  Softplus<acc_t> input, decay;

  __device__ __forceinline__ Steps(acc_t raw_delta, acc_t raw_decay_delta, acc_t bias, bool own_steps)
      : input(softplus(raw_delta + bias)), decay(input) {
    if (own_steps) decay = softplus(raw_decay_delta + bias);
  }
};

// Pending sums as in stack.cuh, of all states of a lane, which push and pop together: behind a branch, since in a tree
// of text few vertices do, and in a chain none.
template <typename acc_t>
class StateStack {
 public:
  __device__ StateStack(acc_t* memory, int capacity)
      : first_(memory + threadIdx.x * kLaneStates), last_(capacity - 1) {}

  // A valid tree stays within the capacity.
  __device__ __forceinline__ void push(const States<acc_t>& values) {
    store(first_ + depth_ * kStep, values);
    GROOTVL_ASSERT(depth_ < last_);
    depth_ = min(depth_ + 1, last_);
  }
  // The end of a run may pop what an earlier run pushed, a value that nothing uses.
  __device__ __forceinline__ void pop(States<acc_t>& values) {
    depth_ = max(depth_ - 1, 0);
    unpack(values, load<kLaneStates>(first_ + depth_ * kStep));
  }

 private:
  static constexpr int kStep = kWarpLanes * kLaneStates;
  acc_t* first_;
  int last_, depth_ = 0;
};

// Values of shared memory that a walk needs for each kind of weights, and for its stack.
constexpr int weights_size(int groups) { return kTileRows * warp_states(groups); }
constexpr int stack_size(int capacity) { return capacity * kWarpLanes * kLaneStates; }

// What a walk over states is to do with a run.
//
// For each tile it calls `begin(values)` with what this lane has loaded of the kMaps `maps` (pointers to the lane's
// channel, of which the last may be null) for the rows that its group owns; `visit(node, j, weights)` for every row in
// turn, with the weights of this lane's states of kKinds kinds; and `finish(nodes)`, with the nodes of the rows that
// the group owns. `prefetch(nodes, lane)` is called a tile ahead: the lanes from `lane` on have the nodes of the next
// tile. As in walk.cuh, the last tile is filled up with copies of the last row that are marked kPast.
template <Sweep sweep, int kMaps, int kKinds, int kGroups, typename T, typename acc_t, typename Prefetch,
          typename Begin, typename Visit, typename Finish>
__device__ __forceinline__ void walk_states(const ScanData<T, acc_t>& data, const Plan& plan,
                                            const StateItem<kGroups>& item, const T* const (&maps)[kMaps],
                                            const PixelWeights<T> (&weights)[kKinds], acc_t* memory, Prefetch prefetch,
                                            Begin begin, Visit visit, Finish finish) {
  using Item = StateItem<kGroups>;
  constexpr int kStates = Item::kStates, kOwnRows = Item::kOwnRows;
  // A lane loads the weights of one state, for every kLoadedRows-th row of a tile.
  constexpr int kLoadedRows = kWarpLanes / kStates, kLoads = kTileRows / kLoadedRows;
  const int lane = threadIdx.x, count = item.end - item.begin, last = count - 1;
  const uint32_t* nodes = plan.nodes + item.tree_rows + item.begin;
  const uint32_t row_bytes = data.channels * sizeof(T);
  const int loaded_state = item.map / data.batch * kStates + lane % kStates;
  const bool has_state = loaded_state < item.states;
  const T* columns[kKinds];
  uint32_t weight_bytes[kKinds];
#pragma unroll
  for (int k = 0; k < kKinds; ++k) {
    columns[k] = weights[k].of(min(loaded_state, item.states - 1), item.rows);
    weight_bytes[k] = uint32_t(weights[k].vertex_stride * sizeof(T));
  }
  const auto node_at = [&](int i) {
    const uint32_t node = nodes[sweep == Sweep::kUp ? min(i, last) : last - min(i, last)];
    return i > last ? (node & kVertexMask) | kPast : node;
  };
  T values[kMaps][kOwnRows], loaded[kKinds][kLoads];
  uint32_t own_nodes[kOwnRows];
  // Of the tile whose nodes the lanes from `first` on have in `from`.
  const auto load_tile = [&](uint32_t from, int first) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      own_nodes[i] = __shfl_sync(kAllLanes, from, first + item.group * kOwnRows + i);
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        if (m == kMaps - 1 && maps[m] == nullptr) continue;
        values[m][i] = at_vertex(maps[m], own_nodes[i] & kVertexMask, row_bytes);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t node = __shfl_sync(kAllLanes, from, first + i * kLoadedRows + lane / kStates);
#pragma unroll
      for (int k = 0; k < kKinds; ++k) {
        loaded[k][i] = has_state ? at_vertex(columns[k], node & kVertexMask, weight_bytes[k]) : T(0);
      }
    }
    prefetch(from, first);
  };

  uint32_t slot_nodes = node_at(lane), next_nodes = node_at(kSlotRows + lane);
  load_tile(slot_nodes, 0);
#pragma unroll 1
  for (int first = 0; first < count; first += kTileRows) {
    const int in_slot = first % kSlotRows, next_in_slot = (in_slot + kTileRows) % kSlotRows;
    uint32_t tile_nodes[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) tile_nodes[i] = own_nodes[i];
    begin(values);
    __syncwarp();  // all lanes have read the weights of the tile before
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        memory[(k * kTileRows + i * kLoadedRows) * kStates + lane] = static_cast<acc_t>(loaded[k][i]);
      }
    }
    __syncwarp();
    if (first + kTileRows < count) load_tile(next_in_slot == 0 ? next_nodes : slot_nodes, next_in_slot);
#pragma unroll
    for (int j = 0; j < kTileRows; ++j) {
      States<acc_t> row_weights[kKinds];
#pragma unroll
      for (int k = 0; k < kKinds; ++k) {
        unpack(row_weights[k], load<kLaneStates>(memory + (k * kTileRows + j) * kStates + item.group * kLaneStates));
      }
      visit(__shfl_sync(kAllLanes, slot_nodes, in_slot + j), j, row_weights);
    }
    finish(tile_nodes);
    if (next_in_slot == 0) slot_nodes = next_nodes, next_nodes = node_at(first + kTileRows + kSlotRows + lane);
  }
}

}  // namespace grootvl
