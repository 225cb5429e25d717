// Memory that several arrays share.
#pragma once

#include <cstdint>

#include "vector.cuh"

namespace grootvl {

// Arrays in one allocation, each aligned to 16 bytes. If it starts from nullptr, it only counts the bytes.
class Arena {
 public:
  __host__ __device__ explicit Arena(unsigned char* memory) : memory_(memory) {}

  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return array;
  }

  __host__ __device__ int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

}  // namespace grootvl
