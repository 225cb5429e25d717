// Rooting a tree by its Euler tour.
//
// Each tree edge is two darts, one for each direction. The Euler tour follows a dart (u, v) by the next dart around v
// after (v, u); it starts and ends at the root, and passes each edge down and, after the subtree below it, up.
// So the places of an edge's darts in the tour (their ranks) tell which end is the parent, and how large the subtree
// below is. The tour may turn around a vertex in any sense: neither depends on it.
//
// The preorder that a Tree asks for follows from the ranks too. If each vertex is given the distance from its parent in
// that order (one more than the sizes of the siblings before it), its place is the sum of these distances over its
// ancestors and itself, which is the sum along the tour of +distance at darts down and -distance at darts up.

#pragma once

#include <cstdint>

#include "spanning.cuh"
#include "team.cuh"

namespace grootvl {

// Two numbers in one word: an unsigned and a signed one.
template <typename Word>
__device__ __forceinline__ Word pack(int high, int low);
template <>
__device__ __forceinline__ uint32_t pack<uint32_t>(int high, int low) {
  return static_cast<uint32_t>(high) << 16 | (static_cast<uint32_t>(low) & 0xffffu);
}
template <>
__device__ __forceinline__ uint64_t pack<uint64_t>(int high, int low) {
  return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(low);
}
__device__ __forceinline__ int high_half(uint32_t word) { return word >> 16; }
__device__ __forceinline__ int high_half(uint64_t word) { return static_cast<int>(word >> 32); }
__device__ __forceinline__ int low_half(uint32_t word) { return static_cast<int16_t>(word & 0xffffu); }
__device__ __forceinline__ int low_half(uint64_t word) { return static_cast<int>(static_cast<uint32_t>(word)); }

// Which of the 2^shift members of a bin stands for it: a different one from bin to bin, so that regular trees, too, are
// cut into segments of similar length.
__device__ __forceinline__ int chosen_member(int bin, int shift) {
  return (bin << shift) + static_cast<int>((static_cast<unsigned>(bin) * 0x9e3779b9u >> 16) & ((1u << shift) - 1));
}

// The ranks of all darts of a tour. Some darts, the splitters, cut the tour into segments; each segment is walked by
// one thread, and then only the splitters are ranked, by pointer jumping.
template <typename Word>
struct Ranks {
  const Word* places;     // for each dart its segment and its distance from the start of the segment
  const Word* remaining;  // for each segment, in the lower half, the darts from its start to the end of the tour
  int darts;

  __device__ int operator()(int dart) const {
    const Word place = places[dart];
    return darts - low_half(remaining[high_half(place)]) + low_half(place);
  }
};

// `segments` has 2 * (tour.splitters() + 1) words. `Tour` tells the rest:
//   darts()         how many there are
//   splitters()     one more than the largest number of a splitter; that number is the tour's first dart
//   start(i)        the dart of splitter i, or -1
//   next(dart, s)   its successor in the tour, the first dart again after the last; s becomes the number of the
//                   splitter that the successor is, or -1
template <typename Word, typename Team, typename Tour>
__device__ __forceinline__ Ranks<Word> rank_darts(Team& team, const Tour& tour, Word* places, Word* segments) {
  const int splitters = tour.splitters();
  const int head = splitters - 1;
  const int end = splitters;  // a segment of no darts that follows itself
  for (int i = team.rank(); i <= splitters; i += team.size()) {
    int following = end;
    int length = 0;
    int dart = i < splitters ? tour.start(i) : -1;
    if (dart >= 0) {
      int splitter;
      do {
        places[dart] = pack<Word>(i, length);
        ++length;
        dart = tour.next(dart, splitter);
      } while (splitter < 0);
      if (splitter != head) following = splitter;
    }
    segments[i] = pack<Word>(following, length);
  }
  team.sync();

  Word* source = segments;
  Word* target = segments + splitters + 1;
  constexpr int kHops = 3;  // more than one, as waiting for the team takes longer than a read
  for (int64_t reach = 1; reach < splitters; reach *= kHops + 1) {
    for (int i = team.rank(); i <= splitters; i += team.size()) {
      Word segment = source[i];
#pragma unroll
      for (int hop = 0; hop < kHops; ++hop) {
        const Word following = source[high_half(segment)];
        segment = pack<Word>(high_half(following), low_half(segment) + low_half(following));
      }
      target[i] = segment;
    }
    team.sync();
    Word* swapped = source;
    source = target;
    target = swapped;
  }
  return {places, source, tour.darts()};
}

// The tour of a grid's tree. The dart that leaves vertex v in direction d is number 4 v + d.
struct GridTour {
  const unsigned* masks;
  int vertices;
  int width;
  int root;
  int shift;  // a bin has 2^shift vertices

  __device__ int darts() const { return 2 * (vertices - 1); }
  __device__ int bins() const { return ((vertices - 1) >> shift) + 1; }
  __device__ int splitters() const { return bins() + 1; }

  __device__ __forceinline__ int head_of(int dart) const { return (dart >> 2) + grid_step(dart & 3, width); }
  static __device__ __forceinline__ int twin(int dart, int head) { return head * 4 + ((dart & 3) ^ 2); }

  __device__ __forceinline__ int first_dart(int vertex) const {
    return vertex * 4 + __ffs(neighbour_mask(masks, vertex)) - 1;
  }

  __device__ __forceinline__ int start(int splitter) const {
    const int first = first_dart(root);
    if (splitter == bins()) return first;
    const int vertex = chosen_member(splitter, shift);
    if (vertex >= vertices) return -1;
    const int dart = first_dart(vertex);
    return dart == first ? -1 : dart;
  }

  __device__ __forceinline__ int next(int dart, int& splitter) const {
    const int vertex = head_of(dart);
    const int back = (dart & 3) ^ 2;
    const unsigned mask = neighbour_mask(masks, vertex);
    // Bit i of the turned mask is direction back + 1 + i.
    const unsigned turned = (mask | mask << 4) >> (back + 1);
    const int direction = (back + __ffs(turned)) & 3;
    const bool first = direction == __ffs(mask) - 1;
    const int bin = vertex >> shift;
    splitter = !first ? -1 : vertex == root ? bins() : chosen_member(bin, shift) == vertex ? bin : -1;
    return vertex * 4 + direction;
  }
};

// The tour of a tree given by its edges. Edge e is the darts 2 e and 2 e + 1; the darts that leave a vertex are a list.
struct EdgeTour {
  const int* tails;       // the vertex that a dart leaves
  const int* following;   // the next dart in the list of that vertex, -1 at its end
  const int* first_dart;  // the start of a vertex's list
  int num_darts;
  int first;  // where the tour starts
  int shift;  // a bin has 2^shift darts

  __device__ int darts() const { return num_darts; }
  __device__ int bins() const { return ((num_darts - 1) >> shift) + 1; }
  __device__ int splitters() const { return bins() + 1; }

  __device__ __forceinline__ int start(int splitter) const {
    if (splitter == bins()) return first;
    const int dart = chosen_member(splitter, shift);
    return dart < num_darts && dart != first ? dart : -1;
  }

  __device__ __forceinline__ int next(int dart, int& splitter) const {
    const int twin = dart ^ 1;
    const int beside = following[twin];
    const int next = beside >= 0 ? beside : first_dart[tails[twin]];
    const int bin = next >> shift;
    splitter = next == first ? bins() : chosen_member(bin, shift) == next ? bin : -1;
    return next;
  }
};

// Parents and subtree sizes of a grid's tree. `steps` gets, at the rank of each dart, the child end of its edge and the
// distance in the preorder from the parent to it, negative on darts up.
template <typename Word, typename Team>
__device__ __forceinline__ void root_grid(Team& team, const GridTour& tour, const Ranks<Word>& ranks, Word* steps,
                                          int* parent, int* subtree_size) {
  for (int v = team.rank(); v < tour.vertices; v += team.size()) {
    const unsigned mask = neighbour_mask(tour.masks, v);
    int down[4];
    int size[4];  // of the subtree below the neighbour, 0 where there is none
#pragma unroll
    for (int direction = 0; direction < 4; ++direction) {
      down[direction] = 0;
      size[direction] = 0;
      if (!(mask >> direction & 1)) continue;
      const int dart = v * 4 + direction;
      const int neighbour = tour.head_of(dart);
      const int rank = ranks(dart);
      const int back = ranks(GridTour::twin(dart, neighbour));
      if (rank > back) continue;
      down[direction] = rank;
      size[direction] = (back - rank + 1) / 2;
      parent[neighbour] = v;
      subtree_size[neighbour] = size[direction];
    }
#pragma unroll
    for (int direction = 0; direction < 4; ++direction) {
      if (size[direction] == 0) continue;
      const int child = v + grid_step(direction, tour.width);
      int distance = 1;
#pragma unroll
      for (int other = 0; other < 4; ++other) {
        const bool lower = v + grid_step(other, tour.width) < child;
        if (size[other] < size[direction] || (size[other] == size[direction] && lower)) distance += size[other];
      }
      steps[down[direction]] = pack<Word>(child, distance);
      steps[down[direction] + 2 * size[direction] - 1] = pack<Word>(child, -distance);
    }
    if (v == tour.root) {
      parent[v] = v;
      subtree_size[v] = tour.vertices;
    }
  }
}

// Writes each vertex but the first of the tour at its place in the preorder, which is the sum of the steps up to its
// dart down, counted from the place of that first one.
template <typename Word, typename Team>
__device__ __forceinline__ void order_vertices(Team& team, const Word* steps, int darts, int first_place, int* order) {
  // An odd number of steps for each thread, so that the threads of a warp read from different banks of shared memory.
  const int share = (darts + team.size() - 1) / team.size() | 1;
  const int64_t start = static_cast<int64_t>(team.rank()) * share;
  const int begin = static_cast<int>(start < darts ? start : darts);
  const int end = begin + share < darts ? begin + share : darts;
  int sum = 0;
  for (int i = begin; i < end; ++i) sum += low_half(steps[i]);
  int place = first_place + team.exclusive_sum(sum);
  for (int i = begin; i < end; ++i) {
    const Word step = steps[i];
    place += low_half(step);
    if (low_half(step) > 0) order[place] = high_half(step);
  }
}

}  // namespace grootvl
