// Threads that share a pixel's channels, for the norms.
//
// A team of warps processes one pixel at a time. Each thread has kVec neighbouring channels, which it loads as one word
// and keeps in registers together with their parameters. The next pixel is loaded while the present one is processed.
// In a backward pass each thread sums the gradients of its channels' parameters over the pixels. Sums have a fixed
// order.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../common/device.cuh"
#include "../common/vector.cuh"
#include "../common/warp.cuh"

namespace grootvl {

constexpr int kBlockThreads = 128;  // at least; teams may be larger
// Kernels for blocks of up to so many threads may use more registers than those for larger blocks, which are compiled
// separately.
constexpr int kUsualThreads = 384;

// Sums over the threads of a team, those with one threadIdx.y. Calls that follow one another must alternate between the
// two buffers, since slower threads may still read the last one.
template <int kSums, typename acc_t>
__device__ __forceinline__ void team_sum(acc_t (&sums)[kSums], int buffer) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = warp_sum(sums[i]);
  if (blockDim.x == kWarpLanes) return;
  constexpr int kMaxSums = 3;
  static_assert(kSums <= kMaxSums);
  __shared__ acc_t shared[2][kMaxBlockThreads / kWarpLanes][kMaxSums];
  const int warps = blockDim.x / kWarpLanes, first = threadIdx.y * warps;
  if (threadIdx.x % kWarpLanes == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared[buffer][first + threadIdx.x / kWarpLanes][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0;
    for (int w = 0; w < warps; ++w) sums[i] += shared[buffer][first + w][i];
  }
}

// Normalises values in place; returns mean and reciprocal deviation.
template <int kVec, typename acc_t>
__device__ __forceinline__ std::pair<acc_t, acc_t> normalise(acc_t (&values)[kVec], bool active, int channels,
                                                             acc_t eps) {
  acc_t sum[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[0] += active ? values[i] : acc_t(0);
  team_sum(sum, 0);
  const acc_t mean = sum[0] / channels;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    values[i] -= mean;
    squares[0] += active ? values[i] * values[i] : acc_t(0);
  }
  team_sum(squares, 1);
  const acc_t scale = rsqrt(squares[0] / channels + eps);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] *= scale;
  return {mean, scale};
}

// How many threads process a pixel and how many pixels a block processes at a time.
struct TeamLaunch {
  dim3 block;
  unsigned blocks;

  TeamLaunch(const char* name, int64_t rows, int64_t channels, int vec, int blocks_per_processor) {
    const int64_t team = (channels / vec + kWarpLanes - 1) / kWarpLanes * kWarpLanes;
    GROOTVL_CHECK(team <= kMaxBlockThreads, name, " takes up to ", kMaxBlockThreads * vec,
                  " channels of this alignment, got ", channels);
    block = dim3(team, std::max<int64_t>(1, kBlockThreads / team));
    const int64_t most = int64_t{blocks_per_processor} * current_limits().multiprocessors;
    blocks = std::min<int64_t>((rows + block.y - 1) / block.y, most);
  }

  int64_t teams() const { return int64_t{blocks} * block.y; }

  // Calls `launch` with the number of threads that a kernel is to be compiled for and the channels of a thread.
  template <int kVec, typename Launch>
  void with_sizes(bool aligned, Launch launch) const {
    const auto with_threads = [&](auto vec) {
      if (block.x * block.y <= kUsualThreads) {
        launch(std::integral_constant<int, kUsualThreads>(), vec);
      } else {
        launch(std::integral_constant<int, kMaxBlockThreads>(), vec);
      }
    };
    if (aligned) {
      with_threads(std::integral_constant<int, kVec>());
    } else {
      with_threads(std::integral_constant<int, 1>());
    }
  }
};

}  // namespace grootvl
