// Step 2 of a scan in runs: what enters each run, from the summaries of all (scan.cuh).
#pragma once

#include "column.cuh"

namespace grootvl {

// Joins the pieces from `first` to `last`. E is what enters the first one from below, `h_above` is h_parent(end) of the
// last one.
template <Pass pass, typename acc_t>
__device__ __forceinline__ void join(const Column<acc_t>& column, int first, int last, bool up, acc_t E, acc_t h_above,
                                     Stack<acc_t> stack) {
  using Piece = typename Column<acc_t>::Piece;
  acc_t sum = E;
  column.template walk<Sweep::kUp>(first, last, stack, [&](int i, const Piece& piece) {
    acc_t below = 0;
    stack.template push_or_add<kPush>(piece.node, sum, below);
    column.E[i * column.channels] = up ? below : acc_t(0);
    sum = piece.a_end * (piece.U + piece.beta * below);
    stack.template pop_and_add<kLight>(piece.node, sum);
    if (piece.node & kRoot) stack.clear();
  });
  if (pass == Pass::kUp || pass == Pass::kDownGradient) return;

  stack.clear();
  acc_t h = h_above;
  column.template walk<Sweep::kDown>(first, last, stack, [&](int i, const Piece& piece) {
    if (piece.node & kRoot) h = 0, stack.clear();
    stack.template push_if<kLight>(piece.node, h);
    column.P[i * column.channels] = h;  // h_parent(end), from here on
    const acc_t m = up ? h - piece.a_end * (piece.U + piece.beta * piece.E) : h;
    h = piece.E + piece.P + piece.beta * piece.a_end * m;
    stack.template pop_if<kPush>(piece.node, h);
  });
}

template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    join_sections(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  const ColumnItem item(data, 1);
  if (item.operand >= num_operands(pass)) return;
  const Column<acc_t> column(plan.sections, sections, item, data.channels);
  join<pass>(column, 0, plan.sections.count(item.tree), sweeps_up(pass, item.operand), acc_t(0), acc_t(0),
             Stack<acc_t>(0, capacity));
}

// The runs of each section, with what enters it.
template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    join_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  const SectionItem item(data, plan, num_operands(pass));
  if (!item.valid) return;
  acc_t E = 0, h_above = 0;
  if (plan.sections.several()) {
    const int64_t i =
        item.operand * sections.stride + (item.map * plan.sections.capacity + item.part) * data.channels + item.channel;
    E = sections.E[i], h_above = sections.h_above()[i];
  }
  const Column<acc_t> column(plan.runs, runs, item, data.channels);
  join<pass>(column, item.begin, item.end, sweeps_up(pass, item.operand), E, h_above, Stack<acc_t>(0, capacity));
}

}  // namespace grootvl
