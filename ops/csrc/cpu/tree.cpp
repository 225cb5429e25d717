// Minimum spanning trees (Kruskal's algorithm over radix-sorted weights),
// rooted and ordered.

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"

namespace grootvl {
namespace {

using Edge = std::pair<int32_t, int32_t>;

// Unsigned integers that compare as the weights do; every NaN is the largest,
// -0 equals 0.
uint32_t sort_key(float weight) {
  uint32_t bits;
  weight += 0.0f;
  std::memcpy(&bits, &weight, sizeof bits);
  if (weight != weight) return UINT32_MAX;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

uint64_t sort_key(double weight) {
  uint64_t bits;
  weight += 0.0;
  std::memcpy(&bits, &weight, sizeof bits);
  if (weight != weight) return UINT64_MAX;
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// Edge numbers by rising weight, equal weights by rising number: a stable radix
// sort, 11 bits a pass.
template <typename scalar_t>
std::vector<int32_t> sorted_edges(const scalar_t* weights, int64_t num_edges) {
  using Key = decltype(sort_key(scalar_t()));
  constexpr int kBits = 11, kPasses = (8 * sizeof(Key) + kBits - 1) / kBits;
  constexpr Key kMask = (Key(1) << kBits) - 1;
  std::vector<std::pair<Key, int32_t>> items(num_edges), sorted(num_edges);
  std::array<std::array<int32_t, 1 << kBits>, kPasses> counts{};
  for (int64_t e = 0; e < num_edges; ++e) {
    const Key key = sort_key(weights[e]);
    items[e] = {key, static_cast<int32_t>(e)};
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][(key >> (pass * kBits)) & kMask];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& offsets = counts[pass];
    if (*std::max_element(offsets.begin(), offsets.end()) == num_edges) continue;  // all alike in these bits
    std::exclusive_scan(offsets.begin(), offsets.end(), offsets.begin(), 0);
    for (const auto& item : items) sorted[offsets[(item.first >> (pass * kBits)) & kMask]++] = item;
    items.swap(sorted);
  }
  std::vector<int32_t> edges(num_edges);
  for (int64_t i = 0; i < num_edges; ++i) edges[i] = items[i].second;
  return edges;
}

// The edges of the minimum spanning tree. `edge_at(e)` names the end points of
// edge e.
template <typename scalar_t, typename EdgeAt>
std::vector<Edge> spanning_tree(const scalar_t* weights, int64_t num_edges, int64_t num_vertices, EdgeAt edge_at) {
  std::vector<int32_t> component(num_vertices);
  std::iota(component.begin(), component.end(), 0);
  const auto find = [&](int32_t v) {
    while (component[v] != v) v = component[v] = component[component[v]];
    return v;
  };
  std::vector<Edge> tree;
  tree.reserve(num_vertices - 1);
  for (const int32_t e : sorted_edges(weights, num_edges)) {
    const Edge edge = edge_at(e);
    const int32_t u = find(edge.first), v = find(edge.second);
    if (u == v) continue;
    component[std::max(u, v)] = std::min(u, v);
    tree.push_back(edge);
    if (static_cast<int64_t>(tree.size()) == num_vertices - 1) break;
  }
  GROOTVL_CHECK(static_cast<int64_t>(tree.size()) == num_vertices - 1, "the graph is not connected: a tree over ",
                num_vertices, " vertices needs ", num_vertices - 1, " edges, but only ", tree.size(),
                " of those given join different parts");
  return tree;
}

// Parent, order and subtree size of one tree, as documented at
// grootvl_ops.Tree.
void root_tree(const std::vector<Edge>& tree, int64_t num_vertices, int32_t root, int32_t* parent, int32_t* order,
               int32_t* size) {
  std::vector<int32_t> first(num_vertices + 1, 0), neighbours(2 * tree.size());
  for (const auto& [u, v] : tree) ++first[u + 1], ++first[v + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int32_t> next(first.begin(), first.end() - 1);
  for (const auto& [u, v] : tree) neighbours[next[u]++] = v, neighbours[next[v]++] = u;

  std::vector<int32_t> breadth_first;
  breadth_first.reserve(num_vertices);
  breadth_first.push_back(root);
  parent[root] = root;
  for (int64_t i = 0; i < num_vertices; ++i) {
    const int32_t v = breadth_first[i];
    for (int32_t n = first[v]; n < first[v + 1]; ++n) {
      const int32_t child = neighbours[n];
      if (child == parent[v]) continue;
      parent[child] = v;
      breadth_first.push_back(child);
    }
  }

  std::fill(size, size + num_vertices, 1);
  for (int64_t i = num_vertices - 1; i > 0; --i) size[parent[breadth_first[i]]] += size[breadth_first[i]];

  // A vertex's place in the preorder follows from its parent's place and the
  // sizes of the siblings before it.
  std::vector<int32_t> position(num_vertices);
  position[root] = 0;
  for (const int32_t v : breadth_first) {
    order[position[v]] = v;
    const auto begin = neighbours.begin() + first[v], end = neighbours.begin() + first[v + 1];
    std::sort(begin, end, [&](int32_t c, int32_t d) { return std::tie(size[c], c) < std::tie(size[d], d); });
    int32_t place = position[v] + 1;
    for (auto child = begin; child != end; ++child) {
      if (parent[*child] != v || *child == v) continue;
      position[*child] = place;
      place += size[*child];
    }
  }
}

// Trees of a batch; `edge_at(b, e)` names the end points of edge e of graph b.
template <typename EdgeAt>
std::tuple<Tensor, Tensor, Tensor> build(const Tensor& weights_, int64_t num_vertices, int64_t root, EdgeAt edge_at) {
  const Tensor weights = contiguous(weights_);
  const int64_t batch = weights.size(0), num_edges = weights.size(1);
  const Tensor parent = empty(weights, {batch, num_vertices}, ScalarType::Int);
  const Tensor order = empty_like(parent), subtree_size = empty_like(parent);
  auto* parent_data = parent.mutable_data_ptr<int32_t>();
  auto* order_data = order.mutable_data_ptr<int32_t>();
  auto* size_data = subtree_size.mutable_data_ptr<int32_t>();
  for_accumulation_type(weights.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    const auto* weight_data = weights.const_data_ptr<scalar_t>();
    parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto tree = spanning_tree(weight_data + b * num_edges, num_edges, num_vertices,
                                        [&](int32_t e) { return edge_at(b, e); });
        const int64_t offset = b * num_vertices;
        root_tree(tree, num_vertices, static_cast<int32_t>(root), parent_data + offset, order_data + offset,
                  size_data + offset);
      }
    });
  });
  return {parent, order, subtree_size};
}

std::tuple<Tensor, Tensor, Tensor> grid_tree(const Tensor& weights, int64_t height, int64_t width, int64_t root) {
  check_grid(weights, height, width, root);
  const int64_t num_vertical = (height - 1) * width;
  return build(weights, height * width, root, [=](int64_t, int64_t e) -> Edge {
    if (e < num_vertical) return {static_cast<int32_t>(e), static_cast<int32_t>(e + width)};
    const int64_t horizontal = e - num_vertical;
    const int64_t left = horizontal / (width - 1) * width + horizontal % (width - 1);
    return {static_cast<int32_t>(left), static_cast<int32_t>(left + 1)};
  });
}

std::tuple<Tensor, Tensor, Tensor> graph_tree(const Tensor& edges, const Tensor& weights, int64_t num_vertices,
                                              int64_t root) {
  check_graph(edges, weights, num_vertices, root);
  // Before memory for that many vertices is asked for.
  GROOTVL_CHECK(weights.size(0) == 0 || weights.size(1) >= num_vertices - 1, "the graph is not connected: a tree over ",
                num_vertices, " vertices needs ", num_vertices - 1, " edges, but only ", weights.size(1), " are given");
  const Tensor ends = copy_as(edges, ScalarType::Long);
  const auto* data = ends.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(data, data + ends.numel());
  GROOTVL_CHECK(ends.numel() == 0 || (*low >= 0 && *high < num_vertices), "edges must name vertices from 0 to ",
                num_vertices - 1, ", got ", *low, " to ", *high);
  const int64_t num_edges = weights.size(1);
  return build(weights, num_vertices, root, [=](int64_t b, int64_t e) -> Edge {
    const int64_t* edge = data + 2 * (b * num_edges + e);
    return {static_cast<int32_t>(edge[0]), static_cast<int32_t>(edge[1])};
  });
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CPU, m) {
  m.impl("grid_tree", TORCH_BOX(&grootvl::grid_tree));
  m.impl("graph_tree", TORCH_BOX(&grootvl::graph_tree));
}
