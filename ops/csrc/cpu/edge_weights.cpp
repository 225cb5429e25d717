// Edge weights of the 4-neighbour grid: how unlike two neighbouring feature
// vectors are (paper, section 3.2).

#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "vectorize.h"

namespace grootvl {
namespace {

template <typename scalar_t>
GROOTVL_VECTORIZED scalar_t dot(const scalar_t* f, const scalar_t* g, int64_t n) {
  scalar_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += f[i] * g[i];
  }
  return sum;
}

template <typename scalar_t>
GROOTVL_VECTORIZED scalar_t squared_distance(const scalar_t* f, const scalar_t* g, int64_t n) {
  scalar_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += (f[i] - g[i]) * (f[i] - g[i]);
  }
  return sum;
}

template <typename scalar_t>
GROOTVL_VECTORIZED scalar_t absolute_distance(const scalar_t* f, const scalar_t* g, int64_t n) {
  scalar_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += std::abs(f[i] - g[i]);
  }
  return sum;
}

template <typename scalar_t>
void edge_weights_kernel(const scalar_t* features, scalar_t* weights, Metric metric, int64_t batch, int64_t height,
                         int64_t width, int64_t channels) {
  const int64_t num_edges = num_grid_edges(height, width);
  const int64_t num_vertical = (height - 1) * width;
  std::vector<scalar_t> norms(metric == Metric::kCosine ? batch * height * width : 0);
  if (metric == Metric::kCosine) {
    parallel_for(0, batch * height * width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* f = features + i * channels;
        norms[i] = std::max(std::sqrt(dot(f, f, channels)), scalar_t(1e-8));
      }
    });
  }
  const auto weight = [&](int64_t i, int64_t j) {
    const scalar_t* f = features + i * channels;
    const scalar_t* g = features + j * channels;
    switch (metric) {
      case Metric::kCosine:
        return std::exp(-dot(f, g, channels) / (norms[i] * norms[j]));
      case Metric::kEuclidean:
        return std::sqrt(squared_distance(f, g, channels));
      default:
        return absolute_distance(f, g, channels);
    }
  };
  parallel_for(0, batch * height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / height, y = row % height;
      scalar_t* vertical = weights + b * num_edges + y * width;
      scalar_t* horizontal = weights + b * num_edges + num_vertical + y * (width - 1);
      for (int64_t x = 0; x < width; ++x) {
        const int64_t i = row * width + x;
        if (y + 1 < height) vertical[x] = weight(i, i + width);
        if (x + 1 < width) horizontal[x] = weight(i, i + 1);
      }
    }
  });
}

Tensor edge_weights(const Tensor& features, const std::string& metric_name) {
  check_features(features);
  const Metric metric = parse_metric(metric_name);
  const ScalarType dtype = accumulation_type(features);
  const Tensor input = contiguous(to(features, dtype));
  const int64_t batch = input.size(0), height = input.size(1), width = input.size(2);
  Tensor weights = empty(input, {batch, num_grid_edges(height, width)}, dtype);
  for_accumulation_type(dtype, [&](auto value) {
    using scalar_t = decltype(value);
    edge_weights_kernel(input.const_data_ptr<scalar_t>(), weights.mutable_data_ptr<scalar_t>(), metric, batch, height,
                        width, input.size(3));
  });
  return weights;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) { m.impl("edge_weights", TORCH_BOX(&grootvl::edge_weights)); }
