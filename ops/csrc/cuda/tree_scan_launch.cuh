// Plans a scan and launches its kernels.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "tree_scan_walk.cuh"

namespace grootvl {

// Whether there are so many warps for each multiprocessor of the GPU.
inline bool has_warps(int64_t warps, int64_t wanted) {
  return warps >= wanted * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
}

// log2 of the run length for a scan of this size; 31 for one run a tree.
inline int choose_log2_run(int64_t warps, int64_t length, bool backward) {
  // So few warps a multiprocessor keep the memory busy; forward half as many, with more rows in flight for each.
  if (has_warps(warps, backward ? 8 : 4) || length <= 256) return 31;
  // About the square root of the length: walking one run then takes about as long as walking over all runs.
  int log2_run = 5;
  while ((int64_t{1} << (2 * log2_run + 1)) < length) ++log2_run;
  return log2_run;
}

// The gradients of a selective scan's parameters, unset for other scans.
struct ParameterGradients {
  at::Tensor input_weight;  // (B, L)
  at::Tensor of_channels;   // (2, D): of delta_bias and A_log
};

template <Pass pass, bool kSelective, typename T, typename acc_t>
ParameterGradients scan(ScanData<T, acc_t> data, const at::TensorOptions& options) {
  constexpr int kStreams = num_streams(pass);
  const int64_t batch = data.batch, length = data.num_vertices, channels = data.channels;
  const auto accumulation = options.dtype(c10::CppTypeToScalarType<acc_t>::value);
  constexpr bool kParameters = kSelective && is_backward(pass);
  if (batch * length * channels == 0) {
    if (!kParameters) return {};
    return {at::zeros({batch, length}, options), at::zeros({2, channels}, accumulation)};
  }
  TORCH_CHECK_VALUE(length <= kVertexMask, "a tree may have up to ", kVertexMask, " vertices on CUDA, got ", length);
  TORCH_CHECK_VALUE(length * channels <= UINT32_MAX, "an image may have up to 2^32 values on CUDA, got ", length, " x ",
                    channels);
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto blocks = [](int64_t threads) {
    const int64_t count = (threads + kWalkThreads - 1) / kWalkThreads;
    TORCH_CHECK(count <= INT32_MAX / 4, "the tensors are too large for one scan");  // warps are counted in 32 bits
    return static_cast<unsigned>(count);
  };
  const auto ints = options.dtype(at::kInt);

  // Between the sweeps the sums wait in the outputs, if these are as precise.
  at::Tensor sums;
  if constexpr (!std::is_same_v<T, acc_t>) {
    if (pass != Pass::kUp) {
      sums = at::empty({kStreams, batch, length, channels}, accumulation);
      for (int s = 0; s < kStreams; ++s) data.sums[s] = sums.mutable_data_ptr<acc_t>() + s * batch * length * channels;
    }
  } else {
    data.sums[0] = is_backward(pass) ? data.ddecay : data.out;
    data.sums[1] = data.out;
  }

  Plan plan{};
  const int64_t groups = (channels + 31) / 32, warps = batch * groups;
  plan.log2_run = choose_log2_run(warps, length, is_backward(pass));
  const bool several_runs = plan.log2_run < 31;
  plan.runs = several_runs ? static_cast<int>(max_runs(length, plan.log2_run)) : 1;
  at::Tensor dinput_weight, dparameters;
  if constexpr (kParameters) {
    dinput_weight = at::empty({groups, batch, length}, accumulation);
    // There may be fewer runs than room for them.
    dparameters = several_runs ? at::zeros({2, batch * plan.runs, channels}, accumulation)
                               : at::empty({2, batch * plan.runs, channels}, accumulation);
    data.dinput_weight = dinput_weight.mutable_data_ptr<acc_t>();
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
  }
  const at::Tensor nodes = at::empty({batch, length}, ints);
  plan.nodes = reinterpret_cast<uint32_t*>(nodes.mutable_data_ptr<int32_t>());
  at::Tensor cuts, run_id, run_end, run_nodes, run_storage;
  if (several_runs) {
    cuts = at::empty({batch, length}, ints);
    plan.cuts = cuts.mutable_data_ptr<int32_t>();
  }
  mark_nodes<<<blocks(batch * length), kWalkThreads, 0, stream>>>(data, plan);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  const int capacity = stack_capacity(length);
  const unsigned run_blocks = blocks(batch * plan.runs * groups * 32);
  const size_t stack_bytes = sizeof(acc_t) * capacity * kWalkThreads;
  RunData<acc_t> runs{};
  if (several_runs) {
    run_id = at::cumsum(cuts, 1, at::kInt);
    run_end = at::empty({batch, plan.runs}, ints);
    run_nodes = at::empty({batch, plan.runs}, ints);
    plan.run_id = run_id.const_data_ptr<int32_t>();
    plan.run_end = run_end.mutable_data_ptr<int32_t>();
    plan.run_nodes = reinterpret_cast<uint32_t*>(run_nodes.mutable_data_ptr<int32_t>());
    list_runs<<<blocks(batch * length), kWalkThreads, 0, stream>>>(data, plan);
    C10_CUDA_KERNEL_LAUNCH_CHECK();

    run_storage = at::empty({2 + 3 * kStreams, batch, plan.runs, channels}, accumulation);
    runs.stride = batch * plan.runs * channels;
    runs.beta = run_storage.mutable_data_ptr<acc_t>();
    runs.decay = runs.beta + runs.stride;
    runs.end = runs.decay + runs.stride;
    runs.bottom = runs.end + kStreams * runs.stride;
    runs.below = runs.bottom + kStreams * runs.stride;
    summarise_runs<pass, kSelective>
        <<<run_blocks, kWalkThreads, kStreams * stack_bytes, stream>>>(data, plan, runs, capacity);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    join_runs<pass>
        <<<blocks(kStreams * batch * channels), kWalkThreads, stack_bytes, stream>>>(data, plan, runs, capacity);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto finish = [&](auto rows) {
    finish_runs<rows(), pass, kSelective>
        <<<run_blocks, kWalkThreads, kStreams * stack_bytes, stream>>>(data, plan, runs, capacity);
  };
  // Longer batches need more registers: they pay off where warps are few, or data wide and rows cheap.
  const bool wide = !kSelective && sizeof(T) >= 4;
  if (is_backward(pass) || several_runs || length < 8 * kLongBatch || (has_warps(warps, 8) && !wide)) {
    finish(std::integral_constant<int, kBatch>());
  } else if constexpr (!is_backward(pass)) {
    finish(std::integral_constant<int, kLongBatch>());
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!kParameters) return {};
  return {dinput_weight.sum(0).to(options.dtype()), dparameters.sum(1)};
}

template <typename T, typename acc_t>
ScanData<T, acc_t> scan_data(const at::Tensor& x, const at::Tensor& decay, const at::Tensor& parent,
                             const at::Tensor& order, const at::Tensor& subtree_size) {
  TORCH_CHECK_VALUE(x.size(1) <= INT32_MAX && x.size(2) <= INT32_MAX, "x is too large: ", x.sizes());
  ScanData<T, acc_t> data{};
  data.x = x.const_data_ptr<T>();
  data.decay = decay.const_data_ptr<T>();
  data.parent = parent.const_data_ptr<int32_t>();
  data.order = order.const_data_ptr<int32_t>();
  data.subtree_size = subtree_size.const_data_ptr<int32_t>();
  data.batch = x.size(0);
  data.num_vertices = static_cast<int>(x.size(1));
  data.channels = static_cast<int>(x.size(2));
  return data;
}

}  // namespace grootvl
