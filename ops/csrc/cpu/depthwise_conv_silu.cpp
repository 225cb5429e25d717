// The depthwise 3x3 convolution with SiLU: each pixel in one pass over its nine neighbours, where they lie.
// The definition stands in grootvl_ops/reference/convolutions.py.

#include <array>
#include <vector>

#include "../checks.h"
#include "vector_math.h"

GROOTVL_CONTRACT_PRODUCTS

namespace grootvl {
namespace {

constexpr int kTaps = 9;

// `weights` holds `channels` values for each tap. With kKeep, `before` gets what SiLU takes.
template <bool kKeep, typename scalar_t>
GROOTVL_VECTORIZED void conv_silu_pixel(const std::array<const scalar_t*, kTaps>& taps, const scalar_t* weights,
                                        int64_t channels, scalar_t* out, scalar_t* before) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    scalar_t sum = taps[0][c] * weights[c];
    for (int k = 1; k < kTaps; ++k) sum += taps[k][c] * weights[k * channels + c];
    if constexpr (kKeep) before[c] = sum;
    out[c] = sum * sigmoid(sum);
  }
}

std::tuple<Tensor, Tensor> depthwise_conv_silu(const Tensor& x_, const Tensor& weight_, int64_t height,
                                               int64_t dilation, bool keep) {
  check_depthwise_conv(x_, weight_, height, dilation);
  const auto type = accumulation_type(x_);
  const Tensor converted = to(x_, type), x = converted.stride(2) == 1 ? converted : contiguous(converted);
  const Tensor weight = contiguous(to(weight_, type));
  const int64_t width = x.size(1) / height, channels = x.size(2);
  const Tensor out = empty(x, x.sizes(), type), before = keep ? empty(x, x.sizes(), type) : empty(x, {0}, type);
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    const auto *x_data = x.const_data_ptr<scalar_t>(), *weight_data = weight.const_data_ptr<scalar_t>();
    auto *out_data = out.mutable_data_ptr<scalar_t>(), *before_data = before.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> weights(kTaps * channels);
    for (int64_t c = 0; c < channels; ++c) {
      for (int k = 0; k < kTaps; ++k) weights[k * channels + c] = weight_data[c * kTaps + k];
    }
    const std::vector<scalar_t> beyond_the_map(channels);
    const int64_t image_step = x.stride(0), row_step = width * x.stride(1), step = x.stride(1);
    parallel_for(0, x.size(0) * height, 1, [&](int64_t begin, int64_t end) {
      std::array<const scalar_t*, kTaps> taps;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % height;
        const scalar_t* image = x_data + row / height * image_step;
        for (int64_t column = 0; column < width; ++column) {
          for (int k = 0; k < kTaps; ++k) {
            const int64_t i = y + (k / 3 - 1) * dilation, j = column + (k % 3 - 1) * dilation;
            const bool inside = i >= 0 && i < height && j >= 0 && j < width;
            taps[k] = inside ? image + i * row_step + j * step : beyond_the_map.data();
          }
          const int64_t to = (row * width + column) * channels;
          if (keep) {
            conv_silu_pixel<true>(taps, weights.data(), channels, out_data + to, before_data + to);
          } else {
            conv_silu_pixel<false>(taps, weights.data(), channels, out_data + to, before_data);
          }
        }
      }
    });
  });
  return {to(out, x_.scalar_type()), to(before, x_.scalar_type())};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) {
  m.impl("depthwise_conv_silu", TORCH_BOX(&grootvl::depthwise_conv_silu));
}
