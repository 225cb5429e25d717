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

__device__ __forceinline__ EdgeKey edge_key(unsigned weight, int edge) {
  return EdgeKey(weight) << 32 | static_cast<unsigned>(edge);
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

// An edge that leaves one or two parts.
struct Proposal {
  EdgeKey key = kNoEdge;
  int labels[2] = {-1, -1};  // the parts; the second may be -1, for none
};

// Lowers best[label] to the lightest key of all proposals with this label, for all labels. `Graph` tells them:
//   proposals()           how many there are
//   proposal(forest, i)   one of them
//   kNeighbours           whether each has one label, and those that follow each other often the same
template <typename Graph, typename Index>
__device__ __forceinline__ void propose(GridTeam& team, const Graph& graph, const Forest<Index>& forest) {
  const int count = graph.proposals();
  for (int first = 0; first < count; first += team.size()) {  // so that a warp stays together
    const int i = first + team.rank();
    const Proposal proposal = i < count ? graph.proposal(forest, i) : Proposal();
    if constexpr (Graph::kNeighbours) {
      lower_by_label(forest.best, proposal.labels[0], proposal.key);
    } else if (proposal.key != kNoEdge) {
      for (const int label : proposal.labels) lower(forest.best + label, proposal.key);
    }
  }
}

// The same for a block, in shared memory, where the threads of a warp rarely wait for each other.
template <typename Graph, typename Index>
__device__ __forceinline__ void propose(BlockTeam& team, const Graph& graph, const Forest<Index>& forest) {
  for (int i = team.rank(); i < graph.proposals(); i += team.size()) {
    const Proposal proposal = graph.proposal(forest, i);
    if (proposal.key == kNoEdge) continue;
    for (const int label : proposal.labels) {
      if (label >= 0) lower(forest.best + label, proposal.key);
    }
  }
}

// Grows the forest and returns the number of trees, 1 on a connected graph. Only if there are several are the final
// labels filled in. `Graph` tells the rest, and what `propose` needs:
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
    propose(team, graph, forest);
    team.sync();

    int staying = 0;
    for (int v = team.rank(); v < vertices; v += team.size()) {
      if (forest.label[v] != v) continue;
      const EdgeKey key = forest.best[v];
      int target = v;
      if (key != kNoEdge) {
        const int edge = static_cast<int>(static_cast<unsigned>(key));
        const Ends ends = graph.ends(edge);
        const int first = forest.label[ends.first], second = forest.label[ends.second];
        target = first == v ? second : first;
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

// A grid. Here the edge below vertex v has number v, and the edge to the right of it number vertices() + v. This is the
// order of the edges in grid_edges of the Python package, whose numbers have no gaps.
struct GridEdges {
  int height;
  int width;

  __device__ int vertices() const { return height * width; }

  __device__ __forceinline__ Ends ends(int edge) const {
    const int left = edge - vertices();
    return left < 0 ? Ends{edge, edge + width} : Ends{left, left + 1};
  }

  // Where the weight of an edge below, or to the right of, a vertex in row y is in grid_edges.
  __device__ __forceinline__ int place(int edge, int y) const {
    const int left = edge - vertices();
    return left < 0 ? edge : (height - 1) * width + left - y;
  }
};

// What all grids have in common. `Weights` gives the row y of a vertex, row(v), and the ordered bits of the weight of
// an edge from that row on, weights(edge, y).
template <typename Weights>
struct Grid : GridEdges {
  static constexpr bool kNeighbours = true;
  Weights weights;
  unsigned* masks;  // the tree's edges, see neighbour_mask; zero at first

  __device__ Grid(GridEdges edges, Weights weights, unsigned* masks)
      : GridEdges(edges), weights(weights), masks(masks) {}

  __device__ int proposals() const { return vertices(); }

  template <typename Index>
  __device__ __forceinline__ Proposal proposal(const Forest<Index>& forest, int v) const {
    const int y = weights.row(v), x = v - y * width, right = vertices() + v;
    const int neighbours[] = {y > 0 ? v - width : v, y < height - 1 ? v + width : v, x > 0 ? v - 1 : v,
                              x < width - 1 ? v + 1 : v};  // v itself, where there is none
    const int edges[] = {v - width, v, right - 1, right}, rows[] = {y - 1, y, y, y};
    const int label = forest.label[v];
    // The loads of each of the two loops are independent of each other, so that they wait together.
    bool leaves[4];
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) leaves[i] = forest.label[neighbours[i]] != label;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = leaves[i] ? weights(edges[i], rows[i]) : 0;
    Proposal lightest{kNoEdge, {label, -1}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const EdgeKey key = leaves[i] ? edge_key(bits[i], edges[i]) : kNoEdge;
      lightest.key = key < lightest.key ? key : lightest.key;
    }
    return lightest;
  }

  __device__ __forceinline__ void join(int, int edge, Ends ends) const {
    const bool vertical = edge < vertices();
    add_neighbour(ends.first, vertical ? kDown : kRight);
    add_neighbour(ends.second, vertical ? kUp : kLeft);
  }

  __device__ __forceinline__ void add_neighbour(int vertex, int direction) const {
    atomicOr(&masks[vertex >> 3], 1u << ((vertex & 7) * 4 + direction));
  }
};

// Weights in global memory, as in grid_edges.
struct GivenWeights {
  const float* weights;
  GridEdges edges;

  __device__ __forceinline__ int row(int v) const { return v / edges.width; }
  __device__ __forceinline__ unsigned operator()(int edge, int y) const {
    return ordered_bits(__ldg(weights + edges.place(edge, y)));
  }
};

// Weights that a block has copied to shared memory, by the number of the edge. Up to 2^16 vertices.
struct CopiedWeights {
  unsigned* bits;          // (2 vertices)
  unsigned inverse_width;  // times 2^32, rounded up; 0 stands for 2^32

  __device__ CopiedWeights(unsigned* bits, int width) : bits(bits), inverse_width(0xffffffffu / width + 1) {}

  __device__ __forceinline__ int row(int v) const { return inverse_width == 0 ? v : __umulhi(v, inverse_width); }
  __device__ __forceinline__ unsigned operator()(int edge, int) const { return bits[edge]; }

  template <typename Team>
  __device__ void copy(Team& team, const GivenWeights& from) {
    const GridEdges& edges = from.edges;
    const int vertices = edges.vertices();
    for (int v = team.rank(); v < vertices; v += team.size()) {
      const int y = row(v);
      if (y < edges.height - 1) bits[v] = from(v, y);
      if (v - y * edges.width < edges.width - 1) bits[vertices + v] = from(vertices + v, y);
    }
  }
};

// Any graph. Edges that are loops or name no vertex are left out.
struct EdgeList {
  const int2* edges;
  const float* weights;
  int* joined;  // for each vertex the edge by which the part of that label joined another one; -1 at first
  int num_edges;
  int num_vertices;

  static constexpr bool kNeighbours = false;
  __device__ int proposals() const { return num_edges; }

  template <typename Index>
  __device__ __forceinline__ Proposal proposal(const Forest<Index>& forest, int edge) const {
    const auto [u, v] = ends(edge);
    if (u < 0 || v < 0 || u >= num_vertices || v >= num_vertices) return {};
    const int label_u = forest.label[u], label_v = forest.label[v];
    if (label_u == label_v) return {};
    return {edge_key(ordered_bits(__ldg(weights + edge)), edge), {label_u, label_v}};
  }

  __device__ __forceinline__ Ends ends(int edge) const {
    const int2 pair = __ldg(edges + edge);
    return {pair.x, pair.y};
  }

  __device__ __forceinline__ void join(int label, int edge, Ends) const { joined[label] = edge; }
};

}  // namespace grootvl
