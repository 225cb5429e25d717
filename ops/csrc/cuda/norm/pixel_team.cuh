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
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../common/warp.cuh"

namespace grootvl {

constexpr int kBlockThreads = 128;  // at least; teams may be larger
// Kernels for blocks of up to so many threads may use more registers than those for larger blocks, which are compiled
// separately.
constexpr int kUsualThreads = 384;

// What a kernel is compiled for: the most threads of a block, the threads of a team (0 for any), and the words of a
// thread. If the threads of a team are known, the words' distances are constants, and addresses take fewer
// instructions.
template <int kThreads_, int kWidth, int kWords_, int kVec_>
struct TeamShape {
  static constexpr int kThreads = kThreads_, kWords = kWords_, kVec = kVec_, kValues = kWords * kVec;
  static constexpr bool kPartOfWarp = kWords > 1;  // whether a team may be less than a warp

  static __device__ __forceinline__ unsigned width() { return kWidth > 0 ? kWidth : blockDim.x; }
};

// Sums over the threads of a team, those with one threadIdx.y. Calls that follow one another must alternate between the
// two buffers, since slower threads may still read the last one.
template <typename Shape, int kSums, typename acc_t>
__device__ __forceinline__ void team_sum(acc_t (&sums)[kSums], int buffer) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    if (Shape::kPartOfWarp && distance >= Shape::width()) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
  }
  if (Shape::width() <= kWarpLanes) return;
  constexpr int kMaxSums = 3;
  static_assert(kSums <= kMaxSums);
  __shared__ acc_t shared[2][kMaxBlockThreads / kWarpLanes][kMaxSums];
  const int warps = Shape::width() / kWarpLanes, first = threadIdx.y * warps;
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
template <typename Shape, typename acc_t>
__device__ __forceinline__ std::pair<acc_t, acc_t> normalise(acc_t (&values)[Shape::kValues], bool active, acc_t share,
                                                             acc_t eps) {
  constexpr int kValues = Shape::kValues;
  acc_t sum[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int i = 0; i < kValues; ++i) sum[0] += active ? values[i] : acc_t(0);
  team_sum<Shape>(sum, 0);
  const acc_t mean = sum[0] * share;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] -= mean;
    squares[0] += active ? values[i] * values[i] : acc_t(0);
  }
  team_sum<Shape>(squares, 1);
  const acc_t scale = rsqrt(squares[0] * share + eps);
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] *= scale;
  return {mean, scale};
}

// The words of a thread begin at its channel, one for each thread of the team after the other.
template <typename Shape, typename T>
struct Words {
  static constexpr int kWords = Shape::kWords, kVec = Shape::kVec;
  Vector<T, kVec> words[kWords];

  __device__ __forceinline__ explicit Words(const T* channel) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = load<kVec>(channel + w * Shape::width() * kVec);
  }

  template <typename acc_t>
  __device__ __forceinline__ void unpack(acc_t (&to)[Shape::kValues]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) to[w * kVec + i] = static_cast<acc_t>(words[w].values[i]);
    }
  }
};

template <typename Shape, typename acc_t, typename T>
__device__ __forceinline__ void store_words(T* channel, const acc_t (&from)[Shape::kValues]) {
  constexpr int kWords = Shape::kWords, kVec = Shape::kVec;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    Vector<T, kVec> vector;
#pragma unroll
    for (int i = 0; i < kVec; ++i) vector.values[i] = static_cast<T>(from[w * kVec + i]);
    *reinterpret_cast<Vector<T, kVec>*>(channel + w * Shape::width() * kVec) = vector;
  }
}

// Writes the sums over the teams of a block, for each channel. All threads of the block call it.
template <typename Shape, typename acc_t>
__device__ __forceinline__ void store_block_sums(acc_t* sums, const acc_t (&values)[Shape::kValues], int channels) {
  constexpr int kThreads = Shape::kThreads, kValues = Shape::kValues, kVec = Shape::kVec;
  if constexpr (kThreads > kUsualThreads) {  // one team
    if (threadIdx.x * kVec < channels) store_words<Shape>(sums + threadIdx.x * kVec, values);
    return;
  }
  __shared__ acc_t shared[kThreads > kUsualThreads ? 1 : kThreads * kValues];
  const int width = blockDim.x * kValues, threads = blockDim.x * blockDim.y;
  __syncthreads();
  store_words<Shape>(shared + threadIdx.y * width + threadIdx.x * kVec, values);
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

// As await_kernels_before. But where teams have several pixels each, the next kernel is not let in early: blocks that
// only wait would be in the way.
__device__ __forceinline__ void await_kernels_before_pixels(int64_t rows) {
  await_earlier_kernels();
  if (int64_t(gridDim.x) * blockDim.y >= rows) allow_next_kernel();
}

// How many threads process a pixel and how many pixels a block processes at a time.
struct TeamLaunch {
  dim3 block;
  unsigned blocks;
  int words;  // of a thread
  bool few;   // each team has one pixel

  TeamLaunch(const char* name, int64_t rows, int64_t channels, int vec, int blocks_per_processor, int words_ = 1)
      : words(words_) {
    const int64_t team =
        words > 1 ? channels / vec / words : (channels / vec + kWarpLanes - 1) / kWarpLanes * kWarpLanes;
    GROOTVL_CHECK(team <= kMaxBlockThreads, name, " takes up to ", kMaxBlockThreads * vec,
                  " channels of this alignment, got ", channels);
    block = dim3(team, std::max<int64_t>(1, kBlockThreads / team));
    const int64_t most = int64_t{blocks_per_processor} * current_limits().multiprocessors;
    const int64_t needed = (rows + block.y - 1) / block.y;
    blocks = std::min(needed, most);
    few = needed <= most;
  }

  // Launches a kernel that begins with await_kernels_before_pixels, early if there are few.
  template <typename Kernel, typename Data>
  void start(Kernel kernel, const Data& data) const {
    launch_early_if(few, kernel, blocks, block, 0, current_stream(), data);
  }

  // Calls `launch` with the `TeamShape` of a kernel whose threads have one word of kVec channels, or one channel.
  template <int kVec, typename Launch>
  void with_one_word(bool aligned, Launch launch) const {
    const auto with_threads = [&](auto vec) {
      if (block.x * block.y <= kUsualThreads) {
        launch(TeamShape<kUsualThreads, 0, 1, vec()>());
      } else {
        launch(TeamShape<kMaxBlockThreads, 0, 1, vec()>());
      }
    };
    if (aligned) {
      with_threads(std::integral_constant<int, kVec>());
    } else {
      with_threads(std::integral_constant<int, 1>());
    }
  }

  // The same for kernels whose threads may have several words, of kWord channels. Those for teams of kWidths threads
  // are compiled separately.
  template <int kWord, int kVec, int... kWidths, typename Launch>
  void with_words(bool aligned, Launch launch) const {
    const auto with_several = [&](auto several) {
      const auto with_width = [&](auto width) {
        launch(TeamShape<kBlockThreads, width(), several(), kWord>());
        return true;
      };
      const bool known = ((block.x == kWidths && with_width(std::integral_constant<int, kWidths>())) || ...);
      if (!known) with_width(std::integral_constant<int, 0>());
    };
    switch (words) {
      case 3:
        return with_several(std::integral_constant<int, 3>());
      case 4:
        return with_several(std::integral_constant<int, 4>());
      case 5:
        return with_several(std::integral_constant<int, 5>());
      default:
        return with_one_word<kVec>(aligned, launch);
    }
  }
};

}  // namespace grootvl
