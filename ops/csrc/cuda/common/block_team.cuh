// What the threads of a block do together.
#pragma once

#include "warp.cuh"

namespace grootvl {

// What the threads of a block need in shared memory to work as a team.
struct BlockScratch {
  int sums[3];
  int warps[kMaxBlockThreads / kWarpLanes];
};

// All threads of one block, a whole number of warps. Every thread has to call each collective operation.
class BlockTeam {
 public:
  __device__ explicit BlockTeam(BlockScratch* scratch) : scratch_(scratch) {
    if (threadIdx.x == 0) scratch_->sums[0] = 0;
    __syncthreads();
  }

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }

  // What a thread of the team wrote before is seen by all of them afterwards.
  __device__ void sync() { __syncthreads(); }

  // The sum of all threads' values; also a sync().
  __device__ int sync_sum(int value) {
    // Three slots: while this one is read, slower threads may still read the last one, and the next has to be zero.
    const int slot = slot_;
    slot_ = slot == 2 ? 0 : slot + 1;
    value = warp_sum(value);
    if (threadIdx.x % kWarpLanes == 0 && value != 0) atomicAdd(&scratch_->sums[slot], value);
    if (threadIdx.x == 0) scratch_->sums[slot_] = 0;
    __syncthreads();
    return scratch_->sums[slot];
  }

  // The sum of the values of all threads of lower rank; `total` gets the sum of all.
  __device__ int exclusive_sum(int value, int& total) {
    const int lane = threadIdx.x % kWarpLanes;
    const int warp = threadIdx.x / kWarpLanes;
    int inclusive = value;
    for (int offset = 1; offset < kWarpLanes; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, inclusive, offset);
      if (lane >= offset) inclusive += before;
    }
    __syncthreads();  // an earlier call's sums may still be read
    if (lane == kWarpLanes - 1) scratch_->warps[warp] = inclusive;
    __syncthreads();
    const int warp_total = lane < static_cast<int>(blockDim.x) / kWarpLanes ? scratch_->warps[lane] : 0;
    total = warp_sum(warp_total);
    return warp_sum(lane < warp ? warp_total : 0) + inclusive - value;
  }

  __device__ int exclusive_sum(int value) {
    int total;
    return exclusive_sum(value, total);
  }

 private:
  BlockScratch* scratch_;
  int slot_ = 0;
};

}  // namespace grootvl
