// The tree scan and its gradients: sweeps over the rows of (B, L, D) data in
// the tree's order, contiguous over channels. The equations stand in
// grootvl_ops/reference/scans.py.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "scan.h"
#include "vectorize.h"

namespace grootvl {
namespace {

// One tree, and the channels [begin, end) of its rows of `stride` values.
struct Block {
  const int32_t* parent;
  const int32_t* order;
  int64_t num_vertices;
  int64_t stride;
  int64_t begin;
  int64_t end;
};

// u_p += a_i u_i, from the leaves up; u holds x before.
template <typename scalar_t>
GROOTVL_VECTORIZED void up_sweep(const Block& block, const scalar_t* decay, scalar_t* u) {
  const int64_t n = block.end - block.begin;
  for (int64_t k = block.num_vertices - 1; k > 0; --k) {
    const int64_t i = block.order[k], p = block.parent[i];
    if (i == p) continue;
    const scalar_t* a = decay + i * block.stride + block.begin;
    const scalar_t* u_i = u + i * block.stride + block.begin;
    scalar_t* u_p = u + p * block.stride + block.begin;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) u_p[c] += a[c] * u_i[c];
  }
}

// h_i = (1 - a_i^2) u_i + a_i h_p, from the root down; h holds u before.
template <typename scalar_t>
GROOTVL_VECTORIZED void rerooting_sweep(const Block& block, const scalar_t* decay, scalar_t* h) {
  const int64_t n = block.end - block.begin;
  for (int64_t k = 0; k < block.num_vertices; ++k) {
    const int64_t i = block.order[k], p = block.parent[i];
    if (i == p) continue;
    const scalar_t* a = decay + i * block.stride + block.begin;
    scalar_t* h_i = h + i * block.stride + block.begin;
    const scalar_t* h_p = h + p * block.stride + block.begin;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) h_i[c] += a[c] * (h_p[c] - a[c] * h_i[c]);
  }
}

// h_i = x_i + a_i h_p, from the root down; h holds x before.
template <typename scalar_t>
GROOTVL_VECTORIZED void down_sweep(const Block& block, const scalar_t* decay, scalar_t* h) {
  const int64_t n = block.end - block.begin;
  for (int64_t k = 0; k < block.num_vertices; ++k) {
    const int64_t i = block.order[k], p = block.parent[i];
    if (i == p) continue;
    const scalar_t* a = decay + i * block.stride + block.begin;
    scalar_t* h_i = h + i * block.stride + block.begin;
    const scalar_t* h_p = h + p * block.stride + block.begin;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) h_i[c] += a[c] * h_p[c];
  }
}

// The rerooting sweeps of x and of the gradient, and the gradient of the edges;
// h and g hold u and G_u before.
template <typename scalar_t>
GROOTVL_VECTORIZED void rerooting_sweep_backward(const Block& block, const scalar_t* decay, scalar_t* h, scalar_t* g,
                                                 scalar_t* ddecay) {
  const int64_t n = block.end - block.begin;
  for (int64_t k = 0; k < block.num_vertices; ++k) {
    const int64_t i = block.order[k], p = block.parent[i];
    const int64_t row = i * block.stride + block.begin, above = p * block.stride + block.begin;
    scalar_t* da = ddecay + row;
    if (i == p) {
      std::fill(da, da + n, scalar_t(0));
      continue;
    }
    const scalar_t* a = decay + row;
    const scalar_t *h_p = h + above, *g_p = g + above;
    scalar_t *h_i = h + row, *g_i = g + row;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const scalar_t from_above = h_p[c] - a[c] * h_i[c], g_from_above = g_p[c] - a[c] * g_i[c];
      da[c] = g_i[c] * from_above + h_i[c] * g_from_above;
      h_i[c] += a[c] * from_above;
      g_i[c] += a[c] * g_from_above;
    }
  }
}

// A sweep down, and the gradient of the edges from it and from a sweep up: da_i
// = up_i down_p. Of the up scan, the sweep down is that of the gradient, which
// `down` holds before; of the down scan it is that of x.
template <typename scalar_t>
GROOTVL_VECTORIZED void down_sweep_backward(const Block& block, const scalar_t* decay, const scalar_t* up,
                                            scalar_t* down, scalar_t* ddecay) {
  const int64_t n = block.end - block.begin;
  for (int64_t k = 0; k < block.num_vertices; ++k) {
    const int64_t i = block.order[k], p = block.parent[i];
    const int64_t row = i * block.stride + block.begin, above = p * block.stride + block.begin;
    scalar_t* da = ddecay + row;
    if (i == p) {
      std::fill(da, da + n, scalar_t(0));
      continue;
    }
    const scalar_t *a = decay + row, *up_i = up + row, *down_p = down + above;
    scalar_t* down_i = down + row;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      da[c] = up_i[c] * down_p[c];
      down_i[c] += a[c] * down_p[c];
    }
  }
}

// Calls `sweep(batch, block)` in parallel for every tree and group of channels.
// Channels do not touch each other, so the grouping changes no result; groups
// are whole cache lines, as many as keep every thread busy.
template <typename Sweep>
void for_each_block(const Tensor& x, const Tensor& parent, const Tensor& order, Sweep sweep) {
  const int64_t batch = x.size(0), num_vertices = x.size(1), channels = x.size(2);
  if (x.numel() == 0) return;
  const int64_t line = 64 / x.element_size();
  const int64_t lines = (channels + line - 1) / line;
  const int64_t groups = std::min(lines, (2 * num_threads() + batch - 1) / batch);
  const int64_t width = (lines + groups - 1) / groups * line;
  const auto* parent_data = parent.const_data_ptr<int32_t>();
  const auto* order_data = order.const_data_ptr<int32_t>();
  parallel_for(0, batch * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / groups, begin = task % groups * width, end = std::min(begin + width, channels);
      if (begin >= end) continue;
      const int64_t offset = b * num_vertices;
      sweep(offset * channels, Block{parent_data + offset, order_data + offset, num_vertices, channels, begin, end});
    }
  });
}

// The kernels follow order and parents without further checks, so what is no
// tree must not get that far.
void check_order(const Tensor& parent, const Tensor& order) {
  const int64_t batch = parent.size(0), num_vertices = parent.size(1);
  const auto *parents = parent.const_data_ptr<int32_t>(), *orders = order.const_data_ptr<int32_t>();
  std::vector<char> seen;
  for (int64_t b = 0; b < batch; ++b) {
    seen.assign(num_vertices, false);
    for (int64_t k = 0; k < num_vertices; ++k) {
      const int64_t i = orders[b * num_vertices + k];
      GROOTVL_CHECK(i >= 0 && i < num_vertices && !seen[i], "the tree's order must hold each vertex from 0 to ",
                    num_vertices - 1, " once, got ", i, " at place ", k, " of image ", b);
      seen[i] = true;
      const int64_t p = parents[b * num_vertices + i];
      GROOTVL_CHECK(p >= 0 && p < num_vertices && seen[p], "the parent of vertex ", i, " of image ", b,
                    " must come before it in the tree's order, got ", p);
    }
  }
}

}  // namespace

void scan_in_place(const Tensor& h, const Tensor& decay, const Tensor& parent, const Tensor& order,
                   Direction direction) {
  for_accumulation_type(h.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    const auto* a_data = decay.const_data_ptr<scalar_t>();
    auto* h_data = h.mutable_data_ptr<scalar_t>();
    for_each_block(h, parent, order, [&](int64_t offset, const Block& block) {
      if (direction == Direction::kDown) {
        down_sweep(block, a_data + offset, h_data + offset);
        return;
      }
      up_sweep(block, a_data + offset, h_data + offset);
      if (direction == Direction::kBoth) rerooting_sweep(block, a_data + offset, h_data + offset);
    });
  });
}

std::pair<Tensor, Tensor> checked_tree(const Tensor& parent, const Tensor& order) {
  std::pair tree{contiguous(parent), contiguous(order)};
  check_order(tree.first, tree.second);
  return tree;
}

namespace {

Tensor tree_scan(const Tensor& x, const Tensor& decay, const Tensor& parent_, const Tensor& order_,
                 const Tensor& subtree_size, std::string_view direction) {
  check_scan(x, decay, parent_, order_, subtree_size);
  const auto [parent, order] = checked_tree(parent_, order_);
  const auto type = accumulation_type(x);
  const Tensor h = copy_as(x, type);
  scan_in_place(h, contiguous(to(decay, type)), parent, order, parse_direction(direction));
  return to(h, x.scalar_type());
}

std::tuple<Tensor, Tensor> tree_scan_backward(const Tensor& grad, const Tensor& x, const Tensor& decay,
                                              const Tensor& parent_, const Tensor& order_, const Tensor& subtree_size,
                                              std::string_view direction_name) {
  check_scan(x, decay, parent_, order_, subtree_size);
  check_like("grad", grad, "x", x, x.sizes());
  const Direction direction = parse_direction(direction_name);
  const auto [parent, order] = checked_tree(parent_, order_);
  const auto type = accumulation_type(x);
  const Tensor a = contiguous(to(decay, type));
  // h: what becomes of x; g: what becomes of the gradient.
  const Tensor h = copy_as(x, type), g = copy_as(grad, type), da = empty_like(h);
  for_accumulation_type(type, [&](auto value) {
    using scalar_t = decltype(value);
    const auto* a_data = a.const_data_ptr<scalar_t>();
    auto* h_data = h.mutable_data_ptr<scalar_t>();
    auto* g_data = g.mutable_data_ptr<scalar_t>();
    auto* da_data = da.mutable_data_ptr<scalar_t>();
    for_each_block(h, parent, order, [&](int64_t offset, const Block& block) {
      const auto* a_block = a_data + offset;
      auto *h_block = h_data + offset, *g_block = g_data + offset, *da_block = da_data + offset;
      if (direction != Direction::kDown) up_sweep(block, a_block, h_block);
      if (direction != Direction::kUp) up_sweep(block, a_block, g_block);
      if (direction == Direction::kBoth) {
        rerooting_sweep_backward(block, a_block, h_block, g_block, da_block);
      } else if (direction == Direction::kUp) {
        down_sweep_backward(block, a_block, h_block, g_block, da_block);
      } else {
        down_sweep_backward(block, a_block, g_block, h_block, da_block);
      }
    });
  });
  return {to(g, x.scalar_type()), to(da, decay.scalar_type())};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) {
  m.impl("tree_scan", TORCH_BOX(&grootvl::tree_scan));
  m.impl("tree_scan_backward", TORCH_BOX(&grootvl::tree_scan_backward));
}
