// How a thread goes over runs, or over sections, for one operand and channel.
#pragma once

#include "plan.cuh"
#include "stack.cuh"

namespace grootvl {

// Which channel, map and operand a thread of a grid works on, and which of so many parts of the map.
struct ColumnItem {
  int operand, part, channel;
  int64_t map, tree;

  template <typename T, typename acc_t>
  __device__ ColumnItem(const ScanData<T, acc_t>& data, int parts) {
    int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    channel = thread % data.channels, thread /= data.channels;
    part = thread % parts, thread /= parts;
    map = thread % data.maps, operand = thread / data.maps;
    tree = data.tree_of(map);
  }
};

template <typename acc_t>
struct Column {
  const uint32_t* nodes;
  int64_t channels;
  const acc_t *beta, *a_end, *U;
  acc_t *P, *E;  // P is overwritten, see RunData

  struct Piece {
    uint32_t node;
    acc_t beta, a_end, U, P, E;
  };

  __device__ Column(const Pieces& pieces, const RunData<acc_t>& data, const ColumnItem& item, int channels)
      : nodes(pieces.nodes + item.tree * pieces.capacity), channels(channels) {
    const int operand = item.operand;
    const int64_t offset = item.map * pieces.capacity * channels + item.channel;
    beta = data.beta + offset;
    a_end = data.a_end + offset;
    U = data.U + operand * data.stride + offset;
    P = data.P + operand * data.stride + offset;
    E = data.E + operand * data.stride + offset;
  }

  __device__ __forceinline__ Piece read(int piece) const {
    const int64_t i = piece * channels;
    return {nodes[piece], beta[i], a_end[i], U[i], P[i], E[i]};
  }

  // Calls `visit(i, piece)` for each piece from `first` to `last`, in the direction of a sweep. Of its values only
  // those that `visit` uses are read, kAhead pieces before they are needed. The stack stays inside.
  template <Sweep sweep, typename Visit>
  __device__ __forceinline__ void walk(int first, int last, Stack<acc_t>& stack, Visit visit) const {
    constexpr int kAhead = kTileRows;  // no more, since a stack has room for so many pushes between its checks
    const int count = last - first;
    if (count <= 0) return;
    const auto place = [&](int i) { return sweep == Sweep::kUp ? first + i : last - 1 - i; };
    Piece ahead[kAhead];
    const auto read_ahead = [&](int i) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) ahead[j] = read(place(min(i + j, count - 1)));
    };
    read_ahead(0);
    for (int i = 0; i < count; i += kAhead) {
      Piece pieces[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) pieces[j] = ahead[j];
      read_ahead(i + kAhead);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j < count) visit(place(i + j), pieces[j]);
      }
      stack.stay_inside();
    }
  }
};

// A section, and its runs from `begin` to `end`.
struct SectionItem : ColumnItem {
  bool valid;  // there is such a section
  int begin, end;

  template <typename T, typename acc_t>
  __device__ SectionItem(const ScanData<T, acc_t>& data, const Plan& plan, int operands)
      : ColumnItem(data, plan.sections.capacity) {
    valid = operand < operands && part < plan.sections.count(tree);
    if (!valid) return;
    begin = 0, end = plan.runs.count(tree);
    if (!plan.sections.several()) return;
    begin = plan.sections.begin(tree, part);
    end = plan.sections.end[tree * plan.sections.capacity + part];
  }
};

}  // namespace grootvl
