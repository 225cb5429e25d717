// For kernels that do the work of several launches: blocks are shared out among pieces of work.
#pragma once

#include "device.cuh"

namespace grootvl {

// The piece of work of a block: the last whose `first_block` is this one or one before it.
template <typename Share, int kMost>
__device__ __forceinline__ const Share& find_share(const Share (&shares)[kMost], int count, int block) {
  static_assert((kMost & (kMost - 1)) == 0);
  int which = 0;
#pragma unroll
  for (int distance = kMost / 2; distance > 0; distance /= 2) {
    const int next = which + distance;
    if (next < count && shares[next].first_block <= block) which = next;
  }
  return shares[which];
}

}  // namespace grootvl
