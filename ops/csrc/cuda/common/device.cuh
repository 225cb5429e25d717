// The GPU of a tensor: its stream, its limits, and the types of its kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <vector>

#include "../../tensor.h"

namespace grootvl {

// Makes the GPU of a tensor the current one, as long as this lives.
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const Tensor& tensor) : torch::stable::accelerator::DeviceGuard(tensor.get_device_index()) {}
};

// PyTorch's current stream of the current GPU.
inline cudaStream_t current_stream() {
  int device;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DeviceLimits {
  int compute_capability;  // 900 for 9.0
  int multiprocessors;
  // In bytes.
  int64_t shared_of_multiprocessor, reserved_shared_of_block, shared_of_block;
};

// Those of the current GPU.
inline const DeviceLimits& current_limits() {
  static const std::vector<DeviceLimits> all = [] {
    int count;
    STD_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<DeviceLimits> limits;
    for (int device = 0; device < count; ++device) {
      const auto get = [device](cudaDeviceAttr attribute) {
        int value;
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
        return value;
      };
      limits.push_back({100 * get(cudaDevAttrComputeCapabilityMajor) + 10 * get(cudaDevAttrComputeCapabilityMinor),
                        get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                        get(cudaDevAttrReservedSharedMemoryPerBlock), get(cudaDevAttrMaxSharedMemoryPerBlockOptin)});
    }
    return limits;
  }();
  int device;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return all[device];
}

// The type in which kernels add up values of T.
template <typename T>
using Accumulation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls `f` with a value of the type of a floating-point tensor.
template <typename F>
auto for_floating_type(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    default:
      return f(float());
  }
}

}  // namespace grootvl
