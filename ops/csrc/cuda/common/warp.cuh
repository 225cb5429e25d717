// Sizes that all CUDA devices share, and sums over a warp.
#pragma once

#include <cstdint>

namespace grootvl {

constexpr int kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;  // the mask of a shuffle in which every lane of the warp takes part
constexpr int kMaxBlockThreads = 1024;

// The sum of the lanes' values, in each lane. Its order is fixed.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

}  // namespace grootvl
