// What the tree scan offers to the selective scan.
#pragma once

#include <ATen/ATen.h>

#include <utility>

#include "../checks.h"

namespace grootvl {

inline at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Parent and order, contiguous, after a check that every vertex comes once, and
// after its parent.
std::pair<at::Tensor, at::Tensor> checked_tree(const at::Tensor& parent, const at::Tensor& order);

// Scans h, (B, L, D) contiguous and of the accumulation type as `decay`, along
// a checked tree.
void scan_in_place(at::Tensor& h, const at::Tensor& decay, const at::Tensor& parent, const at::Tensor& order,
                   Direction direction);

}  // namespace grootvl
