// Checks that every kernel makes, whoever calls it: sizes and types that decide which memory is touched.
#pragma once

#include <ATen/ATen.h>

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace grootvl {

enum class Metric { kCosine, kEuclidean, kManhattan };

inline Metric parse_metric(const std::string& name) {
  if (name == "cosine") return Metric::kCosine;
  if (name == "euclidean") return Metric::kEuclidean;
  TORCH_CHECK_VALUE(name == "manhattan", "metric must be 'cosine', 'euclidean' or 'manhattan', got '", name, "'");
  return Metric::kManhattan;
}

enum class Direction { kBoth, kUp, kDown };

inline Direction parse_direction(const std::string_view name) {
  if (name == "both") return Direction::kBoth;
  if (name == "up") return Direction::kUp;
  TORCH_CHECK_VALUE(name == "down", "direction must be 'both', 'up' or 'down', got '", name, "'");
  return Direction::kDown;
}

inline int64_t num_grid_edges(int64_t height, int64_t width) { return (height - 1) * width + height * (width - 1); }

inline void check_features(const at::Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 4 && features.size(1) > 0 && features.size(2) > 0 && features.size(3) > 0,
                    "features must be (B, H, W, C) with at least one pixel and one channel, got ", features.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(features.scalar_type()), "features must be floating point, got ",
                   features.scalar_type());
}

inline void check_weights(const at::Tensor& weights, int64_t num_edges, int64_t num_vertices, int64_t root) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble,
                   "weights must be float32 or float64, got ", weights.scalar_type());
  TORCH_CHECK_VALUE(weights.dim() == 2 && weights.size(1) == num_edges, "weights must be (B, ", num_edges, "), got ",
                    weights.sizes());
  TORCH_CHECK_VALUE(num_vertices >= 1, "a tree needs at least one vertex, got ", num_vertices);
  TORCH_CHECK_VALUE(root >= 0 && root < num_vertices, "root must be from 0 to ", num_vertices - 1, ", got ", root);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;  // vertices and darts are numbered in 32 bits
  TORCH_CHECK_VALUE(num_vertices <= limit && num_edges <= limit, "a graph may have up to ", limit,
                    " vertices and edges, got ", num_vertices, " and ", num_edges);
}

inline void check_grid(const at::Tensor& weights, int64_t height, int64_t width, int64_t root) {
  TORCH_CHECK_VALUE(height >= 1 && width >= 1, "a map needs at least one pixel, got ", height, " x ", width);
  TORCH_CHECK_VALUE(height <= (int64_t{1} << 30) && width <= (int64_t{1} << 30) / height,
                    "a map may have up to 2^30 pixels, got ", height, " x ", width);
  check_weights(weights, num_grid_edges(height, width), height * width, root);
}

inline void check_graph(const at::Tensor& edges, const at::Tensor& weights, int64_t num_vertices, int64_t root) {
  TORCH_CHECK_TYPE(edges.scalar_type() == at::kInt || edges.scalar_type() == at::kLong,
                   "edges must be int32 or int64, got ", edges.scalar_type());
  TORCH_CHECK_VALUE(edges.dim() == 3 && edges.size(2) == 2, "edges must be (B, E, 2), got ", edges.sizes());
  check_weights(weights, edges.size(1), num_vertices, root);
  TORCH_CHECK_VALUE(edges.size(0) == weights.size(0), "edges and weights must have one batch size, got ", edges.sizes(),
                    " and ", weights.sizes());
  TORCH_CHECK_VALUE(edges.device() == weights.device(), "edges and weights must be on one device, got ", edges.device(),
                    " and ", weights.device());
}

inline void check_tree(const at::Tensor& x, const at::Tensor& parent, const at::Tensor& order,
                       const at::Tensor& subtree_size) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be (B, L, D), got ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  for (const at::Tensor* field : {&parent, &order, &subtree_size}) {
    TORCH_CHECK_VALUE(field->dim() == 2 && field->size(0) == x.size(0) && field->size(1) == x.size(1),
                      "the tree's fields must be (B, L) for x ", x.sizes(), ", got ", field->sizes());
    TORCH_CHECK_TYPE(field->scalar_type() == at::kInt, "the tree's fields must be int32, got ", field->scalar_type());
    TORCH_CHECK_VALUE(field->device() == x.device(), "x and the tree must be on one device, got ", x.device(), " and ",
                      field->device());
  }
}

// That a tensor belongs to x: the shape that is wanted, and x's dtype and device.
inline void check_like(const char* name, const at::Tensor& tensor, const char* x_name, const at::Tensor& x,
                       at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", sizes, " for ", x_name, " ", x.sizes(), ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), x_name, " and ", name, " must have one dtype, got ",
                   x.scalar_type(), " and ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), x_name, " and ", name, " must be on one device, got ", x.device(),
                    " and ", tensor.device());
}

// A parameter of a layer: a shape, any floating dtype, x's device.
inline void check_parameter(const char* name, const at::Tensor& tensor, const char* x_name, const at::Tensor& x,
                            at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be ", sizes, " for ", x_name, " ", x.sizes(), ", got ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), name, " must be floating point, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), x_name, " and ", name, " must be on one device, got ", x.device(),
                    " and ", tensor.device());
}

inline void check_scan(const at::Tensor& x, const at::Tensor& decay, const at::Tensor& parent, const at::Tensor& order,
                       const at::Tensor& subtree_size) {
  check_tree(x, parent, order, subtree_size);
  check_like("decay", decay, "x", x, x.sizes());
}

inline int64_t num_states(const at::Tensor& A_log) { return A_log.dim() == 2 ? A_log.size(1) : 1; }

inline void check_selective_scan(const at::Tensor& x, const at::Tensor& dt, const std::optional<at::Tensor>& dt_weight,
                                 const std::optional<at::Tensor>& dt_bias, const at::Tensor& A_log, const at::Tensor& B,
                                 const std::optional<at::Tensor>& C, const at::Tensor& parent, const at::Tensor& order,
                                 const at::Tensor& subtree_size) {
  check_tree(x, parent, order, subtree_size);
  TORCH_CHECK_VALUE(dt.dim() == 3 && dt.size(2) > 0, "dt must be (B, L, R) with R > 0, got ", dt.sizes());
  TORCH_CHECK_VALUE(A_log.dim() == 1 || (A_log.dim() == 2 && A_log.size(1) > 0),
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

inline void check_gated_norm(const at::Tensor& h, const at::Tensor& x, const at::Tensor& z, const at::Tensor& C,
                             const at::Tensor& D_skip, const at::Tensor& h_weight, const at::Tensor& h_bias,
                             const at::Tensor& out_weight, const at::Tensor& out_bias) {
  TORCH_CHECK_VALUE(h.dim() == 3 && h.size(2) > 0, "h must be (B, L, D) with D > 0, got ", h.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(h.scalar_type()), "h must be floating point, got ", h.scalar_type());
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

inline void check_layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0, "x must be (..., C) with C > 0, got ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "x must be floating point, got ", x.scalar_type());
  check_parameter("weight", weight, "x", x, {x.size(-1)});
  check_parameter("bias", bias, "x", x, {x.size(-1)});
}

}  // namespace grootvl
