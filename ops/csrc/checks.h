// Checks that every kernel makes, whoever calls it: sizes and types that decide which memory is touched.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace grootvl {

enum class Metric { kCosine, kEuclidean, kManhattan };

inline Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::kCosine;
  if (name == "euclidean") return Metric::kEuclidean;
  GROOTVL_CHECK(name == "manhattan", "metric must be 'cosine', 'euclidean' or 'manhattan', got '", name, "'");
  return Metric::kManhattan;
}

enum class Direction { kBoth, kUp, kDown };

inline Direction parse_direction(const std::string_view name) {
  if (name == "both") return Direction::kBoth;
  if (name == "up") return Direction::kUp;
  GROOTVL_CHECK(name == "down", "direction must be 'both', 'up' or 'down', got '", name, "'");
  return Direction::kDown;
}

// That of a scan of one sweep.
inline Direction parse_one_sweep(const std::string_view name) {
  GROOTVL_CHECK(name == "up" || name == "down", "direction must be 'up' or 'down', got '", name, "'");
  return parse_direction(name);
}

inline int64_t num_grid_edges(int64_t height, int64_t width) { return (height - 1) * width + height * (width - 1); }

inline void check_features(const Tensor& features) {
  GROOTVL_CHECK(features.dim() == 4 && features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
                "features must be (B, H, W, C) with at least one pixel and one channel, got ", features.sizes());
  GROOTVL_CHECK(is_floating(features.scalar_type()), "features must be floating point, got ", features.scalar_type());
}

inline void check_neighbour_cosines(const Tensor& x, int64_t neighbours) {
  GROOTVL_CHECK(x.dim() == 3 && x.size(2) > 0, "x must be (B, L, D) with D > 0, got ", x.sizes());
  GROOTVL_CHECK(is_floating(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  GROOTVL_CHECK(neighbours >= 1, "neighbours must be at least 1, got ", neighbours);
}

inline void check_weights(const Tensor& weights, int64_t num_edges, int64_t num_vertices, int64_t root) {
  GROOTVL_CHECK(weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double,
                "weights must be float32 or float64, got ", weights.scalar_type());
  GROOTVL_CHECK(weights.dim() == 2 && weights.size(1) == num_edges, "weights must be (B, ", num_edges, "), got ",
                weights.sizes());
  GROOTVL_CHECK(num_vertices >= 1, "a tree needs at least one vertex, got ", num_vertices);
  GROOTVL_CHECK(root >= 0 && root < num_vertices, "root must be from 0 to ", num_vertices - 1, ", got ", root);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;  // vertices and darts are numbered in 32 bits
  GROOTVL_CHECK(num_vertices <= limit && num_edges <= limit, "a graph may have up to ", limit,
                " vertices and edges, got ", num_vertices, " and ", num_edges);
}

inline void check_grid(const Tensor& weights, int64_t height, int64_t width, int64_t root) {
  GROOTVL_CHECK(height >= 1 && width >= 1, "a map needs at least one pixel, got ", height, " x ", width);
  GROOTVL_CHECK(height <= (int64_t{1} << 30) && width <= (int64_t{1} << 30) / height,
                "a map may have up to 2^30 pixels, got ", height, " x ", width);
  check_weights(weights, num_grid_edges(height, width), height * width, root);
}

inline void check_graph(const Tensor& edges, const Tensor& weights, int64_t num_vertices, int64_t root) {
  GROOTVL_CHECK(edges.scalar_type() == ScalarType::Int || edges.scalar_type() == ScalarType::Long,
                "edges must be int32 or int64, got ", edges.scalar_type());
  GROOTVL_CHECK(edges.dim() == 3 && edges.size(2) == 2, "edges must be (B, E, 2), got ", edges.sizes());
  check_weights(weights, edges.size(1), num_vertices, root);
  GROOTVL_CHECK(edges.size(0) == weights.size(0), "edges and weights must have one batch size, got ", edges.sizes(),
                " and ", weights.sizes());
  GROOTVL_CHECK(edges.device() == weights.device(), "edges and weights must be on one device, got ", edges.device(),
                " and ", weights.device());
}

// `trees`: how many there must be; by default one for each image.
inline void check_tree(const Tensor& x, const Tensor& parent, const Tensor& order, const Tensor& subtree_size,
                       std::optional<int64_t> trees = {}) {
  GROOTVL_CHECK(x.dim() == 3, "x must be (B, L, D), got ", x.sizes());
  GROOTVL_CHECK(is_floating(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  for (const Tensor* field : {&parent, &order, &subtree_size}) {
    GROOTVL_CHECK(field->dim() == 2 && field->size(0) == trees.value_or(x.size(0)) && field->size(1) == x.size(1),
                  "the tree's fields must be ", trees ? "(K, L)" : "(B, L)", " for x ", x.sizes(), ", got ",
                  field->sizes());
    GROOTVL_CHECK(field->scalar_type() == ScalarType::Int, "the tree's fields must be int32, got ",
                  field->scalar_type());
    GROOTVL_CHECK(field->device() == x.device(), "x and the tree must be on one device, got ", x.device(), " and ",
                  field->device());
  }
}

// That a tensor belongs to x: the shape that is wanted, and x's dtype and device.
inline void check_like(const char* name, const Tensor& tensor, const char* x_name, const Tensor& x, Sizes sizes) {
  GROOTVL_CHECK(tensor.sizes().equals(sizes), name, " must be ", sizes, " for ", x_name, " ", x.sizes(), ", got ",
                tensor.sizes());
  GROOTVL_CHECK(tensor.scalar_type() == x.scalar_type(), x_name, " and ", name, " must have one dtype, got ",
                x.scalar_type(), " and ", tensor.scalar_type());
  GROOTVL_CHECK(tensor.device() == x.device(), x_name, " and ", name, " must be on one device, got ", x.device(),
                " and ", tensor.device());
}

// A parameter of a layer: a shape, any floating dtype, x's device.
inline void check_parameter(const char* name, const Tensor& tensor, const char* x_name, const Tensor& x, Sizes sizes) {
  GROOTVL_CHECK(tensor.sizes().equals(sizes), name, " must be ", sizes, " for ", x_name, " ", x.sizes(), ", got ",
                tensor.sizes());
  GROOTVL_CHECK(is_floating(tensor.scalar_type()), name, " must be floating point, got ", tensor.scalar_type());
  GROOTVL_CHECK(tensor.device() == x.device(), x_name, " and ", name, " must be on one device, got ", x.device(),
                " and ", tensor.device());
}

inline void check_scan(const Tensor& x, const Tensor& decay, const Tensor& parent, const Tensor& order,
                       const Tensor& subtree_size) {
  check_tree(x, parent, order, subtree_size);
  check_like("decay", decay, "x", x, x.sizes());
}

inline int64_t num_states(const Tensor& A_log) { return A_log.dim() == 2 ? A_log.size(1) : 1; }

inline void check_selective_scan(const Tensor& x, const Tensor& dt, const std::optional<Tensor>& dt_weight,
                                 const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                                 const std::optional<Tensor>& C, const Tensor& parent, const Tensor& order,
                                 const Tensor& subtree_size) {
  check_tree(x, parent, order, subtree_size);
  GROOTVL_CHECK(dt.dim() == 3 && dt.size(2) > 0, "dt must be (B, L, R) with R > 0, got ", dt.sizes());
  GROOTVL_CHECK(A_log.dim() == 1 || (A_log.dim() == 2 && A_log.size(1) > 0),
                "A_log must be (D) or (D, N) with N > 0, got ", A_log.sizes());
  const int64_t channels = x.size(2), rank = dt_weight ? dt.size(2) : channels;
  std::vector<int64_t> pixels{x.size(0), x.size(1)}, rates{channels};
  if (A_log.dim() == 2) pixels.push_back(A_log.size(1)), rates.push_back(A_log.size(1));
  check_like("dt", dt, "x", x, {x.size(0), x.size(1), rank});
  check_like("B", B, "x", x, pixels);
  if (C) check_like("C", *C, "x", x, pixels);
  if (dt_weight) check_parameter("dt_weight", *dt_weight, "x", x, {channels, rank});
  if (dt_bias) check_parameter("dt_bias", *dt_bias, "x", x, {channels});
  check_parameter("A_log", A_log, "x", x, rates);
}

inline void check_stepped_scan(const Tensor& x, const Tensor& dt, const Tensor& decay_dt, const Tensor& A_log,
                               const Tensor& B, const Tensor& C, const Tensor& parent, const Tensor& order,
                               const Tensor& subtree_size) {
  check_selective_scan(x, dt, {}, {}, A_log, B, C, parent, order, subtree_size);
  GROOTVL_CHECK(A_log.dim() == 2, "A_log must be (D, N), got ", A_log.sizes());
  check_like("decay_dt", decay_dt, "x", x, x.sizes());
}

inline void check_merged_scan(const Tensor& x, const Tensor& dt, const Tensor& dt_weight,
                              const std::optional<Tensor>& dt_bias, const Tensor& A_log, const Tensor& B,
                              const Tensor& C, const std::optional<Tensor>& D_skip, const Tensor& parent,
                              const Tensor& order, const Tensor& subtree_size, std::optional<ScalarType> dtype) {
  GROOTVL_CHECK(dt.dim() == 4 && dt.size(2) > 0 && dt.size(3) > 0, "dt must be (B, L, K, R) with K > 0 and R > 0, got ",
                dt.sizes());
  const int64_t groups = dt.size(2);
  check_tree(x, parent, order, subtree_size, groups);
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2);
  check_like("dt", dt, "x", x, {batch, length, groups, dt.size(3)});
  check_like("B", B, "x", x, {batch, length, groups});
  check_like("C", C, "x", x, {batch, length, groups});
  check_parameter("dt_weight", dt_weight, "x", x, {groups, channels, dt.size(3)});
  if (dt_bias) check_parameter("dt_bias", *dt_bias, "x", x, {groups, channels});
  check_parameter("A_log", A_log, "x", x, {groups, channels});
  if (D_skip) check_parameter("D_skip", *D_skip, "x", x, {channels});
  GROOTVL_CHECK(!dtype || *dtype == x.scalar_type() || *dtype == accumulation_type(x),
                "dtype must be that of x or the one in which it is added up, got ", *dtype, " for ", x.scalar_type());
}

inline void check_gated_norm(const Tensor& h, const Tensor& x, const Tensor& z, const Tensor& C, const Tensor& D_skip,
                             const Tensor& h_weight, const Tensor& h_bias, const Tensor& out_weight,
                             const Tensor& out_bias) {
  GROOTVL_CHECK(h.dim() == 3 && h.size(2) > 0, "h must be (B, L, D) with D > 0, got ", h.sizes());
  GROOTVL_CHECK(is_floating(h.scalar_type()), "h must be floating point, got ", h.scalar_type());
  check_like("x", x, "h", h, h.sizes());
  check_like("z", z, "h", h, h.sizes());
  check_like("C", C, "h", h, {h.size(0), h.size(1)});
  const int64_t channels = h.size(2);
  check_parameter("D_skip", D_skip, "h", h, {channels});
  check_parameter("h_weight", h_weight, "h", h, {channels});
  check_parameter("h_bias", h_bias, "h", h, {channels});
  check_parameter("out_weight", out_weight, "h", h, {channels});
  check_parameter("out_bias", out_bias, "h", h, {channels});
}

inline void check_depthwise_conv(const Tensor& x, const Tensor& weight, int64_t height, int64_t dilation) {
  GROOTVL_CHECK(x.dim() == 3, "x must be (B, L, D), got ", x.sizes());
  GROOTVL_CHECK(is_floating(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  GROOTVL_CHECK(height >= 1 && x.size(1) % height == 0, "height must divide L, got ", height, " for x ", x.sizes());
  check_parameter("weight", weight, "x", x, {x.size(2), 1, 3, 3});
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;  // rows and columns are numbered in 32 bits
  GROOTVL_CHECK(dilation >= 1 && dilation <= limit && x.size(1) <= limit, "dilation and L must be at most ", limit,
                " and dilation at least 1, got ", dilation, " for x ", x.sizes());
}

// Columns are numbered in 32 bits.
inline void check_columns(const char* name, const Tensor& matrix) {
  GROOTVL_CHECK(matrix.dim() == 2, name, " must be (rows, columns), got ", matrix.sizes());
  GROOTVL_CHECK(is_floating(matrix.scalar_type()), name, " must be floating point, got ", matrix.scalar_type());
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;
  GROOTVL_CHECK(matrix.size(1) <= limit, name, " may have ", limit, " columns, got ", matrix.size(1));
}

inline void check_cast_weights(const std::vector<Tensor>& weights, const std::vector<int64_t>& rows,
                               const std::vector<int64_t>& columns, ScalarType dtype) {
  GROOTVL_CHECK(!weights.empty(), "weights must be at least one, got none");
  GROOTVL_CHECK(rows.size() == weights.size() && columns.size() == weights.size(),
                "rows and columns must be as many as weights, ", weights.size(), ", got ", rows.size(), " and ",
                columns.size());
  GROOTVL_CHECK(is_floating(dtype), "dtype must be floating point, got ", dtype);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    GROOTVL_CHECK(weight.dim() == 1 || weight.dim() == 2, "weights must be vectors or matrices, got ", weight.sizes());
    GROOTVL_CHECK(is_floating(weight.scalar_type()) && weight.scalar_type() == weights[0].scalar_type() &&
                      weight.is_cuda() == weights[0].is_cuda() &&
                      weight.get_device_index() == weights[0].get_device_index(),
                  "weights must be of one floating point type, on one device");
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    GROOTVL_CHECK(rows[i] >= 0 && columns[i] >= 0 && columns[i] <= limit && (weight.dim() == 2 || rows[i] == 1),
                  "a weight ", weight.sizes(), " cannot have ", rows[i], " rows of ", columns[i]);
  }
}

inline void check_gelu_mlp_backward(const Tensor& dhidden, const Tensor& before) {
  check_columns("before", before);
  check_like("dhidden", dhidden, "before", before, before.sizes());
}

inline void check_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  GROOTVL_CHECK(x.dim() >= 1 && x.size(-1) > 0, "x must be (..., C) with C > 0, got ", x.sizes());
  GROOTVL_CHECK(is_floating(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  check_parameter("weight", weight, "x", x, {x.size(-1)});
  check_parameter("bias", bias, "x", x, {x.size(-1)});
}

inline void check_layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& statistics) {
  GROOTVL_CHECK(grad.sizes().equals(x.sizes()) && grad.device() == x.device(), "grad must be as x, ", x.sizes(), " on ",
                x.device(), ", got ", grad.sizes(), " on ", grad.device());
  GROOTVL_CHECK(statistics.numel() * x.size(-1) == 2 * x.numel() && statistics.device() == x.device() &&
                    statistics.scalar_type() == accumulation_type(x),
                "statistics must be those of the forward pass");
}

// One factor for each image.
inline void check_factors(const std::optional<Tensor>& factors, const Tensor& x) {
  if (!factors) return;
  GROOTVL_CHECK(x.dim() >= 2, "x must be (B, ..., C) to have factors, got ", x.sizes());
  check_parameter("factors", *factors, "x", x, {x.size(0)});
}

inline void check_add_layer_norm(const Tensor& x, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                                 const std::optional<Tensor>& factors) {
  check_layer_norm(x, weight, bias);
  check_parameter("branch", branch, "x", x, x.sizes());
  check_factors(factors, x);
}

}  // namespace grootvl
