// out = LN(C LN(h) + D_skip x) SiLU(z) over the channels of each pixel, and its gradients: each in one pass over the
// maps (pixel_team.cuh). C is a projection of the pixel, one value for all of its channels.

#include <tuple>

#include "../../checks.h"
#include "../common/math.cuh"
#include "../common/sum.cuh"
#include "../common/vector.cuh"
#include "pixel_team.cuh"

namespace grootvl {
namespace {

// Of threads with several words, a multiprocessor has the registers for so many blocks at a time. It gets no more,
// since a part of them would begin late, and in the backward pass each writes sums.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;

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
  int64_t dz_stride;
  acc_t* dparameters;  // (blocks, 5, D)
};

// The parameters of a thread's channels. A thread with one word keeps them in registers; one with several has no room
// for them, and loads them again from the first-level cache for each pixel.
template <typename Shape, typename acc_t>
struct Parameters {
  static constexpr int kWords = Shape::kWords, kVec = Shape::kVec;
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
        word = load<kVec>(from[p] + w * Shape::width() * kVec);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) use(w * kVec + i, word.values[i]);
    }
  }
};

enum Parameter { kSkip, kInnerWeight, kInnerBias, kOuterWeight, kOuterBias };

// A thread's share of a pixel, loaded before it is needed. Past the end of the maps, the last pixel.
template <typename Shape, typename T>
struct WordsOfPixel {
  int64_t row;
  bool valid;
  Words<Shape, T> h, x, z;
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

template <typename Shape, typename T, typename acc_t>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kWords > 1 ? kForwardBlocks : 1)
    gated_norm_kernel(NormData<T, acc_t> data) {
  await_kernels_before_pixels(data.rows);
  constexpr int kVec = Shape::kVec, kValues = Shape::kValues;
  const bool in_map = threadIdx.x * kVec < data.channels;
  const int channel = in_map ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  const acc_t share = acc_t(1) / data.channels;
  const Parameters<Shape, acc_t> parameters(data, channel);
  using ThisPixel = WordsOfPixel<Shape, T>;
  ThisPixel next(data, channel, int64_t(blockIdx.x) * blockDim.y + threadIdx.y);
  // All teams of a block take the same number of steps, since they wait for each other.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const ThisPixel pixel = next;
    next = ThisPixel(data, channel, first + step + threadIdx.y);
    const acc_t C = static_cast<acc_t>(pixel.C);
    acc_t y[kValues], x[kValues];
    pixel.h.unpack(y);
    const auto [h_mean, h_scale] = normalise<Shape>(y, in_map, share, data.eps);
    pixel.x.unpack(x);
    // As in the backward pass, which must get the same bits: with fma, the compiler has no choice of what to round.
    parameters(kInnerWeight, [&](int i, acc_t weight) { y[i] *= weight; });
    parameters(kInnerBias, [&](int i, acc_t bias) { y[i] = C * (y[i] + bias); });
    parameters(kSkip, [&](int i, acc_t skip) { y[i] = fma(skip, x[i], y[i]); });
    const auto [y_mean, y_scale] = normalise<Shape>(y, in_map, share, data.eps);
    pixel.z.unpack(x);
    parameters(kOuterWeight, [&](int i, acc_t weight) { y[i] *= weight; });
    parameters(kOuterBias, [&](int i, acc_t bias) { y[i] = (y[i] + bias) * x[i] * sigmoid(x[i]); });
    if (!(in_map && pixel.valid)) continue;
    store_words<Shape>(data.out + pixel.row * data.channels + channel, y);
    if (threadIdx.x == 0) {
      acc_t* statistics = data.statistics + 4 * pixel.row;
      statistics[0] = h_mean, statistics[1] = h_scale, statistics[2] = y_mean, statistics[3] = y_scale;
    }
  }
}

// The same for the backward pass, with the gradient of the result.
template <typename Shape, typename T>
struct WordsWithGradient : WordsOfPixel<Shape, T> {
  Words<Shape, T> grad;

  template <typename acc_t>
  __device__ __forceinline__ WordsWithGradient(const NormData<T, acc_t>& data, int channel, int64_t wanted)
      : WordsOfPixel<Shape, T>(data, channel, wanted), grad(data.grad + this->row * data.channels + channel) {}
};

template <typename Shape, typename T, typename acc_t>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kWords > 1 ? kBackwardBlocks : 1)
    gated_norm_backward_kernel(NormData<T, acc_t> data) {
  constexpr int kVec = Shape::kVec, kValues = Shape::kValues;
  const bool in_map = threadIdx.x * kVec < data.channels;
  const int channel = in_map ? threadIdx.x * kVec : 0, step = gridDim.x * blockDim.y;
  const acc_t share = acc_t(1) / data.channels;
  const Parameters<Shape, acc_t> parameters(data, channel);
  acc_t dparameters[kNumParameters][kValues] = {};
  using ThisPixel = WordsWithGradient<Shape, T>;
  ThisPixel next(data, channel, int64_t(blockIdx.x) * blockDim.y + threadIdx.y);
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < data.rows; first += step) {
    const ThisPixel pixel = next;
    next = ThisPixel(data, channel, first + step + threadIdx.y);
    const bool active = in_map && pixel.valid;
    const acc_t C = static_cast<acc_t>(pixel.C);
    const acc_t* statistics = data.statistics + 4 * pixel.row;
    const acc_t h_mean = statistics[0], h_scale = statistics[1], y_mean = statistics[2];
    const acc_t y_scale = statistics[3], dy_scale = active ? y_scale : acc_t(0);

    acc_t h[kValues], y[kValues], z[kValues], d[kValues];
    pixel.h.unpack(h);
    pixel.z.unpack(z);
#pragma unroll
    for (int i = 0; i < kValues; ++i) h[i] = (h[i] - h_mean) * h_scale;
    parameters(kInnerWeight, [&](int i, acc_t weight) { y[i] = h[i] * weight; });
    parameters(kInnerBias, [&](int i, acc_t bias) { y[i] = C * (y[i] + bias); });
    pixel.x.unpack(d);
    parameters(kSkip, [&](int i, acc_t skip) { y[i] = fma(skip, d[i], y[i]); });
    pixel.grad.unpack(d);
    acc_t slope[kValues];  // of SiLU, times the gradient of the result
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      y[i] = (y[i] - y_mean) * y_scale;
      const acc_t gate = sigmoid(z[i]), grad = active ? d[i] : acc_t(0);
      z[i] *= gate;
      slope[i] = grad * (gate + z[i] * (1 - gate));
      d[i] = grad * z[i];
      dparameters[kOuterWeight][i] += d[i] * y[i];
      dparameters[kOuterBias][i] += d[i];
    }
    acc_t sums[2] = {};
    parameters(kOuterWeight, [&](int i, acc_t weight) {
      z[i] = y[i] * weight;
      d[i] = rounded_product(d[i], weight);  // so that of one channel exactly nothing is left below
      sums[0] += d[i];
      sums[1] += d[i] * y[i];
    });
    parameters(kOuterBias, [&](int i, acc_t bias) { z[i] = slope[i] * (z[i] + bias); });
    if (active) store_words<Shape>(data.dz + pixel.row * data.dz_stride + channel, z);
    team_sum<Shape>(sums, 0);
    const acc_t dy_mean = sums[0] * share, dy_slope = sums[1] * share;

    // From here on d is the gradient of C LN(h) + D_skip x, and z that of LN(h) over C.
    acc_t x[kValues], more[3] = {};
    pixel.x.unpack(x);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      d[i] = dy_scale * (d[i] - (dy_mean + y[i] * dy_slope));
      dparameters[kSkip][i] += d[i] * x[i];
      const acc_t dnormed = C * d[i];
      dparameters[kInnerWeight][i] += dnormed * h[i];
      dparameters[kInnerBias][i] += dnormed;
    }
    parameters(kInnerBias, [&](int i, acc_t bias) { more[2] += d[i] * bias; });
    parameters(kInnerWeight, [&](int i, acc_t weight) {
      z[i] = d[i] * weight;
      more[0] += z[i];
      more[1] += z[i] * h[i];
    });
    parameters(kSkip, [&](int i, acc_t skip) { d[i] *= skip; });
    if (active) store_words<Shape>(data.dx + pixel.row * data.channels + channel, d);
    team_sum<Shape>(more, 1);
    const acc_t dh_mean = more[0] * share, dh_slope = more[1] * share, dh_scale = C * h_scale;
#pragma unroll
    for (int i = 0; i < kValues; ++i) h[i] = dh_scale * (z[i] - (dh_mean + h[i] * dh_slope));
    if (!active) continue;
    store_words<Shape>(data.dh + pixel.row * data.channels + channel, h);
    if (threadIdx.x == 0) data.dC[pixel.row] = static_cast<T>(more[1] + more[2]);
  }
  for (int p = 0; p < kNumParameters; ++p) {
    acc_t* sums = data.dparameters + (int64_t(blockIdx.x) * kNumParameters + p) * data.channels;
    store_block_sums<Shape>(sums, dparameters[p], data.channels);
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

  // The blocks, of which each multiprocessor runs up to `per_processor`, or `per_processor_several` of threads with
  // several words, of `word` channels, which they may have if `several`.
  TeamLaunch launch(int word, int vec, int per_processor, bool several, int per_processor_several) const {
    const int64_t channels = h.size(2);
    const int words = several && aligned && channels % word == 0 ? words_of_thread(channels / word) : 1;
    return TeamLaunch("gated_norm", h.size(0) * h.size(1), channels,
                      words > 1 ? word
                      : aligned ? vec
                                : 1,
                      words > 1 ? per_processor_several : per_processor, words);
  }

  // Whether the row of each pixel begins at a multiple of `vec` values.
  static bool rows_aligned(const Tensor& map, int64_t vec) {
    return is_aligned(map.const_data_ptr(), vec * map.element_size()) && map.stride(1) % vec == 0;
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
  for_floating_type(h.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.eps = static_cast<acc_t>(eps);
    data.out = out.mutable_data_ptr<scalar_t>();
    data.statistics = statistics.mutable_data_ptr<acc_t>();
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    constexpr int kWord = std::min(kVec, 4);
    const TeamLaunch launch = inputs.launch(kWord, kVec, 16, true, kForwardBlocks);
    launch.with_words<kWord, kVec, 8, 16, 32, 64>(
        inputs.aligned, [&](auto shape) { launch.start(gated_norm_kernel<decltype(shape), scalar_t, acc_t>, data); });
  });
  return {out, statistics};
}

// All gradients but the one of z, which is written into dz, whose pixels may have a distance.
std::tuple<Tensor, Tensor, Tensor, Tensor> gated_norm_backward_into(Tensor dz, const Tensor& grad_, const Tensor& h,
                                                                    const Tensor& x, const Tensor& z, const Tensor& C,
                                                                    const Tensor& D_skip, const Tensor& h_weight,
                                                                    const Tensor& h_bias, const Tensor& out_weight,
                                                                    const Tensor& out_bias, const Tensor& statistics_) {
  check_gated_norm(h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias);
  check_like("grad", grad_, "h", h, h.sizes());
  check_like("dz", dz, "h", h, h.sizes());
  GROOTVL_CHECK(dz.numel() == 0 || has_rows(dz), "dz must have one distance between neighbouring pixels, got strides ",
                dz.strides());
  const DeviceGuard guard(h);
  const NormInputs inputs(h, x, z, C, {D_skip, h_weight, h_bias, out_weight, out_bias});
  if (inputs.aligned && !NormInputs::rows_aligned(dz, kVectorBytes / h.element_size())) {
    const Tensor aligned_dz = empty_like(h);
    auto others = gated_norm_backward_into(aligned_dz, grad_, h, x, z, C, D_skip, h_weight, h_bias, out_weight,
                                           out_bias, statistics_);
    copy(dz, aligned_dz);
    return others;
  }
  Tensor grad = contiguous(grad_);
  if (!is_aligned(grad.const_data_ptr())) grad = clone(grad);
  const ScalarType accumulation = accumulation_type(h);
  GROOTVL_CHECK(statistics_.sizes().equals(Sizes({h.size(0), h.size(1), 4})) &&
                    statistics_.scalar_type() == accumulation && statistics_.device() == h.device(),
                "statistics must be those of the forward pass");
  const Tensor statistics = contiguous(statistics_);
  const Tensor dh = empty_like(h), dx = empty_like(h), dC = empty_like(C);
  if (h.numel() == 0) return {dh, dx, dC, zeros(h, {kNumParameters, h.size(2)}, accumulation)};
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
    data.dz_stride = dz.stride(1);
    constexpr int kVec = kVectorBytes / sizeof(scalar_t);
    // Several short words, where threads with one long word each would leave lanes idle, or be no power of two.
    constexpr int kWord = std::min(kVec, 2);
    const int64_t long_words = h.size(2) / kVec;
    const bool several = long_words % kWarpLanes != 0 || (long_words & (long_words - 1)) != 0;
    const TeamLaunch launch = inputs.launch(kWord, kVec, 8, several, kBackwardBlocks);
    const Tensor dparameters = empty_parts(h, {launch.blocks, kNumParameters, h.size(2)}, accumulation);
    data.dparameters = dparameters.mutable_data_ptr<acc_t>();
    launch.with_words<kWord, kVec, 16, 32, 64, 128>(inputs.aligned, [&](auto shape) {
      gated_norm_backward_kernel<decltype(shape)><<<launch.blocks, launch.block, 0, stream>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    totals = sum_parts_later(dparameters, 1, {kNumParameters, h.size(2)}, accumulation);
  });
  return {dh, dx, dC, totals};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_norm_backward(const Tensor& grad, const Tensor& h,
                                                                       const Tensor& x, const Tensor& z,
                                                                       const Tensor& C, const Tensor& D_skip,
                                                                       const Tensor& h_weight, const Tensor& h_bias,
                                                                       const Tensor& out_weight, const Tensor& out_bias,
                                                                       const Tensor& statistics) {
  const Tensor dz = empty_like(z);
  const auto [dh, dx, dC, dparameters] =
      gated_norm_backward_into(dz, grad, h, x, z, C, D_skip, h_weight, h_bias, out_weight, out_bias, statistics);
  return {dh, dx, dz, dC, dparameters};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("gated_norm", TORCH_BOX(&grootvl::gated_norm));
  m.impl("gated_norm_backward", TORCH_BOX(&grootvl::gated_norm_backward));
  m.impl("gated_norm_backward_into", TORCH_BOX(&grootvl::gated_norm_backward_into));
}
