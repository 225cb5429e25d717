// The threads that build one tree together: a block, with its data in shared memory, or several blocks, with their data
// in global memory. Both offer the same few collective operations, so that the tree algorithms are written once.

#pragma once

#include "../common/block_team.cuh"
#include "../common/ptx.cuh"

namespace grootvl {

constexpr int kMaxTeamBlocks = 2044;  // more than one GPU holds at once

// What the blocks of a team need in global memory, zeroed before the launch.
struct alignas(128) GridScratch {
  unsigned arrived;
  int sums[3];
  int blocks[kMaxTeamBlocks];  // the blocks' sums in exclusive_sum
};

// `blocks` consecutive blocks of a cooperative launch (only there do all of them run at the same time, so that they can
// wait for each other).
class GridTeam {
 public:
  __device__ GridTeam(BlockScratch* block_scratch, GridScratch* scratch, int block, int blocks)
      : block_team_(block_scratch), scratch_(scratch), block_(block), blocks_(blocks) {}

  __device__ int rank() const { return block_ * blockDim.x + threadIdx.x; }
  __device__ int size() const { return blocks_ * blockDim.x; }

  __device__ void sync() {
    __syncthreads();
    if (threadIdx.x == 0) wait_for_blocks();
    __syncthreads();
  }

  __device__ int sync_sum(int value) {
    const int slot = slot_;
    slot_ = slot == 2 ? 0 : slot + 1;
    value = block_team_.sync_sum(value);
    if (threadIdx.x == 0) {
      if (value != 0) atomicAdd(&scratch_->sums[slot], value);
      if (block_ == 0) *const_cast<volatile int*>(&scratch_->sums[slot_]) = 0;
      wait_for_blocks();
    }
    __syncthreads();
    return *const_cast<volatile int*>(&scratch_->sums[slot]);
  }

  __device__ int exclusive_sum(int value) {
    int block_total;
    const int within_block = block_team_.exclusive_sum(value, block_total);
    if (threadIdx.x == 0) *const_cast<volatile int*>(&scratch_->blocks[block_]) = block_total;
    sync();
    int before = 0;
    for (int i = threadIdx.x % kWarpLanes; i < block_; i += kWarpLanes) {
      before += *const_cast<volatile int*>(&scratch_->blocks[i]);
    }
    return warp_sum(before) + within_block;
  }

 private:
  __device__ void wait_for_blocks() {
    expected_ += blocks_;
    fence_acquire_release();  // releases what the block wrote, which the __syncthreads() before gathered
    atomicAdd(&scratch_->arrived, 1u);
    const volatile unsigned* arrived = &scratch_->arrived;
    while (static_cast<int>(*arrived - expected_) < 0) __nanosleep(20);
    fence_acquire_release();  // makes what the others wrote visible to the block
  }

  BlockTeam block_team_;
  GridScratch* scratch_;
  int block_;
  int blocks_;
  int slot_ = 0;
  unsigned expected_ = 0;
};

}  // namespace grootvl
