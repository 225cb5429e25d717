// Addresses in matrices (vertices, channels), and in the shared memory of a block.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace grootvl {

// A value of a column of a (vertices, channels) matrix; `column` points to its value at the first vertex.
template <typename T>
__device__ __forceinline__ T& at_vertex(T* column, uint32_t vertex, uint32_t row_bytes) {
  const uint64_t address = multiply_add_wide(vertex, row_bytes, __cvta_generic_to_global(column));
  return *static_cast<T*>(__cvta_global_to_generic(address));
}

extern __shared__ __align__(16) unsigned char shared_memory[];

// The address in shared memory at which the dynamic part begins.
__device__ __forceinline__ uint32_t shared_address() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

}  // namespace grootvl
