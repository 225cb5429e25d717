// LayerNorm over the channels of each pixel, from one precision to another, and its gradients (pixel_team.cuh).

#include <tuple>

#include "../../checks.h"
#include "../common/vector.cuh"
#include "pixel_team.cuh"

namespace grootvl {
namespace {

// Maps (rows, channels); out_t is the type of the normalised map.
template <typename T, typename out_t, typename acc_t>
struct LayerNormData {
  const T* x;
  const acc_t *weight, *bias;
  int64_t rows;
  int channels;
  acc_t eps;
  acc_t* statistics;  // (rows, 2): mean and reciprocal deviation; read by the backward pass
  out_t* out;
  const out_t* grad;
  T* dx;
  acc_t* dparameters;  // (teams, 2, channels): of weight and bias
};

template <int kThreads, int kVec, typename T, typename out_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) layer_norm_kernel(LayerNormData<T, out_t, acc_t> data) {
  const bool active = threadIdx.x * kVec < data.channels;
  const int channel = active ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  acc_t weight[kVec], bias[kVec];
  for (int i = 0; i < kVec; ++i) weight[i] = data.weight[channel + i], bias[i] = data.bias[channel + i];
  const auto pixel = [&](int64_t row) { return min(row, data.rows - 1) * data.channels + channel; };
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  auto next = load<kVec>(data.x + pixel(row));
  // All teams of a block take the same number of steps, since they wait for each other.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step, row += step) {
    acc_t x[kVec];
    unpack(x, next);
    next = load<kVec>(data.x + pixel(row + step));
    const auto [mean, scale] = normalise(x, active, data.channels, data.eps);
    if (!active || row >= data.rows) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = x[i] * weight[i] + bias[i];
    store(data.out + pixel(row), x);
    if (threadIdx.x == 0) data.statistics[2 * row] = mean, data.statistics[2 * row + 1] = scale;
  }
}

template <int kThreads, int kVec, typename T, typename out_t, typename acc_t>
__global__ void __launch_bounds__(kThreads) layer_norm_backward_kernel(LayerNormData<T, out_t, acc_t> data) {
  const bool active = threadIdx.x * kVec < data.channels;
  const int channel = active ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  acc_t weight[kVec], dweight[kVec] = {}, dbias[kVec] = {};
  for (int i = 0; i < kVec; ++i) weight[i] = data.weight[channel + i];
  const auto pixel = [&](int64_t row) { return min(row, data.rows - 1) * data.channels + channel; };
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  auto next_x = load<kVec>(data.x + pixel(row));
  auto next_grad = load<kVec>(data.grad + pixel(row));
  int buffer = 0;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step, row += step) {
    acc_t x[kVec], dx[kVec], sums[2] = {};
    unpack(x, next_x);
    unpack(dx, next_grad);
    next_x = load<kVec>(data.x + pixel(row + step));
    next_grad = load<kVec>(data.grad + pixel(row + step));
    const bool write = active && row < data.rows;
    const acc_t* statistics = data.statistics + 2 * min(row, data.rows - 1);
    const acc_t mean = statistics[0], scale = statistics[1];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] = (x[i] - mean) * scale;
      const acc_t grad = write ? dx[i] : acc_t(0);
      dweight[i] += grad * x[i];
      dbias[i] += grad;
      dx[i] = grad * weight[i];
      sums[0] += dx[i];
      sums[1] += dx[i] * x[i];
    }
    team_sum(sums, buffer);
    buffer = 1 - buffer;
    if (!write) continue;
#pragma unroll
    for (int i = 0; i < kVec; ++i) dx[i] = scale * (dx[i] - (sums[0] + x[i] * sums[1]) / data.channels);
    store(data.dx + pixel(row), dx);
  }
  if (!active) return;
  acc_t* dparameters = data.dparameters + 2 * (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * data.channels;
  store(dparameters + channel, dweight);
  store(dparameters + data.channels + channel, dbias);
}

// Calls `launch(T, out_t, acc_t)` with values of the types of the map, of the normalised map and of the sums.
template <typename Launch>
void dispatch(ScalarType type, ScalarType out_type, Launch launch) {
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

struct LayerNormInputs {
  Tensor x, weight, bias;

  LayerNormInputs(const Tensor& x_, const Tensor& weight_, const Tensor& bias_)
      : x(contiguous(x_)),
        weight(contiguous(to(weight_, accumulation_type(x_)))),
        bias(contiguous(to(bias_, accumulation_type(x_)))) {
    x = aligned_if_wide(x);
  }

  // Threads with one channel each would not hold all channels of a wide map.
  static Tensor aligned_if_wide(const Tensor& map) {
    return map.size(-1) <= kMaxBlockThreads || is_aligned(map.const_data_ptr()) ? map : clone(map);
  }

  template <typename T, typename out_t, typename acc_t>
  LayerNormData<T, out_t, acc_t> data() const {
    LayerNormData<T, out_t, acc_t> data{};
    data.x = x.const_data_ptr<T>();
    data.weight = weight.const_data_ptr<acc_t>();
    data.bias = bias.const_data_ptr<acc_t>();
    data.channels = static_cast<int>(x.size(-1));
    data.rows = x.numel() / data.channels;
    return data;
  }

  bool aligned(const Tensor& other, int64_t vec) const {
    return x.size(-1) % vec == 0 && is_aligned(x.const_data_ptr(), vec * x.element_size()) &&
           is_aligned(other.const_data_ptr(), vec * other.element_size());
  }
};

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                                      std::optional<ScalarType> dtype) {
  check_layer_norm(x, weight, bias);
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, bias);
  const Tensor out = empty(x, x.sizes(), dtype.value_or(x.scalar_type()));
  auto sizes = x.sizes().vec();
  sizes.back() = 2;
  const Tensor statistics = empty(x, sizes, accumulation_type(x));
  dispatch(x.scalar_type(), out.scalar_type(), [&](auto in, auto normed, auto acc) {
    using T = decltype(in);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, out_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.out = out.mutable_data_ptr<out_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const bool aligned = inputs.aligned(out, kVec);
    const TeamLaunch launch("layer_norm", data.rows, data.channels, aligned ? kVec : 1, 16);
    launch.with_sizes<kVec>(aligned, [&](auto threads, auto vec) {
      layer_norm_kernel<threads(), vec()><<<launch.blocks, launch.block, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor> layer_norm_backward(const Tensor& grad_, const Tensor& x, const Tensor& weight,
                                               const Tensor& statistics_) {
  check_layer_norm(x, weight, weight);
  GROOTVL_CHECK(grad_.sizes().equals(x.sizes()) && grad_.device() == x.device(), "grad must be as x, ", x.sizes(),
                " on ", x.device(), ", got ", grad_.sizes(), " on ", grad_.device());
  const ScalarType accumulation = accumulation_type(x);
  GROOTVL_CHECK(statistics_.numel() * x.size(-1) == 2 * x.numel() && statistics_.device() == x.device() &&
                    statistics_.scalar_type() == accumulation,
                "statistics must be those of the forward pass");
  const DeviceGuard guard(x);
  const LayerNormInputs inputs(x, weight, weight);
  const Tensor grad = LayerNormInputs::aligned_if_wide(contiguous(grad_)), statistics = contiguous(statistics_);
  const Tensor dx = empty_like(x);
  Tensor totals = x.numel() == 0 ? zeros(x, {2, x.size(-1)}, accumulation) : Tensor();
  dispatch(x.scalar_type(), grad.scalar_type(), [&](auto in, auto normed, auto acc) {
    using T = decltype(in);
    using out_t = decltype(normed);
    using acc_t = decltype(acc);
    if (x.numel() == 0) return;
    auto data = inputs.data<T, out_t, acc_t>();
    data.grad = grad.const_data_ptr<out_t>();
    data.statistics = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());
    data.dx = dx.mutable_data_ptr<T>();
    constexpr int kVec = kVectorBytes / std::max(sizeof(T), sizeof(out_t));
    const bool aligned = inputs.aligned(grad, kVec);
    const TeamLaunch launch("layer_norm", data.rows, data.channels, aligned ? kVec : 1, 8);
    const Tensor dparameters = empty(x, {launch.teams(), 2, x.size(-1)}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
    launch.with_sizes<kVec>(aligned, [&](auto threads, auto vec) {
      layer_norm_backward_kernel<threads(), vec()><<<launch.blocks, launch.block, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals = sum(dparameters, 0, accumulation);
  });
  return {dx, totals};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("layer_norm", TORCH_BOX(&grootvl::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&grootvl::layer_norm_backward));
}
