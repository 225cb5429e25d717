// Step 1 of a scan in runs: U, P, beta and a_end of each run, and then of each section (scan.cuh).
#pragma once

#include "column.cuh"
#include "walk.cuh"

namespace grootvl {

template <Pass pass, bool kSelective, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    summarise_runs(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, int capacity) {
  await_kernels_before();
  constexpr int kOperands = num_operands(pass);
  const RunItem item(data, plan);
  if (!item.valid) return;
  Stack<acc_t> stacks[2] = {{0, capacity}, {1, capacity}};
  // The product of the decays along the chain, and the last one, which is not in it yet. Kept with and without the last
  // one instead, ptxas 13.0 takes the wrong one in float64 (docs/kernels.md).
  acc_t product = 1, factor = 1;
  acc_t a_end = 0, U[kOperands] = {};
  acc_t from_chain[kOperands] = {};  // what the chain's last vertex passes on
  acc_t P[kOperands] = {};
  const acc_t nothing[kOperands] = {};
  const uint32_t ring = shared_address() + stack_bytes<acc_t>(kOperands, capacity);
  walk_up<pass, kSelective>(data, plan, item, ring, false, stacks, nothing,
                            [&](int operand, uint32_t node, int, acc_t decay, acc_t u, acc_t passed_on, auto interior) {
                              const bool past = !interior && node & kPast;
                              if (!past) U[operand] = u;
                              if (node & kChain) {
                                if (operand == 0) product *= factor, factor = decay;
                                P[operand] += product * (u - from_chain[operand]);
                                from_chain[operand] = passed_on;
                              }
                              if (operand == 0 && !past) a_end = decay;
                            });
  if (!item.active) return;
  runs.beta[item.at_run] = product;  // without the decay of the last vertex, which is on the chain
  runs.a_end[item.at_run] = a_end;
  for (int operand = 0; operand < kOperands; ++operand) {
    runs.U[operand * runs.stride + item.at_run] = U[operand];
    runs.P[operand * runs.stride + item.at_run] = P[operand];
  }
}

// Each section by itself, from the summaries of its runs.
template <Pass pass, typename T, typename acc_t>
__global__ void __launch_bounds__(kWalkThreads)
    summarise_sections(ScanData<T, acc_t> data, Plan plan, RunData<acc_t> runs, RunData<acc_t> sections, int capacity) {
  await_kernels_before();
  const SectionItem item(data, plan, num_operands(pass));
  if (!item.valid) return;
  const bool up = sweeps_up(pass, item.operand);
  const Column<acc_t> column(plan.runs, runs, item, data.channels);
  Stack<acc_t> stack(0, capacity);
  acc_t sum = 0, product = 1, factor = 1, a_end = 0, U = 0, from_chain = 0, P = 0;
  column.template walk<Sweep::kUp>(item.begin, item.end, stack, [&](int, const typename Column<acc_t>::Piece& run) {
    acc_t E = 0;
    stack.template push_or_add<kPush>(run.node, sum, E);
    U = run.U + run.beta * E;
    a_end = run.a_end;
    sum = up ? a_end * U : acc_t(0);
    if (run.node & kChain) {
      product *= factor;
      P += product * (run.P + E - from_chain);
      from_chain = sum;
      product *= run.beta, factor = a_end;
    }
    stack.template pop_and_add<kLight>(run.node, sum);
    if (run.node & kRoot) stack.clear();
  });
  const int64_t i = (item.map * plan.sections.capacity + item.part) * data.channels + item.channel;
  if (item.operand == 0) sections.beta[i] = product, sections.a_end[i] = a_end;
  sections.U[item.operand * sections.stride + i] = U;
  sections.P[item.operand * sections.stride + i] = P;
}

}  // namespace grootvl
