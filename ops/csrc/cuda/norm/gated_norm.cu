// out = LN(C LN(h) + D_skip x) SiLU(z) over the channels of each pixel, and its gradients: each in one pass over the
// maps (pixel_team.cuh). C is a projection of the pixel, one value for all of its channels.

#include <tuple>

#include "../../checks.h"
#include "../common/math.cuh"
#include "../common/vector.cuh"
#include "pixel_team.cuh"

namespace grootvl {
namespace {

constexpr int kNumParameters = 5;  // D_skip, weight and bias of LN(h), weight and bias of the outer LN

// Maps (N, D) of N pixels and D channels, C (N); z and C may have a stride from one pixel to the next.
template <typename T, typename acc_t>
struct NormData {
  const T *h, *x, *z, *C;
  int64_t z_stride, C_stride;
  const acc_t* parameters[kNumParameters];
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

// The parameters of a thread's channels. A thread with one word keeps them in registers; one with several has no room
// for them, and loads them again from the first-level cache for each pixel.
template <int kWords, int kVec, typename acc_t>
struct Parameters {
  static constexpr bool kKept = kWords == 1;
  const acc_t* from[kNumParameters];
  Vector<acc_t, kVec> kept[kKept ? kNumParameters : 1];

  template <typename T>
  __device__ __forceinline__ Parameters(const NormData<T, acc_t>& data, int channel) {
#pragma unroll
    for (int p = 0; p < kNumParameters; ++p) {
      from[p] = data.parameters[p] + channel;
      if constexpr (kKept) {
        for (int i = 0; i < kVec; ++i) kept[p].values[i] = from[p][i];
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void operator()(int p, F use) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      Vector<acc_t, kVec> word;
      if constexpr (kKept) {
        word = kept[p];
      } else {
        word = load<kVec>(from[p] + w * blockDim.x * kVec);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) use(w * kVec + i, word.values[i]);
    }
  }
};

enum Parameter { kSkip, kInnerWeight, kInnerBias, kOuterWeight, kOuterBias };

// A thread's share of a pixel, loaded before it is needed. Past the end of the maps, the last pixel.
template <int kWords, int kVec, typename T>
struct WordsOfPixel {
  int64_t row;
  bool valid;
  Words<kWords, kVec, T> h, x, z;
  T C;

  template <typename acc_t>
  __device__ __forceinline__ WordsOfPixel(const NormData<T, acc_t>& data, int channel, int64_t wanted)
      : row(min(wanted, data.rows - 1)),
        valid(wanted < data.rows),
        h(data.h + row * data.channels + channel),
        x(data.x + row * data.channels + channel),
        z(data.z + row * data.z_stride + channel),
        C(data.C[row * data.C_stride]) {}
};

template <int kThreads, int kWords, int kVec, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads, kWords > 1 ? 4 : 1) gated_norm_kernel(NormData<T, acc_t> data) {
  constexpr int kValues = kWords * kVec;
  const bool in_map = threadIdx.x * kVec < data.channels;
  const int channel = in_map ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  const Parameters<kWords, kVec, acc_t> parameters(data, channel);
  using ThisPixel = WordsOfPixel<kWords, kVec, T>;
  ThisPixel next(data, channel, int64_t(blockIdx.x) * blockDim.y + threadIdx.y);
  // All teams of a block take the same number of steps, since they wait for each other.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const ThisPixel pixel = next;
    next = ThisPixel(data, channel, first + step + threadIdx.y);
    const acc_t C = static_cast<acc_t>(pixel.C);
    acc_t y[kValues], x[kValues];
    pixel.h.unpack(y);
    const auto [h_mean, h_scale] = normalise<(kWords > 1)>(y, in_map, data.channels, data.eps);
    pixel.x.unpack(x);
    // In the order of the backward pass, which must get the same bits.
    parameters(kInnerWeight, [&](int i, acc_t weight) { y[i] *= weight; });
    parameters(kInnerBias, [&](int i, acc_t bias) { y[i] = C * (y[i] + bias); });
    parameters(kSkip, [&](int i, acc_t skip) { y[i] += skip * x[i]; });
    const auto [y_mean, y_scale] = normalise<(kWords > 1)>(y, in_map, data.channels, data.eps);
    pixel.z.unpack(x);
    parameters(kOuterWeight, [&](int i, acc_t weight) { y[i] *= weight; });
    parameters(kOuterBias, [&](int i, acc_t bias) { y[i] = (y[i] + bias) * x[i] * sigmoid(x[i]); });
    if (!(in_map && pixel.valid)) continue;
    store_words<kWords, kVec>(data.out + pixel.row * data.channels + channel, y);
    if (threadIdx.x == 0) {
      acc_t* statistics = data.statistics + 4 * pixel.row;
      statistics[0] = h_mean, statistics[1] = h_scale, statistics[2] = y_mean, statistics[3] = y_scale;
    }
  }
}

// A thread's channels in the backward pass, with their parameters. It has one word of them: of more, the gradients of
// the parameters would not fit into registers.
template <int kVec, typename acc_t>
struct Channels {
  int first;
  bool active;
  acc_t skip[kVec], h_weight[kVec], h_bias[kVec], out_weight[kVec], out_bias[kVec];

  template <typename T>
  __device__ explicit Channels(const NormData<T, acc_t>& data) : first(threadIdx.x * kVec) {
    active = first < data.channels;
    first = active ? first : 0;
    acc_t* const all[kNumParameters] = {skip, h_weight, h_bias, out_weight, out_bias};
    for (int p = 0; p < kNumParameters; ++p) {
      for (int i = 0; i < kVec; ++i) all[p][i] = data.parameters[p][first + i];
    }
  }
};

// The same for the backward pass, in which a thread has one word.
template <int kVec, typename T>
struct Pixel {
  Vector<T, kVec> h, x, z, grad;
  T C;
  int64_t row, at;
  bool valid;

  template <typename acc_t>
  __device__ __forceinline__ Pixel(const NormData<T, acc_t>& data, const Channels<kVec, acc_t>& channels,
                                   int64_t wanted) {
    valid = wanted < data.rows;
    row = valid ? wanted : data.rows - 1;
    at = row * data.channels + channels.first;
    h = load<kVec>(data.h + at);
    x = load<kVec>(data.x + at);
    z = load<kVec>(data.z + row * data.z_stride + channels.first);
    grad = load<kVec>(data.grad + at);
    C = data.C[row * data.C_stride];
  }
};

template <int kThreads, int kVec, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads) gated_norm_backward_kernel(NormData<T, acc_t> data) {
  const Channels<kVec, acc_t> channels(data);
  const int step = gridDim.x * blockDim.y;
  acc_t dparameters[kNumParameters][kVec] = {};
  Pixel<kVec, T> next(data, channels, int64_t(blockIdx.x) * blockDim.y + threadIdx.y);
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const Pixel<kVec, T> pixel = next;
    next = Pixel<kVec, T>(data, channels, first + step + threadIdx.y);
    const bool active = channels.active && pixel.valid;
    acc_t h[kVec], x[kVec], z[kVec], dy[kVec];
    unpack(h, pixel.h);
    unpack(x, pixel.x);
    unpack(z, pixel.z);
    unpack(dy, pixel.grad);
    const acc_t C = static_cast<acc_t>(pixel.C);
    const acc_t* statistics = data.statistics + 4 * pixel.row;
    const acc_t h_mean = statistics[0], h_scale = statistics[1], y_mean = statistics[2], y_scale = statistics[3];

    // After the loop h and y are normalised, z holds its gradient, and dy the gradient of the normalised y.
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
    team_sum<false>(sums, 0);
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
    team_sum<false>(more, 1);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dh[i] = h_scale * (dh[i] - (more[1] + h[i] * more[2]) / data.channels);
    if (!active) continue;
    store(data.dh + pixel.at, dh);
    store(data.dx + pixel.at, x);
    store(data.dz + pixel.at, z);
    if (threadIdx.x == 0) data.dC[pixel.row] = static_cast<T>(more[0]);
  }
  if (!channels.active) return;
  const int64_t team = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int p = 0; p < kNumParameters; ++p) {
    store(data.dparameters + (team * kNumParameters + p) * data.channels + channels.first, dparameters[p]);
  }
}

struct NormInputs {
  Tensor h, x, z, C, parameters[kNumParameters];
  bool aligned;

  NormInputs(const Tensor& h_, const Tensor& x_, const Tensor& z_, const Tensor& C_,
             std::initializer_list<Tensor> parameters_)
      : h(contiguous(h_)), x(contiguous(x_)), z(rows_of(z_)), C(rows_of(C_)) {
    int p = 0;
    for (const Tensor& parameter : parameters_) {
      const Tensor converted = contiguous(to(parameter, accumulation_type(h)));
      parameters[p++] = is_aligned(converted.const_data_ptr()) ? converted : clone(converted);
    }
    const int64_t vec = kVectorBytes / h.element_size();
    const auto all_aligned = [&] {
      return rows_aligned(h, vec) && rows_aligned(x, vec) && rows_aligned(z, vec) && h.size(2) % vec == 0;
    };
    if (h.size(2) > kMaxBlockThreads &&
        !all_aligned()) {  // threads with one channel each would not hold all of a pixel
      h = clone(h), x = clone(x), z = clone(z);
    }
    aligned = all_aligned();
  }

  // The blocks, of which each multiprocessor runs up to `per_processor`. Threads may have several words, of `word`
  // channels.
  TeamLaunch launch(int word, int vec, int per_processor, bool several) const {
    const int64_t channels = h.size(2);
    const int words = several && aligned && channels % word == 0 ? words_of_thread(channels / word) : 1;
    return TeamLaunch("gated_norm", h.size(0) * h.size(1), channels,
                      words > 1 ? word
                      : aligned ? vec
                                : 1,
                      per_processor, words);
  }

  // Whether the row of each pixel begins at a multiple of `vec` values.
  static bool rows_aligned(const Tensor& map, int64_t vec) {
    return is_aligned(map.const_data_ptr(), vec * map.element_size()) && map.stride(1) % vec == 0;
  }

  // The map with the same distance between all neighbouring pixels, and a pixel's channels side by side.
  static Tensor rows_of(const Tensor& map) {
    const bool rows = map.stride(0) == map.size(1) * map.stride(1) && (map.dim() == 2 || map.stride(2) == 1);
    return rows ? map : contiguous(map);
  }

  template <typename T, typename acc_t>
  NormData<T, acc_t> data() const {
    NormData<T, acc_t> data{};
    data.h = h.const_data_ptr<T>();
    data.x = x.const_data_ptr<T>();
    data.z = z.const_data_ptr<T>();
    data.C = C.const_data_ptr<T>();
    data.z_stride = z.stride(1);
    data.C_stride = C.stride(1);
    for (int p = 0; p < kNumParameters; ++p) data.parameters[p] = parameters[p].const_data_ptr<acc_t>();
    data.rows = h.size(0) * h.size(1);
    data.channels = static_cast<int>(h.size(2));
    return data;
  }
};

std::tuple<Tensor, Tensor> gated_norm(const Tensor& h, const Tensor& x, const Tensor& z, const Tensor& C,
                                      const Tensor& D_skip, const Tensor& h_weight, const Tensor& h_bias,
                                      const Tensor& out_weight, const Tensor& out_bias, double eps) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  const DeviceGuard guard(h);
  const NormInputs inputs(h, x, z, C, {D_skip, h_weight, h_bias, out_weight, out_bias});
  const Tensor out = empty_like(h), statistics = empty(h, {h.size(0), h.size(1), 4}, accumulation_type(h));
  if (h.numel() == 0) return {out, statistics};
  const cudaStream_t stream = current_stream();
  for_floating_type(h.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.out = out.mutable_data_ptr<scalar_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    constexpr int kWord = std::min(kVec, 4);
    const TeamLaunch launch = inputs.launch(kWord, kVec, 16, true);
    launch.with_words<kWord, kVec>(inputs.aligned, [&](auto threads, auto words, auto vec) {
      gated_norm_kernel<threads(), words(), vec()><<<launch.blocks, launch.block, 0, stream>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {out, statistics};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gated_norm_backward(const Tensor& grad_, const Tensor& h, const Tensor& x, const Tensor& z, const Tensor& C,
                              const Tensor& D_skip, const Tensor& h_weight, const Tensor& h_bias,
                              const Tensor& out_weight, const Tensor& out_bias, const Tensor& statistics_) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  check_like("grad", grad_, "h", h, h.sizes());
  const DeviceGuard guard(h);
  const NormInputs inputs(h, x, z, C, {D_skip, h_weight, h_bias, out_weight, out_bias});
  Tensor grad = contiguous(grad_);
  if (!is_aligned(grad.const_data_ptr())) grad = clone(grad);
  const ScalarType accumulation = accumulation_type(h);
  GROOTVL_CHECK(statistics_.sizes().equals(Sizes({h.size(0), h.size(1), 4})) &&
                    statistics_.scalar_type() == accumulation && statistics_.device() == h.device(),
                "statistics must be those of the forward pass");
  const Tensor statistics = contiguous(statistics_);
  const Tensor dh = empty_like(h), dx = empty_like(h), dz = empty_like(h), dC = empty_like(C);
  if (h.numel() == 0) return {dh, dx, dz, dC, zeros(h, {kNumParameters, h.size(2)}, accumulation)};
  Tensor totals;
  const cudaStream_t stream = current_stream();
  for_floating_type(h.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.grad = grad.const_data_ptr<scalar_t>();
    data.statistics = const_cast<acc_t*>(statistics.const_data_ptr<acc_t>());
    data.dh = dh.mutable_data_ptr<scalar_t>();
    data.dx = dx.mutable_data_ptr<scalar_t>();
    data.dz = dz.mutable_data_ptr<scalar_t>();
    data.dC = dC.mutable_data_ptr<scalar_t>();
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    const TeamLaunch launch = inputs.launch(kVec, kVec, 8, false);
    const Tensor dparameters = empty(h, {launch.teams(), kNumParameters, h.size(2)}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
    launch.with_sizes<kVec>(inputs.aligned, [&](auto threads, auto vec) {
      gated_norm_backward_kernel<threads(), vec()><<<launch.blocks, launch.block, 0, stream>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals = sum(dparameters, 0, accumulation);
  });
  return {dh, dx, dz, dC, totals};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("gated_norm", TORCH_BOX(&grootvl::gated_norm));
  m.impl("gated_norm_backward", TORCH_BOX(&grootvl::gated_norm_backward));
}
