// LayerNorm over the channels of each pixel, from one precision to another, also of a sum of two maps, and its
// gradients (pixel_team.cuh).
#pragma once

#include <type_traits>

#include "../../checks.h"
#include "../common/sum.cuh"
#include "../common/vector.cuh"
#include "pixel_team.cuh"

namespace grootvl {

// The type of the branch where there is none, and x alone is normalised.
struct NoBranch {};

// Maps (rows, channels); out_t is the type of the normalised map.
template <typename T, typename branch_t_, typename out_t, typename acc_t>
struct LayerNormData {
  using branch_t = branch_t_;
  static constexpr bool kAdds = !std::is_same_v<branch_t, NoBranch>;
  const T* x;  // in the backward pass with a branch, the sum
  const acc_t *weight, *bias;
  int64_t rows;
  int channels;
  acc_t eps;
  acc_t* statistics;  // (rows, 2): mean and reciprocal deviation; read by the backward pass
  out_t* out;
  const out_t* grad;
  T* dx;
  acc_t* dparameters;  // (blocks, 2, channels): of weight and bias
  // With a branch: sum = x + factor branch. Null: without factors, the gradient of the sum, or that of the branch.
  const branch_t* branch;
  const acc_t* factors;  // one for each image, of so many rows
  int64_t image_rows;
  T* sum;
  const T* grad_sum;
  branch_t* dbranch;

  __device__ __forceinline__ acc_t factor(int64_t row) const {
    return factors == nullptr ? acc_t(1) : factors[min(row, rows - 1) / image_rows];
  }
};

template <typename Shape, typename T, typename branch_t, typename out_t, typename acc_t>
__global__ void __launch_bounds__(Shape::kThreads) layer_norm_kernel(LayerNormData<T, branch_t, out_t, acc_t> data) {
  await_kernels_before_pixels(data.rows);
  constexpr bool kAdds = data.kAdds;
  constexpr int kVec = Shape::kVec, kValues = Shape::kValues;
  const bool active = threadIdx.x * kVec < data.channels;
  const int channel = active ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  const acc_t share = acc_t(1) / data.channels;
  acc_t weight[kValues], bias[kValues];
  Words<Shape, acc_t>(data.weight + channel).unpack(weight);
  Words<Shape, acc_t>(data.bias + channel).unpack(bias);
  const auto pixel = [&](int64_t row) { return min(row, data.rows - 1) * data.channels + channel; };
  using BranchWords = Words<Shape, std::conditional_t<kAdds, branch_t, T>>;
  const auto load_branch = [&](int64_t row) {
    if constexpr (kAdds) {
      return BranchWords(data.branch + pixel(row));
    } else {
      return NoBranch();
    }
  };
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  Words<Shape, T> next(data.x + pixel(row));
  auto next_branch = load_branch(row);
  // All teams of a block take the same number of steps, since they wait for each other.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step, row += step) {
    const bool write = active && row < data.rows;
    acc_t x[kValues];
    next.unpack(x);
    next = Words<Shape, T>(data.x + pixel(row + step));
    if constexpr (kAdds) {
      acc_t branch[kValues];
      next_branch.unpack(branch);
      next_branch = load_branch(row + step);
      const acc_t factor = data.factor(row);
#pragma unroll
      for (int i = 0; i < kValues; ++i) x[i] += factor * branch[i];
      if (write) store_words<Shape>(data.sum + pixel(row), x);
    }
    const auto [mean, scale] = normalise<Shape>(x, active, share, data.eps);
    if (!write) continue;
#pragma unroll
    for (int i = 0; i < kValues; ++i) x[i] = x[i] * weight[i] + bias[i];
    store_words<Shape>(data.out + pixel(row), x);
    if (threadIdx.x == 0) data.statistics[2 * row] = mean, data.statistics[2 * row + 1] = scale;
  }
}

template <typename Shape, typename T, typename branch_t, typename out_t, typename acc_t>
__global__ void __launch_bounds__(Shape::kThreads)
    layer_norm_backward_kernel(LayerNormData<T, branch_t, out_t, acc_t> data) {
  constexpr bool kAdds = data.kAdds;
  constexpr int kVec = Shape::kVec, kValues = Shape::kValues;
  const bool active = threadIdx.x * kVec < data.channels;
  const int channel = active ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  const acc_t share = acc_t(1) / data.channels;
  acc_t weight[kValues], dweight[kValues] = {}, dbias[kValues] = {};
  Words<Shape, acc_t>(data.weight + channel).unpack(weight);
  const auto pixel = [&](int64_t row) { return min(row, data.rows - 1) * data.channels + channel; };
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  Words<Shape, T> next_x(data.x + pixel(row));
  Words<Shape, out_t> next_grad(data.grad + pixel(row));
  int buffer = 0;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step, row += step) {
    acc_t x[kValues], dx[kValues], sums[2] = {};
    next_x.unpack(x);
    next_grad.unpack(dx);
    next_x = Words<Shape, T>(data.x + pixel(row + step));
    next_grad = Words<Shape, out_t>(data.grad + pixel(row + step));
    acc_t grad_sum[kValues] = {};
    if constexpr (kAdds) {
      if (data.grad_sum != nullptr) Words<Shape, T>(data.grad_sum + pixel(row)).unpack(grad_sum);
    }
    const bool write = active && row < data.rows;
    const acc_t* statistics = data.statistics + 2 * min(row, data.rows - 1);
    const acc_t mean = statistics[0], scale = statistics[1];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      x[i] = (x[i] - mean) * scale;
      const acc_t grad = write ? dx[i] : acc_t(0);
      dweight[i] += grad * x[i];
      dbias[i] += grad;
      dx[i] = grad * weight[i];
      sums[0] += dx[i];
      sums[1] += dx[i] * x[i];
    }
    team_sum<Shape>(sums, buffer);
    buffer = 1 - buffer;
    if (!write) continue;
    const acc_t dx_mean = sums[0] * share, dx_slope = sums[1] * share;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      dx[i] = grad_sum[i] + scale * (dx[i] - (dx_mean + x[i] * dx_slope));
    }
    store_words<Shape>(data.dx + pixel(row), dx);
    if constexpr (kAdds) {
      if (data.dbranch == nullptr) continue;
      const acc_t factor = data.factor(row);
#pragma unroll
      for (int i = 0; i < kValues; ++i) dx[i] *= factor;
      store_words<Shape>(data.dbranch + pixel(row), dx);
    }
  }
  acc_t* dparameters = data.dparameters + 2 * int64_t(blockIdx.x) * data.channels;
  store_block_sums<Shape>(dparameters, dweight, data.channels);
  store_block_sums<Shape>(dparameters + data.channels, dbias, data.channels);
}

struct LayerNormInputs {
  Tensor x, weight, bias;

  LayerNormInputs(const Tensor& x_, const Tensor& weight_, const Tensor& bias_)
      : x(aligned_if_wide(contiguous(x_))), weight(parameter(weight_, x_)), bias(parameter(bias_, x_)) {}

  // Threads with one channel each would not hold all channels of a wide map.
  static Tensor aligned_if_wide(const Tensor& map) {
    return map.size(-1) <= kMaxBlockThreads || is_aligned(map.const_data_ptr()) ? map : clone(map);
  }

  // In the precision of the sums, and at an address from which words can be loaded.
  static Tensor parameter(const Tensor& tensor, const Tensor& map) {
    const Tensor converted = contiguous(to(tensor, accumulation_type(map)));
    return is_aligned(converted.const_data_ptr()) ? converted : clone(converted);
  }

  template <typename T, typename branch_t, typename out_t, typename acc_t>
  LayerNormData<T, branch_t, out_t, acc_t> data() const {
    LayerNormData<T, branch_t, out_t, acc_t> data{};
    data.x = x.const_data_ptr<T>();
    data.weight = weight.const_data_ptr<acc_t>();
    data.bias = bias.const_data_ptr<acc_t>();
    data.channels = static_cast<int>(x.size(-1));
    data.rows = x.numel() / data.channels;
    return data;
  }

  // The blocks, of which each multiprocessor runs up to `per_processor`, and whether all maps can be read and written
  // in words of `vec` values.
  std::pair<TeamLaunch, bool> launch(const char* name, int vec, int per_processor,
                                     std::initializer_list<const Tensor*> maps) const {
    const int64_t channels = x.size(-1);
    bool aligned = channels % vec == 0 && is_aligned(x.const_data_ptr(), vec * x.element_size());
    for (const Tensor* map : maps) aligned &= is_aligned(map->const_data_ptr(), vec * map->element_size());
    const int words = aligned ? words_of_thread(channels / vec) : 1;
    return {TeamLaunch(name, x.numel() / channels, channels, aligned ? vec : 1, per_processor, words), aligned};
  }
};

// Calls `launch(T, out_t, acc_t)` with values of the types of the map, of the normalised map and of the sums.
template <typename Launch>
void dispatch_layer_norm(ScalarType type, ScalarType out_type, Launch launch) {
  for_floating_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    if (type == out_type) return launch(scalar_t(), scalar_t(), acc_t());
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (out_type == ScalarType::Half) return launch(scalar_t(), torch::headeronly::Half(), acc_t());
      if (out_type == ScalarType::BFloat16) return launch(scalar_t(), torch::headeronly::BFloat16(), acc_t());
    } else if constexpr (!std::is_same_v<scalar_t, double>) {
      if (out_type == ScalarType::Float) return launch(scalar_t(), float(), acc_t());
    }
    GROOTVL_CHECK(false, "layer_norm on CUDA goes from ", type, " to ", type,
                  ", or between float32 and a half precision, got ", out_type);
  });
}

}  // namespace grootvl
