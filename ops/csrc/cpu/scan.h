// What the tree scan offers to the selective scan.
#pragma once

#include <utility>

#include "../checks.h"

namespace grootvl {

// Parent and order, contiguous, after a check that every vertex comes once, and
// after its parent.
std::pair<Tensor, Tensor> checked_tree(const Tensor& parent, const Tensor& order);

// Scans h, (B, L, D) contiguous and of the accumulation type as `decay`, along
// a checked tree.
void scan_in_place(const Tensor& h, const Tensor& decay, const Tensor& parent, const Tensor& order,
                   Direction direction);

}  // namespace grootvl
