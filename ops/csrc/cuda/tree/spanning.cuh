// Minimum spanning trees by Boruvka's algorithm: each part of the growing forest chooses the lightest edge that leaves
// it, and the parts that these edges join become one, until one part is left.
//
// The edges' total order (weight, then number) makes the tree unique, so the result does not depend on the order in
// which threads run. Parts are named by one of their vertices, their label.

#pragma once

#include "team.cuh"

namespace grootvl {

// An edge by its place in the total order: the order of its weight in the upper half, its number in the lower.
using EdgeKey = unsigned long long;
constexpr EdgeKey kNoEdge = ~EdgeKey(0);

// Unsigned numbers in the order of the weights. -0 equals 0, all NaN are equal and come last.
__device__ __forceinline__ unsigned ordered_bits(float weight) {
  const unsigned bits = __float_as_uint(weight);
  const unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;
  if (magnitude == 0) return 0x80000000u;
  return bits == magnitude ? bits | 0x80000000u : ~bits;
}

__device__ __forceinline__ EdgeKey edge_key(const float* weights, int edge) {
  return EdgeKey(ordered_bits(__ldg(weights + edge))) << 32 | static_cast<unsigned>(edge);
}

struct Ends {
  int first;
  int second;
};

// Most keys are not lower; reading first avoids most atomic operations, which take longer. The read may miss a lower
// key that another thread has just written; the atomic operation does not.
__device__ __forceinline__ void lower(EdgeKey* best, EdgeKey key) {
  if (key < *const_cast<volatile EdgeKey*>(best)) atomicMin(best, key);
}

// The same for a warp of neighbouring vertices. Of neighbouring lanes with one label only the first accesses memory:
// many atomic operations on one address of global memory would wait for each other. Every lane of the warp must call
// it.
__device__ __forceinline__ void lower_by_label(EdgeKey* best, int label, EdgeKey key) {
  const int lane = threadIdx.x % kWarpLanes;
  for (int offset = 1; offset < kWarpLanes; offset *= 2) {
    const int other_label = __shfl_down_sync(kAllLanes, label, offset);
    const EdgeKey other_key = __shfl_down_sync(kAllLanes, key, offset);
    if (lane + offset < kWarpLanes && other_label == label && other_key < key) key = other_key;
  }
  const int label_before = __shfl_up_sync(kAllLanes, label, 1);
  if (key != kNoEdge && (lane == 0 || label_before != label)) lower(best + label, key);
}

// The data of a growing forest, for each vertex; Index holds a vertex number.
template <typename Index>
struct Forest {
  EdgeKey* best;  // the lightest edge that leaves a part, at its label
  Index* label;   // of the part that a vertex is in
  Index* hook;    // the part that a part joins, at its label
};

// Grows the forest and returns the number of trees, 1 on a connected graph. Only if there are several are the final
// labels filled in. `Graph` tells the rest:
//   propose(team, forest)     lowers best[label] to the key of the lightest edge that leaves the part
//   ends(edge)                the two vertices of an edge
//   join(label, edge, ends)   records a tree edge; called once for each label whose part joins another one
template <typename Team, typename Graph, typename Index>
__device__ __forceinline__ int grow_forest(Team& team, const Graph& graph, const Forest<Index>& forest, int vertices) {
  constexpr int kJumps = 16;
  for (int v = team.rank(); v < vertices; v += team.size()) {
    forest.label[v] = static_cast<Index>(v);
    forest.best[v] = kNoEdge;
  }
  team.sync();
  for (int parts = vertices;;) {
    graph.propose(team, forest);
    team.sync();

    int staying = 0;
    for (int v = team.rank(); v < vertices; v += team.size()) {
      if (forest.label[v] != v) continue;
      const EdgeKey key = forest.best[v];
      int target = v;
      if (key != kNoEdge) {
        const int edge = static_cast<int>(static_cast<unsigned>(key));
        const Ends ends = graph.ends(edge);
        target = forest.label[ends.first];
        if (target == v) target = forest.label[ends.second];
        // If two parts chose the same edge, the one of the lower label stays. Longer cycles cannot arise, since all
        // keys differ.
        if (v < target && forest.best[target] == key) {
          target = v;
        } else {
          graph.join(v, edge, ends);
        }
      }
      forest.hook[v] = static_cast<Index>(target);
      staying += target == v;
    }
    const int left = team.sync_sum(staying);
    if (left == 1 || left == parts) return left;
    parts = left;

    // Follow the hooks to the parts that stay. If that takes many jumps (monotone weights make long chains), it is done
    // in several rounds, between which each hook is replaced by where it led to, so that jumps go further.
    for (;;) {
      int unfinished = 0;
      for (int v = team.rank(); v < vertices; v += team.size()) {
        Index part = forest.hook[forest.label[v]];
        Index next = forest.hook[part];
        for (int jumps = 0; jumps < kJumps && next != part; ++jumps) {
          part = next;
          next = forest.hook[part];
        }
        if (next != part) unfinished = 1;
        forest.label[v] = part;
        forest.best[v] = kNoEdge;
      }
      if (team.sync_sum(unfinished) == 0) break;
      for (int v = team.rank(); v < vertices; v += team.size()) forest.hook[v] = forest.label[v];
      team.sync();
    }
  }
}

// Sides of a pixel, clockwise: the opposite of side d is d ^ 2.
enum Side { kUp = 0, kRight = 1, kDown = 2, kLeft = 3 };

__device__ __forceinline__ int grid_step(int direction, int width) {
  return direction & 1 ? 2 - direction : (direction - 1) * width;
}

// The four directions in which a vertex has tree neighbours, as bits; eight vertices share a word.
__device__ __forceinline__ unsigned neighbour_mask(const unsigned* masks, int vertex) {
  return masks[vertex >> 3] >> ((vertex & 7) * 4) & 15u;
}

// A grid whose edges are numbered as in grid_edges of the Python package.
struct Grid {
  const float* weights;
  unsigned* masks;  // the tree's edges, see neighbour_mask; zero at first
  int height;
  int width;

  __device__ int vertices() const { return height * width; }
  __device__ int vertical_edges() const { return (height - 1) * width; }

  template <typename Team, typename Index>
  __device__ __forceinline__ void propose(Team& team, const Forest<Index>& forest) const {
    const int horizontal = vertical_edges();
    for (int first = 0; first < vertices(); first += team.size()) {  // so that a warp stays together
      const int v = first + team.rank();
      int label = -1;
      EdgeKey lightest = kNoEdge;
      if (v < vertices()) {
        const int y = v / width;
        const int x = v - y * width;
        label = forest.label[v];
        const auto consider = [&](int neighbour, int edge) {
          if (forest.label[neighbour] == label) return;
          const EdgeKey key = edge_key(weights, edge);
          lightest = key < lightest ? key : lightest;
        };
        if (y > 0) consider(v - width, v - width);
        if (y < height - 1) consider(v + width, v);
        if (x > 0) consider(v - 1, horizontal + v - y - 1);
        if (x < width - 1) consider(v + 1, horizontal + v - y);
      }
      if constexpr (Team::kInGlobalMemory) {
        lower_by_label(forest.best, label, lightest);
      } else if (lightest != kNoEdge) {
        lower(forest.best + label, lightest);
      }
    }
  }

  __device__ __forceinline__ Ends ends(int edge) const {
    const int horizontal = edge - vertical_edges();
    if (horizontal < 0) return {edge, edge + width};
    const int left = horizontal + horizontal / (width - 1);
    return {left, left + 1};
  }

  __device__ __forceinline__ void join(int, int edge, Ends ends) const {
    const bool vertical = edge < vertical_edges();
    add_neighbour(ends.first, vertical ? kDown : kRight);
    add_neighbour(ends.second, vertical ? kUp : kLeft);
  }

  __device__ __forceinline__ void add_neighbour(int vertex, int direction) const {
    atomicOr(&masks[vertex >> 3], 1u << ((vertex & 7) * 4 + direction));
  }
};

// Any graph. Edges that are loops or name no vertex are left out.
struct EdgeList {
  const int2* edges;
  const float* weights;
  int* joined;  // for each vertex the edge by which the part of that label joined another one; -1 at first
  int num_edges;
  int num_vertices;

  template <typename Team, typename Index>
  __device__ __forceinline__ void propose(Team& team, const Forest<Index>& forest) const {
    for (int edge = team.rank(); edge < num_edges; edge += team.size()) {
      const auto [u, v] = ends(edge);
      if (u < 0 || v < 0 || u >= num_vertices || v >= num_vertices) continue;
      const Index label_u = forest.label[u];
      const Index label_v = forest.label[v];
      if (label_u == label_v) continue;
      const EdgeKey key = edge_key(weights, edge);
      lower(forest.best + label_u, key);
      lower(forest.best + label_v, key);
    }
  }

  __device__ __forceinline__ Ends ends(int edge) const {
    const int2 pair = __ldg(edges + edge);
    return {pair.x, pair.y};
  }

  __device__ __forceinline__ void join(int label, int edge, Ends) const { joined[label] = edge; }
};

}  // namespace grootvl
