// Kernels that follow each other without a gap: each one is set up while the one before it still runs (programmatic
// dependent launch).
#pragma once

#include <algorithm>

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

constexpr int kMaxBlocks = 32;  // on one multiprocessor

// Shared memory to request for each block, which needs `bytes`, so that the blocks are spread evenly over the
// multiprocessors, with up to `at_most` at a time on each. Without the limit, blocks that are launched early would fill
// the multiprocessors that the kernel before leaves first.
inline size_t spread_evenly(int64_t blocks, int64_t at_most, size_t bytes) {
  const DeviceLimits& limits = current_limits();
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t available = limits.shared_of_multiprocessor, reserved = limits.reserved_shared_of_block;
  const int64_t fitting = std::clamp<int64_t>(available / (bytes + reserved), 1, at_most);
  const int64_t all = divide(blocks, limits.multiprocessors), at_a_time = divide(all, divide(all, fitting));
  const int64_t share = std::min<int64_t>(available / at_a_time - reserved, limits.shared_of_block);
  return std::max<int64_t>(share / 1024 * 1024, bytes);
}

// Launches a kernel that begins with await_kernels_before; if `early`, it is set up while the one before it runs.
template <typename... Parameters, typename... Arguments>
void launch_early_if(bool early, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && can_await_kernels() ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_early_if(true, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

// Of the 48 KiB that every kernel is allowed, variables of the kernel may take a part.
constexpr size_t kSharedWithoutAsking = 40 << 10;

// The same for a kernel that may need more shared memory.
template <typename... Parameters, typename... Arguments>
void launch_with_much_shared(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                             cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > kSharedWithoutAsking) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  launch(kernel, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace grootvl
