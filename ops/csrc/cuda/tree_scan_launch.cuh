// Chooses and launches the kernels of a scan: maps whose rows fit on the chip are done by tree_scan_shared.cuh in one
// kernel, larger ones by tree_scan_global.cuh.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "tree_scan_global.cuh"
#include "tree_scan_shared.cuh"

namespace grootvl {

// Launches scan_in_shared if a block's share fits; returns whether it did.
template <typename T, typename acc_t, Pass pass, int kChannels, int kThreads>
bool try_shared(const ScanData<T>& data, int log2_run) {
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  const SharedLayout<acc_t, kChannels, pass> layout(data.num_vertices, log2_run);
  const size_t bytes = layout.bytes();
  if (data.num_vertices > kSharedMaxVertices || bytes > properties->sharedMemPerBlockOptin) return false;
  const auto kernel = scan_in_shared<T, acc_t, kChannels, pass, kThreads>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  const int64_t blocks = data.batch * ((data.channels + kChannels - 1) / kChannels);
  TORCH_CHECK(blocks <= INT32_MAX, "too many images and channels for one scan: ", data.batch, " x ", data.channels);
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, at::cuda::getCurrentCUDAStream()>>>(data, log2_run);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return true;
}

template <typename T, typename acc_t, Pass pass>
void scan_in_global(const ScanData<T>& data, const at::TensorOptions& options) {
  constexpr int kStreams = is_backward(pass) ? 2 : 1, kThreads = 128;
  const int64_t batch = data.batch, length = data.num_vertices, channels = data.channels;
  TORCH_CHECK_VALUE(length <= kVertexMask, "a tree may have up to ", kVertexMask, " vertices on CUDA, got ", length);
  // Runs grow with the square root of the tree: walking one run then takes about as long as walking over all runs.
  int log2_run = 5;
  while ((int64_t{1} << (2 * log2_run)) < length / 4) ++log2_run;
  const int64_t runs = max_runs(length, log2_run);
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto blocks = [](int64_t threads) {
    const int64_t count = (threads + kThreads - 1) / kThreads;
    TORCH_CHECK(count <= INT32_MAX, "the tensors are too large for one scan");
    return static_cast<unsigned>(count);
  };

  const auto ints = options.dtype(at::kInt);
  const auto accumulation = options.dtype(c10::CppTypeToScalarType<acc_t>::value);
  const at::Tensor nodes = at::empty({batch, length}, ints), cuts = at::empty({batch, length}, ints);
  const at::Tensor run_end = at::empty({batch, runs}, ints), run_nodes = at::empty({batch, runs}, ints);
  Plan plan{};
  plan.nodes = reinterpret_cast<uint32_t*>(nodes.mutable_data_ptr<int32_t>());
  plan.cuts = cuts.mutable_data_ptr<int32_t>();
  plan.run_end = run_end.mutable_data_ptr<int32_t>();
  plan.run_nodes = reinterpret_cast<uint32_t*>(run_nodes.mutable_data_ptr<int32_t>());
  plan.runs = static_cast<int>(runs);
  plan.log2_run = log2_run;
  mark_runs<<<blocks(batch * length), kThreads, 0, stream>>>(data, plan);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const at::Tensor run_id = at::cumsum(cuts, 1, at::kInt);
  plan.run_id = run_id.const_data_ptr<int32_t>();
  list_runs<<<blocks(batch * length), kThreads, 0, stream>>>(data, plan);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  const at::Tensor storage = at::empty({2 + 3 * kStreams, batch, runs, channels}, accumulation);
  auto* values = storage.mutable_data_ptr<acc_t>();
  RunData<acc_t> run_data{};
  run_data.stream_stride = batch * runs * channels;
  run_data.beta = values;
  run_data.decay = values + run_data.stream_stride;
  run_data.end = values + 2 * run_data.stream_stride;
  run_data.bottom = run_data.end + kStreams * run_data.stream_stride;
  run_data.below = run_data.bottom + kStreams * run_data.stream_stride;
  const unsigned run_blocks = blocks(batch * runs * ((channels + 31) / 32) * 32);
  summarise_runs<T, acc_t, pass><<<run_blocks, kThreads, 0, stream>>>(data, plan, run_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  join_runs<T, acc_t, pass><<<blocks(kStreams * batch * channels), kThreads, 0, stream>>>(data, plan, run_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();

  at::Tensor sums;
  acc_t* sums_data = nullptr;
  if constexpr (pass != Pass::kUp) {
    sums = at::empty({kStreams, batch, length, channels}, accumulation);
    sums_data = sums.mutable_data_ptr<acc_t>();
  }
  finish_runs<T, acc_t, pass>
      <<<run_blocks, kThreads, 0, stream>>>(data, plan, run_data, sums_data, batch * length * channels);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename acc_t, Pass pass>
void scan(const ScanData<T>& data, const at::TensorOptions& options) {
  if (data.batch * data.num_vertices * data.channels == 0) return;
  // Small maps take more channels a block: whole sectors of memory, and enough threads to a run.
  const int length = data.num_vertices;
  bool done = false;
  if (length <= 64) {
    done = try_shared<T, acc_t, pass, 32, 128>(data, 3);
  } else if (length <= 256) {
    done = try_shared<T, acc_t, pass, 16, 256>(data, 4);
  } else if (length <= 1024) {
    done = try_shared<T, acc_t, pass, 8, 256>(data, 5);
  }
  done = done || try_shared<T, acc_t, pass, 8, 512>(data, 6) || try_shared<T, acc_t, pass, 4, 512>(data, 6);
  if (!done) scan_in_global<T, acc_t, pass>(data, options);
}

template <typename T>
ScanData<T> scan_data(const at::Tensor& x, const at::Tensor& decay, const at::Tensor& parent, const at::Tensor& order,
                      const at::Tensor& subtree_size) {
  TORCH_CHECK_VALUE(x.size(1) <= INT32_MAX && x.size(2) <= INT32_MAX, "x is too large: ", x.sizes());
  ScanData<T> data{};
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
