// Threads that share a pixel's channels, for the norms.
//
// A team of threads processes one pixel at a time: a part of a warp, or several warps. Each thread has one or several
// words of kVec neighbouring channels, which it keeps in registers together with their parameters. The next pixel is
// loaded while the present one is processed. In a backward pass each thread sums the gradients of its channels'
// parameters over the pixels. Sums have a fixed order.
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
// two buffers, since slower threads may still read the last one. Only with kPartOfWarp may a team be less than a warp.
template <bool kPartOfWarp, int kSums, typename acc_t>
__device__ __forceinline__ void team_sum(acc_t (&sums)[kSums], int buffer) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    if (kPartOfWarp && distance >= blockDim.x) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
  }
  if (blockDim.x <= kWarpLanes) return;
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

// Normalises values in place; returns mean and reciprocal deviation. `share` is the reciprocal of the number of
// channels, since a division takes about ten instructions.
template <bool kPartOfWarp, int kValues, typename acc_t>
__device__ __forceinline__ std::pair<acc_t, acc_t> normalise(acc_t (&values)[kValues], bool active, acc_t share,
                                                             acc_t eps) {
  acc_t sum[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int i = 0; i < kValues; ++i) sum[0] += active ? values[i] : acc_t(0);
  team_sum<kPartOfWarp>(sum, 0);
  const acc_t mean = sum[0] * share;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] -= mean;
    squares[0] += active ? values[i] * values[i] : acc_t(0);
  }
  team_sum<kPartOfWarp>(squares, 1);
  const acc_t scale = rsqrt(squares[0] * share + eps);
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] *= scale;
  return {mean, scale};
}

// The words of a thread begin at its channel, one for each thread of the team after the other.
template <int kWords, int kVec, typename T>
struct Words {
  Vector<T, kVec> words[kWords];

  __device__ __forceinline__ explicit Words(const T* channel) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = load<kVec>(channel + w * blockDim.x * kVec);
  }

  template <typename acc_t>
  __device__ __forceinline__ void unpack(acc_t (&to)[kWords * kVec]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) to[w * kVec + i] = static_cast<acc_t>(words[w].values[i]);
    }
  }
};

template <int kWords, int kVec, typename acc_t, typename T>
__device__ __forceinline__ void store_words(T* channel, const acc_t (&from)[kWords * kVec]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    Vector<T, kVec> vector;
#pragma unroll
    for (int i = 0; i < kVec; ++i) vector.values[i] = static_cast<T>(from[w * kVec + i]);
    *reinterpret_cast<Vector<T, kVec>*>(channel + w * blockDim.x * kVec) = vector;
  }
}

// Writes the sums over the teams of a block, for each channel. All threads of the block call it.
template <int kThreads, int kWords, int kVec, typename acc_t>
__device__ __forceinline__ void store_block_sums(acc_t* sums, const acc_t (&values)[kWords * kVec], int channels) {
  if constexpr (kThreads > kUsualThreads) {  // one team
    if (threadIdx.x * kVec < channels) store_words<kWords, kVec>(sums + threadIdx.x * kVec, values);
    return;
  }
  __shared__ acc_t shared[kThreads > kUsualThreads ? 1 : kThreads * kWords * kVec];
  const int width = blockDim.x * kWords * kVec, threads = blockDim.x * blockDim.y;
  __syncthreads();
  store_words<kWords, kVec>(shared + threadIdx.y * width + threadIdx.x * kVec, values);
  __syncthreads();
  for (int channel = threadIdx.y * blockDim.x + threadIdx.x; channel < channels; channel += threads) {
    acc_t sum = 0;
    for (unsigned team = 0; team < blockDim.y; ++team) sum += shared[team * width + channel];
    sums[channel] = sum;
  }
}

// How many words a thread takes where a power of two of threads then takes all of a pixel, such as 3 of 96 channels.
// Fewer threads for each pixel have fewer sums to exchange, and none of them idles.
inline int words_of_thread(int64_t words) {
  int64_t odd = words;
  while (odd > 0 && odd % 2 == 0) odd /= 2;
  const int64_t taken = odd == 1 && words >= 4 ? 4 : odd;
  return (taken == 3 || taken == 4 || taken == 5) && words / taken <= kBlockThreads ? static_cast<int>(taken) : 1;
}

// How many threads process a pixel and how many pixels a block processes at a time.
struct TeamLaunch {
  dim3 block;
  unsigned blocks;
  int words;  // of a thread

  TeamLaunch(const char* name, int64_t rows, int64_t channels, int vec, int blocks_per_processor, int words_ = 1)
      : words(words_) {
    const int64_t team =
        words > 1 ? channels / vec / words : (channels / vec + kWarpLanes - 1) / kWarpLanes * kWarpLanes;
    GROOTVL_CHECK(team <= kMaxBlockThreads, name, " takes up to ", kMaxBlockThreads * vec,
                  " channels of this alignment, got ", channels);
    block = dim3(team, std::max<int64_t>(1, kBlockThreads / team));
    const int64_t most = int64_t{blocks_per_processor} * current_limits().multiprocessors;
    blocks = std::min<int64_t>((rows + block.y - 1) / block.y, most);
  }

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

  // The same with the words of a thread, which are of kWord channels if there are several: `launch(threads, words,
  // vec)`.
  template <int kWord, int kVec, typename Launch>
  void with_words(bool aligned, Launch launch) const {
    const auto with_several = [&](auto several) {
      launch(std::integral_constant<int, kBlockThreads>(), several, std::integral_constant<int, kWord>());
    };
    switch (words) {
      case 3:
        return with_several(std::integral_constant<int, 3>());
      case 4:
        return with_several(std::integral_constant<int, 4>());
      case 5:
        return with_several(std::integral_constant<int, 5>());
      default:
        return with_sizes<kVec>(
            aligned, [&](auto threads, auto vec) { launch(threads, std::integral_constant<int, 1>(), vec); });
    }
  }
};

}  // namespace grootvl
