// The sums that are pending during a walk.
#pragma once

#include "../common/assert.cuh"
#include "ring.cuh"

namespace grootvl {

// One warp for each block: larger blocks would leave some multiprocessors idle.
constexpr int kWalkThreads = kWarpLanes;

// A stack of sums for each lane: the top in a register, the others in shared memory. Each operation is done if the
// vertex, `node`, has kFlag. A walk decides at every row whether to push or to pop, so these have no branches. A valid
// tree stays within the capacity; for a damaged one there is room for a tile of pushes or pops on either side, and
// `stay_inside` between the tiles.
template <typename acc_t>
class Stack {
 public:
  // The stack of this thread for an operand.
  __device__ Stack(int operand, int capacity)
      : first_(shared_address() + ((operand * (capacity + 2 * kTileRows) + kTileRows) * kWalkThreads + threadIdx.x) *
                                      uint32_t(sizeof(acc_t))),
        last_(first_ + (capacity - 1) * kStep) {
    clear();
  }

  template <uint32_t kFlag>
  __device__ __forceinline__ void push_if(uint32_t node, acc_t value) {
    predicated_push<kFlag, kStep>(node, top_, next_, value);
  }
  // Pushes `value`, or else adds it to `sum`.
  template <uint32_t kFlag>
  __device__ __forceinline__ void push_or_add(uint32_t node, acc_t value, acc_t& sum) {
    predicated_push_or_add<kFlag, kStep>(node, top_, next_, value, sum);
  }
  // Pops into `value`.
  template <uint32_t kFlag>
  __device__ __forceinline__ void pop_if(uint32_t node, acc_t& value) {
    predicated_pop<kFlag, kStep>(node, top_, next_, value);
  }
  // Pops, and adds what is popped to `sum`.
  template <uint32_t kFlag>
  __device__ __forceinline__ void pop_and_add(uint32_t node, acc_t& sum) {
    predicated_pop_and_add<kFlag, kStep>(node, top_, next_, sum);
  }

  __device__ __forceinline__ void stay_inside() {
    // The end of a run may pop what an earlier run pushed, a value that nothing uses.
    GROOTVL_ASSERT(next_ + kStep >= first_ && next_ <= last_);
    next_ = min(max(next_, first_), last_);
  }
  __device__ void clear() { next_ = first_; }

 private:
  static constexpr uint32_t kStep = kWalkThreads * sizeof(acc_t);
  uint32_t first_, last_, next_;  // addresses in shared memory
  acc_t top_ = 0;
};

// Entries of a stack for trees of a size: the pending sums, the one that an empty stack holds, and one to spare.
inline int stack_capacity(int64_t num_vertices) {
  int capacity = 3;
  while ((int64_t{1} << (capacity - 3)) < num_vertices) ++capacity;
  return capacity;
}

// Shared memory of the stacks of a block.
template <typename acc_t>
__host__ __device__ inline uint32_t stack_bytes(int operands, int capacity) {
  return sizeof(acc_t) * operands * (capacity + 2 * kTileRows) * kWalkThreads;
}

}  // namespace grootvl
