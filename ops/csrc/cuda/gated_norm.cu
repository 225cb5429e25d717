// out = LN(C LN(h) + D_skip x) SiLU(z) over the channels of each pixel, and its gradients: each in one pass over the
// maps.
//
// A team of warps takes a pixel, a thread kVec neighbouring channels, which it reads as one word of 16 bytes and keeps in
// registers together with the parameters of its channels. So a team goes from pixel to pixel; in the backward pass each
// thread adds up its channels' gradients of the parameters on the way. Sums have a fixed order.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "../checks.h"
#include "discretise.cuh"

namespace grootvl {
namespace {

constexpr int kBlockThreads = 128;   // at least; teams may be larger
constexpr int kMaxThreads = 1024;
constexpr int kBlocksPerProcessor = 8;
constexpr int kParameters = 5;  // D_skip, weight and bias of LN(h), weight and bias of the outer LN

// Maps (N, D), N = B L pixels; z and C may have a stride from one pixel to the next.
template <typename T, typename acc_t>
struct NormData {
  const T *h, *x, *z, *C;
  int64_t z_stride, C_stride;
  const acc_t* parameters[kParameters];
  int64_t rows;
  int channels;
  acc_t eps;
  acc_t* statistics;  // (N, 4): mean and reciprocal deviation of h, then of C LN(h) + D_skip x
  T* out;
  // Backward; `statistics` are read then.
  const T* grad;
  T *dh, *dx, *dz, *dC;
  acc_t* dparameters;  // (teams, 5, D)
};

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vec {
  T values[kVec];
};

template <int kVec, typename acc_t, typename T>
__device__ __forceinline__ void read(acc_t (&to)[kVec], const T* from) {
  const auto vec = *reinterpret_cast<const Vec<T, kVec>*>(from);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = static_cast<acc_t>(vec.values[i]);
}

template <int kVec, typename acc_t, typename T>
__device__ __forceinline__ void write(T* to, const acc_t (&from)[kVec]) {
  Vec<T, kVec> vec;
#pragma unroll
  for (int i = 0; i < kVec; ++i) vec.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Vec<T, kVec>*>(to) = vec;
}

// Sums over the threads of a team (threadIdx.y). Sums that follow one another must use the two buffers in turn.
template <int kSums, typename acc_t>
__device__ __forceinline__ void team_sum(acc_t (&sums)[kSums], int buffer) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      sums[i] += __shfl_xor_sync(0xffffffff, sums[i], distance);
    }
  }
  if (blockDim.x == 32) return;
  constexpr int kMaxSums = 3;
  static_assert(kSums <= kMaxSums);
  __shared__ acc_t shared[2][kMaxThreads / 32][kMaxSums];
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared[buffer][first + threadIdx.x / 32][i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0;
    for (int w = 0; w < warps; ++w) sums[i] += shared[buffer][first + w][i];
  }
}

template <typename acc_t>
__device__ __forceinline__ acc_t sigmoid(acc_t z) {
  return fast_divide(acc_t(1), 1 + fast_exp(-z));
}

// A thread's channels, with their parameters.
template <int kVec, typename acc_t>
struct Channels {
  int first;
  bool active;
  acc_t skip[kVec], h_weight[kVec], h_bias[kVec], out_weight[kVec], out_bias[kVec];

  template <typename T>
  __device__ explicit Channels(const NormData<T, acc_t>& data) : first(threadIdx.x * kVec) {
    active = first < data.channels;
    first = active ? first : 0;
    acc_t* const all[kParameters] = {skip, h_weight, h_bias, out_weight, out_bias};
    for (int p = 0; p < kParameters; ++p) {
      for (int i = 0; i < kVec; ++i) all[p][i] = data.parameters[p][first + i];
    }
  }
};

// Normalises values in place; returns mean and reciprocal deviation.
template <int kVec, typename acc_t>
__device__ __forceinline__ std::pair<acc_t, acc_t> normalise(acc_t (&values)[kVec], bool active, int channels,
                                                             acc_t eps) {
  acc_t sum[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[0] += active ? values[i] : acc_t(0);
  team_sum(sum, 0);
  const acc_t mean = sum[0] / channels;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    values[i] -= mean;
    squares[0] += active ? values[i] * values[i] : acc_t(0);
  }
  team_sum(squares, 1);
  const acc_t scale = rsqrt(squares[0] / channels + eps);
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[i] *= scale;
  return {mean, scale};
}

template <int kVec, typename T, typename acc_t>
__global__ void gated_norm_kernel(NormData<T, acc_t> data) {
  const Channels<kVec, acc_t> channels(data);
  const int step = gridDim.x * blockDim.y;
  // All teams of a block go the same number of steps, since they wait for each other.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const int64_t wanted = first + threadIdx.y, row = min(wanted, data.rows - 1);
    const bool active = channels.active && wanted < data.rows;
    const int64_t at = row * data.channels + channels.first;
    acc_t h[kVec], x[kVec], z[kVec], y[kVec];
    read(h, data.h + at);
    read(x, data.x + at);
    read(z, data.z + row * data.z_stride + channels.first);
    const acc_t C = static_cast<acc_t>(data.C[row * data.C_stride]);
    const auto [h_mean, h_scale] = normalise(h, channels.active, data.channels, data.eps);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      y[i] = C * (h[i] * channels.h_weight[i] + channels.h_bias[i]) + channels.skip[i] * x[i];
    }
    const auto [y_mean, y_scale] = normalise(y, channels.active, data.channels, data.eps);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      y[i] = (y[i] * channels.out_weight[i] + channels.out_bias[i]) * z[i] * sigmoid(z[i]);
    }
    if (!active) continue;
    write(data.out + at, y);
    if (threadIdx.x == 0) {
      acc_t* statistics = data.statistics + 4 * row;
      statistics[0] = h_mean, statistics[1] = h_scale, statistics[2] = y_mean, statistics[3] = y_scale;
    }
  }
}

template <int kVec, typename T, typename acc_t>
__global__ void gated_norm_backward_kernel(NormData<T, acc_t> data) {
  const Channels<kVec, acc_t> channels(data);
  const int step = gridDim.x * blockDim.y;
  acc_t dparameters[kParameters][kVec] = {};
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const int64_t wanted = first + threadIdx.y, row = min(wanted, data.rows - 1);
    const bool active = channels.active && wanted < data.rows;
    const int64_t at = row * data.channels + channels.first;
    acc_t h[kVec], x[kVec], z[kVec], dy[kVec];
    read(h, data.h + at);
    read(x, data.x + at);
    read(z, data.z + row * data.z_stride + channels.first);
    read(dy, data.grad + at);
    const acc_t C = static_cast<acc_t>(data.C[row * data.C_stride]);
    const acc_t* statistics = data.statistics + 4 * row;
    const acc_t h_mean = statistics[0], h_scale = statistics[1], y_mean = statistics[2], y_scale = statistics[3];

    // In the end h and y are normalised, z is its gradient, dy the gradient of the normalised y.
    acc_t y[kVec], sums[2] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      h[i] = (h[i] - h_mean) * h_scale;
      y[i] = C * (h[i] * channels.h_weight[i] + channels.h_bias[i]) + channels.skip[i] * x[i];
      y[i] = (y[i] - y_mean) * y_scale;
      const acc_t gate = sigmoid(z[i]), silu = z[i] * gate;
      const acc_t grad = active ? dy[i] : acc_t(0);
      z[i] = grad * (y[i] * channels.out_weight[i] + channels.out_bias[i]) * (gate + silu * (1 - gate));
      dparameters[3][i] += grad * silu * y[i];
      dparameters[4][i] += grad * silu;
      dy[i] = grad * silu * channels.out_weight[i];
      sums[0] += dy[i];
      sums[1] += dy[i] * y[i];
    }
    team_sum(sums, 0);
    acc_t dh[kVec], more[3] = {};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dy[i] = y_scale * (dy[i] - (sums[0] + y[i] * sums[1]) / data.channels);
      const acc_t masked = active ? dy[i] : acc_t(0), dnormed = masked * C;  // of LN(h)
      dparameters[0][i] += masked * x[i];
      dparameters[1][i] += dnormed * h[i];
      dparameters[2][i] += dnormed;
      dh[i] = dnormed * channels.h_weight[i];
      x[i] = masked * channels.skip[i];
      more[0] += masked * (h[i] * channels.h_weight[i] + channels.h_bias[i]);
      more[1] += dh[i];
      more[2] += dh[i] * h[i];
    }
    team_sum(more, 1);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dh[i] = h_scale * (dh[i] - (more[1] + h[i] * more[2]) / data.channels);
    if (!active) continue;
    write(data.dh + at, dh);
    write(data.dx + at, x);
    write(data.dz + at, z);
    if (threadIdx.x == 0) data.dC[row] = static_cast<T>(more[0]);
  }
  if (!channels.active) return;
  const int64_t team = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int p = 0; p < kParameters; ++p) {
    write(data.dparameters + (team * kParameters + p) * data.channels + channels.first, dparameters[p]);
  }
}

// How many threads take a pixel and how many pixels a block takes at a time.
struct Launch {
  dim3 block;
  unsigned blocks;

  Launch(int64_t rows, int64_t channels, int vec) {
    const int64_t team = (channels / vec + 31) / 32 * 32;
    TORCH_CHECK_VALUE(team <= kMaxThreads, "gated_norm takes up to ", kMaxThreads * vec,
                      " channels of this alignment, got ", channels);
    block = dim3(team, std::max<int64_t>(1, kBlockThreads / team));
    const int64_t most = int64_t{kBlocksPerProcessor} * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
    blocks = std::min<int64_t>((rows + block.y - 1) / block.y, most);
  }
};

struct NormInputs {
  // Nothing here is to be cast by autocast once more.
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::Tensor h, x, z, C, parameters[kParameters];
  bool aligned = true;

  NormInputs(const at::Tensor& h_, const at::Tensor& x_, const at::Tensor& z_, const at::Tensor& C_,
             std::initializer_list<at::Tensor> parameters_)
      : h(h_.contiguous()), x(x_.contiguous()), z(rows_of(z_)), C(rows_of(C_)) {
    int p = 0;
    for (const at::Tensor& parameter : parameters_) {
      parameters[p++] = parameter.to(at::toOpMathType(h.scalar_type())).contiguous();
    }
    const int64_t vec = vector_length();
    for (const at::Tensor& map : {h, x, z}) {
      aligned = aligned && reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16 == 0 && map.stride(1) % vec == 0;
    }
    aligned = aligned && h.size(2) % vec == 0;
  }

  // Pixels at one distance from each other, channels side by side.
  static at::Tensor rows_of(const at::Tensor& map) {
    const bool rows = map.stride(0) == map.size(1) * map.stride(1) && (map.dim() == 2 || map.stride(2) == 1);
    return rows ? map : map.contiguous();
  }

  int vector_length() const { return 16 / h.element_size(); }

  template <typename T, typename acc_t>
  NormData<T, acc_t> data() const {
    NormData<T, acc_t> data{};
    data.h = h.const_data_ptr<T>();
    data.x = x.const_data_ptr<T>();
    data.z = z.const_data_ptr<T>();
    data.C = C.const_data_ptr<T>();
    data.z_stride = z.stride(1);
    data.C_stride = C.stride(1);
    for (int p = 0; p < kParameters; ++p) data.parameters[p] = parameters[p].const_data_ptr<acc_t>();
    data.rows = h.size(0) * h.size(1);
    data.channels = static_cast<int>(h.size(2));
    return data;
  }
};

std::tuple<at::Tensor, at::Tensor> gated_norm(const at::Tensor& h, const at::Tensor& x, const at::Tensor& z,
                                              const at::Tensor& C, const at::Tensor& D_skip, const at::Tensor& h_weight,
                                              const at::Tensor& h_bias, const at::Tensor& out_weight,
                                              const at::Tensor& out_bias, double eps) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  const c10::cuda::CUDAGuard guard(h.device());
  const NormInputs inputs(h, x, z, C, {D_skip, h_weight, h_bias, out_weight, out_bias});
  const at::Tensor out = at::empty(h.sizes(), h.options());
  const at::Tensor statistics =
      at::empty({h.size(0), h.size(1), 4}, h.options().dtype(at::toOpMathType(h.scalar_type())));
  if (h.numel() == 0) return {out, statistics};
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "gated_norm", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.out = out.mutable_data_ptr<scalar_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = 16 / sizeof(scalar_t);
    const Launch launch(data.rows, data.channels, inputs.aligned ? kVec : 1);
    if (inputs.aligned) {
      gated_norm_kernel<kVec><<<launch.blocks, launch.block, 0, stream>>>(data);
    } else {
      gated_norm_kernel<1><<<launch.blocks, launch.block, 0, stream>>>(data);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, statistics};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor>;

Gradients gated_norm_backward(const at::Tensor& grad_, const at::Tensor& h, const at::Tensor& x, const at::Tensor& z,
                              const at::Tensor& C, const at::Tensor& D_skip, const at::Tensor& h_weight,
                              const at::Tensor& h_bias, const at::Tensor& out_weight, const at::Tensor& out_bias,
                              const at::Tensor& statistics_) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  check_like("grad", grad_, "h", h, h.sizes());
  const c10::cuda::CUDAGuard guard(h.device());
  const NormInputs inputs(h, x, z, C, {D_skip, h_weight, h_bias, out_weight, out_bias});
  at::Tensor grad = grad_.contiguous();
  if (reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 16 != 0) grad = grad.clone();
  const auto accumulation = h.options().dtype(at::toOpMathType(h.scalar_type()));
  TORCH_CHECK_VALUE(statistics_.sizes() == at::IntArrayRef({h.size(0), h.size(1), 4}) &&
                        statistics_.scalar_type() == at::typeMetaToScalarType(accumulation.dtype()) &&
                        statistics_.device() == h.device(),
                    "statistics must be those of the forward pass");
  const at::Tensor statistics = statistics_.contiguous();
  const at::Tensor dh = at::empty(h.sizes(), h.options()), dx = at::empty(h.sizes(), h.options()),
                   dz = at::empty(h.sizes(), h.options()), dC = at::empty(C.sizes(), C.options());
  at::Tensor totals = at::zeros({kParameters, h.size(2)}, accumulation);
  if (h.numel() > 0) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "gated_norm_backward", [&] {
      using acc_t = at::opmath_type<scalar_t>;
      auto data = inputs.data<scalar_t, acc_t>();
      data.grad = grad.const_data_ptr<scalar_t>();
      data.statistics = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());
      data.dh = dh.mutable_data_ptr<scalar_t>();
      data.dx = dx.mutable_data_ptr<scalar_t>();
      data.dz = dz.mutable_data_ptr<scalar_t>();
      data.dC = dC.mutable_data_ptr<scalar_t>();
      constexpr int kVec = 16 / sizeof(scalar_t);
      const Launch launch(data.rows, data.channels, inputs.aligned ? kVec : 1);
      const at::Tensor dparameters =
          at::empty({int64_t{launch.blocks} * launch.block.y, kParameters, h.size(2)}, accumulation);
      data.dparameters = dparameters.mutable_data_ptr<acc_t>();
      if (inputs.aligned) {
        gated_norm_backward_kernel<kVec><<<launch.blocks, launch.block, 0, stream>>>(data);
      } else {
        gated_norm_backward_kernel<1><<<launch.blocks, launch.block, 0, stream>>>(data);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      totals = dparameters.sum(0);
    });
  }
  const auto like = [&](int p, const at::Tensor& parameter) { return totals[p].to(parameter.scalar_type()); };
  return {dh,
          dx,
          dz,
          dC,
          like(0, D_skip),
          like(1, h_weight),
          like(2, h_bias),
          like(3, out_weight),
          like(4, out_bias)};
}

}  // namespace
}  // namespace grootvl

TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("gated_norm", &grootvl::gated_norm);
  m.impl("gated_norm_backward", &grootvl::gated_norm_backward);
}
