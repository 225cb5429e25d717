// Addresses that the compiler would need several instructions a row for.
#pragma once

#include <cstdint>
#include <type_traits>

namespace grootvl {

// A value of a column of a (vertices, channels) matrix; `column` points to its
// value at the first vertex.
template <typename T>
__device__ __forceinline__ T& at_vertex(T* column, uint32_t vertex, uint32_t row_bytes) {
  uint64_t address;
  asm("mad.wide.u32 %0, %1, %2, %3;"
      : "=l"(address)
      : "r"(vertex), "r"(row_bytes), "l"(__cvta_generic_to_global(column)));
  return *static_cast<T*>(__cvta_global_to_generic(address));
}

// Stores what will not be read soon. Rows of 16-bit values are half a line of the cache, which should wait for the
// other half.
template <typename T>
__device__ __forceinline__ void store_streaming(T& to, T value) {
  const auto global = __cvta_generic_to_global(&to);
  if constexpr (sizeof(T) == 2) {
    to = value;
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(global), "r"(reinterpret_cast<const uint32_t&>(value)) : "memory");
  } else {
    asm volatile("st.global.cs.b64 [%0], %1;" ::"l"(global), "l"(reinterpret_cast<const uint64_t&>(value)) : "memory");
  }
}

// Shared memory by its own 32-bit addresses.
extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ __forceinline__ uint32_t shared_address() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(reinterpret_cast<const uint16_t&>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(reinterpret_cast<const uint32_t&>(value)) : "memory");
  } else {
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(address), "l"(reinterpret_cast<const uint64_t&>(value)) : "memory");
  }
}
template <typename T>
__device__ __forceinline__ void load_shared(uint32_t address, T& value) {
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(value)) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "r"(address) : "memory");
  }
}

}  // namespace grootvl
