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

// In one instruction, where the processor has it.
__device__ __forceinline__ int warp_sum(int value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kAllLanes, value);
#else
  return warp_sum<int>(value);
#endif
}

// Sums of several values, each over lanes whose numbers differ in the bits from `distance` down, divided among them:
// half of the lanes keep the first half of the values, the others the second, and so on until each has kKept, which are
// then the first of `values`. Returns the next distance: over the bits from there down, the values are not summed up
// yet.
template <int kKept, int kSize, typename T>
__device__ __forceinline__ int scatter_sums(T (&values)[kSize], int distance) {
#pragma unroll
  for (int half = kSize / 2; half >= kKept; half /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[i + half] : values[i], given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
    distance /= 2;
  }
  return distance;
}

}  // namespace grootvl
