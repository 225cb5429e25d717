// Kernels that follow each other without a gap: each one is set up while the one before it still runs (programmatic
// dependent launch).
#pragma once

#include "device.cuh"
#include "ptx.cuh"

namespace grootvl {

// Every kernel that is launched with `launch` begins with this: it waits until the kernels before it on the stream have
// ended and what they wrote can be read, then lets the kernel after it be set up.
__device__ __forceinline__ void await_kernels_before() {
  await_earlier_kernels();
  allow_next_kernel();
}

// Whether the current GPU runs code of this build in which await_kernels_before waits.
inline bool can_await_kernels() {
#ifdef __CUDA_ARCH_LIST__
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};
  const int compute_capability = current_limits().compute_capability;
  for (const int architecture : architectures) {
    if (architecture >= 900 && architecture <= compute_capability) return true;
  }
#endif
  return false;
}

// Launches a kernel that begins with await_kernels_before.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = can_await_kernels() ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace grootvl
