// The norms: each pixel in one pass, while its channels are in the first cache.
// The equations stand in grootvl_ops/reference/norms.py, which also computes
// the gradients.

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "scan.h"
#include "vector_math.h"

namespace grootvl {
namespace {

template <typename scalar_t>
struct Moments {
  scalar_t mean, scale;  // scale: reciprocal deviation
};

template <typename scalar_t>
GROOTVL_INLINE Moments<scalar_t> moments(const scalar_t* x, int64_t channels, scalar_t eps) {
  scalar_t sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) sum += x[c];
  const scalar_t mean = sum / channels;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < channels; ++c) squares += (x[c] - mean) * (x[c] - mean);
  return {mean, 1 / std::sqrt(squares / channels + eps)};
}

template <typename scalar_t>
struct Norm {
  const scalar_t *weight, *bias;
  scalar_t eps;
};

template <typename scalar_t>
GROOTVL_VECTORIZED void layer_norm_row(const scalar_t* x, const Norm<scalar_t>& norm, int64_t channels, scalar_t* out,
                                       scalar_t* statistics) {
  const auto [mean, scale] = moments(x, channels, norm.eps);
  const scalar_t *weight = norm.weight, *bias = norm.bias;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
  statistics[0] = mean, statistics[1] = scale;
}

template <typename scalar_t>
GROOTVL_VECTORIZED void add_rows(const scalar_t* x, const scalar_t* branch, scalar_t factor, int64_t channels,
                                 scalar_t* sum) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) sum[c] = x[c] + factor * branch[c];
}

// `y` is memory for a row.
template <typename scalar_t>
GROOTVL_VECTORIZED void gated_norm_row(const scalar_t* h, const scalar_t* x, const scalar_t* z, scalar_t C,
                                       const scalar_t* D_skip, const Norm<scalar_t>& inner, const Norm<scalar_t>& outer,
                                       int64_t channels, scalar_t* y, scalar_t* out, scalar_t* statistics) {
  const auto [h_mean, h_scale] = moments(h, channels, inner.eps);
  const scalar_t *h_weight = inner.weight, *h_bias = inner.bias;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    y[c] = C * ((h[c] - h_mean) * h_scale * h_weight[c] + h_bias[c]) + D_skip[c] * x[c];
  }
  const auto [y_mean, y_scale] = moments(y, channels, outer.eps);
  const scalar_t *weight = outer.weight, *bias = outer.bias;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = ((y[c] - y_mean) * y_scale * weight[c] + bias[c]) * z[c] * sigmoid(z[c]);
  }
  statistics[0] = h_mean, statistics[1] = h_scale, statistics[2] = y_mean, statistics[3] = y_scale;
}

// Rows that a thread takes at least, so that there is enough to do.
int64_t rows_of_thread(int64_t channels) { return std::max<int64_t>(1, 16384 / channels); }

std::tuple<Tensor, Tensor> gated_norm(const Tensor& h_, const Tensor& x_, const Tensor& z_, const Tensor& C_,
                                      const Tensor& D_skip_, const Tensor& h_weight_, const Tensor& h_bias_,
                                      const Tensor& out_weight_, const Tensor& out_bias_, double eps) {
  check_gated_norm(h_, x_, z_, C_, D_skip_, h_weight_, h_bias_, out_weight_, out_bias_);
  const auto type = accumulation_type(h_);
  const Tensor h = rows_of(to(h_, type)), x = rows_of(to(x_, type)), z = rows_of(to(z_, type)),
               C = rows_of(to(C_, type));
  const auto parameter = [&](const Tensor& tensor) { return contiguous(to(tensor, type)); };
  const Tensor D_skip = parameter(D_skip_), h_weight = parameter(h_weight_), h_bias = parameter(h_bias_),
               out_weight = parameter(out_weight_), out_bias = parameter(out_bias_);
  const int64_t rows = h.size(0) * h.size(1), channels = h.size(2);
  const Tensor out = empty_like(h), statistics = empty(h, {h.size(0), h.size(1), 4}, type);
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    const Norm<scalar_t> inner{h_weight.const_data_ptr<scalar_t>(), h_bias.const_data_ptr<scalar_t>(), scalar_t(eps)};
    const Norm<scalar_t> outer{out_weight.const_data_ptr<scalar_t>(), out_bias.const_data_ptr<scalar_t>(),
                               scalar_t(eps)};
    const auto *h_data = h.const_data_ptr<scalar_t>(), *x_data = x.const_data_ptr<scalar_t>(),
               *z_data = z.const_data_ptr<scalar_t>(), *C_data = C.const_data_ptr<scalar_t>(),
               *skip = D_skip.const_data_ptr<scalar_t>();
    auto *out_data = out.mutable_data_ptr<scalar_t>(), *statistics_data = statistics.mutable_data_ptr<scalar_t>();
    const int64_t h_step = h.stride(1), x_step = x.stride(1), z_step = z.stride(1), C_step = C.stride(1);
    parallel_for(0, rows, rows_of_thread(channels), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> y(channels);
      for (int64_t i = begin; i < end; ++i) {
        gated_norm_row(h_data + i * h_step, x_data + i * x_step, z_data + i * z_step, C_data[i * C_step], skip, inner,
                       outer, channels, y.data(), out_data + i * channels, statistics_data + 4 * i);
      }
    });
  });
  return {to(out, h_.scalar_type()), statistics};
}

std::tuple<Tensor, Tensor> layer_norm(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, double eps,
                                      std::optional<ScalarType> dtype) {
  check_layer_norm(x_, weight_, bias_);
  const auto type = accumulation_type(x_);
  const Tensor x = contiguous(to(x_, type)), weight = contiguous(to(weight_, type)), bias = contiguous(to(bias_, type));
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  std::vector<int64_t> statistics_shape = x.sizes().vec();
  statistics_shape.back() = 2;
  const Tensor out = empty_like(x), statistics = empty(x, statistics_shape, type);
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    const Norm<scalar_t> norm{weight.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), scalar_t(eps)};
    const auto* x_data = x.const_data_ptr<scalar_t>();
    auto *out_data = out.mutable_data_ptr<scalar_t>(), *statistics_data = statistics.mutable_data_ptr<scalar_t>();
    parallel_for(0, rows, rows_of_thread(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        layer_norm_row(x_data + i * channels, norm, channels, out_data + i * channels, statistics_data + 2 * i);
      }
    });
  });
  return {to(out, dtype.value_or(x_.scalar_type())), statistics};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x_, const Tensor& branch_, const Tensor& weight_,
                                                  const Tensor& bias_, double eps, std::optional<ScalarType> dtype,
                                                  const std::optional<Tensor>& factors_) {
  check_add_layer_norm(x_, branch_, weight_, bias_, factors_);
  const auto type = accumulation_type(x_);
  const auto converted = [&](const Tensor& tensor) { return contiguous(to(tensor, type)); };
  const Tensor x = converted(x_), branch = converted(branch_), weight = converted(weight_), bias = converted(bias_);
  const Tensor factors = factors_ ? converted(*factors_) : Tensor();
  const int64_t channels = x.size(-1), rows = x.numel() / channels;
  const int64_t image_rows = factors_ ? rows / std::max<int64_t>(1, x.size(0)) : 0;
  std::vector<int64_t> statistics_shape = x.sizes().vec();
  statistics_shape.back() = 2;
  const Tensor sum = empty_like(x), out = empty_like(x), statistics = empty(x, statistics_shape, type);
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    const Norm<scalar_t> norm{weight.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), scalar_t(eps)};
    const auto *x_data = x.const_data_ptr<scalar_t>(), *branch_data = branch.const_data_ptr<scalar_t>(),
               *factor_data = factors_ ? factors.const_data_ptr<scalar_t>() : nullptr;
    auto *sum_data = sum.mutable_data_ptr<scalar_t>(), *out_data = out.mutable_data_ptr<scalar_t>(),
         *statistics_data = statistics.mutable_data_ptr<scalar_t>();
    parallel_for(0, rows, rows_of_thread(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* row = sum_data + i * channels;
        const scalar_t factor = factor_data ? factor_data[i / image_rows] : scalar_t(1);
        add_rows(x_data + i * channels, branch_data + i * channels, factor, channels, row);
        layer_norm_row(row, norm, channels, out_data + i * channels, statistics_data + 2 * i);
      }
    });
  });
  return {to(sum, x_.scalar_type()), to(out, dtype.value_or(x_.scalar_type())), statistics};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) {
  m.impl("gated_norm", TORCH_BOX(&grootvl::gated_norm));
  m.impl("layer_norm", TORCH_BOX(&grootvl::layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&grootvl::add_layer_norm));
}
