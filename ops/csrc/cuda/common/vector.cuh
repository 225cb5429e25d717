// Several neighbouring values in one word of up to 16 bytes, which one instruction loads or stores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grootvl {

constexpr int kVectorBytes = 16;  // the largest word that a thread loads at once

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T values[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kSize>*>(from);
}

template <int kSize, typename acc_t, typename T>
__device__ __forceinline__ void unpack(acc_t (&to)[kSize], const Vector<T, kSize>& vector) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) to[i] = static_cast<acc_t>(vector.values[i]);
}

template <int kSize, typename acc_t, typename T>
__device__ __forceinline__ void store(T* to, const acc_t (&from)[kSize]) {
  Vector<T, kSize> vector;
#pragma unroll
  for (int i = 0; i < kSize; ++i) vector.values[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
}

// Whether an address is a multiple of so many bytes.
inline bool is_aligned(const void* pointer, size_t bytes = kVectorBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace grootvl
