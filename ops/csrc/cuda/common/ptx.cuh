// All assembly (PTX) of these sources, as named primitives.
//
// Assembly is used where CUDA C++ cannot say what is meant: how a value is cached, that a copy goes on in the
// background, that a few instructions share a predicate. With GROOTVL_PORTABLE defined, each primitive is made of the
// CUDA C++ beside its assembly instead. It computes the same, but slower: for debug builds, and for readers.
#pragma once

#include <cstdint>

namespace grootvl {

// ---------------------------------------------------------------------------------------------------------- Addresses

// a * b + c. From C++, the compiler makes several instructions of it for each row.
__device__ __forceinline__ uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) {
#ifdef GROOTVL_PORTABLE
  return uint64_t{a} * b + c;
#else
  uint64_t sum;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(c));
  return sum;
#endif
}

// --------------------------------------------------------------------------------------------------------- Arithmetic

// 2^x and 1 / x, each in one instruction of the processor's fast approximations. From C++, the compiler adds some that
// scale values too small for normal numbers, which these give, and take, as zero.
__device__ __forceinline__ float exp2_without_denormals(float x) {
#ifdef GROOTVL_PORTABLE
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

__device__ __forceinline__ float reciprocal_without_denormals(float x) {
#ifdef GROOTVL_PORTABLE
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// ------------------------------------------------------------------------------------------------------- Global memory

// Stores a value that will not be read soon, so that the caches need not keep it. Values of 16 bits are stored as
// usual: a row of them is half a line of the cache, which should stay until the other half is stored.
template <typename T>
__device__ __forceinline__ void store_streaming(T& to, T value) {
#ifdef GROOTVL_PORTABLE
  to = value;
#else
  const auto global = __cvta_generic_to_global(&to);
  if constexpr (sizeof(T) == 2) {
    to = value;
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(global), "r"(reinterpret_cast<const uint32_t&>(value)) : "memory");
  } else {
    asm volatile("st.global.cs.b64 [%0], %1;" ::"l"(global), "l"(reinterpret_cast<const uint64_t&>(value)) : "memory");
  }
#endif
}

// Orders this thread's accesses to memory before the fence with those after it, for all threads of the GPU.
// __threadfence() also orders the fences of all threads among each other, which takes longer.
__device__ __forceinline__ void fence_acquire_release() {
#ifdef GROOTVL_PORTABLE
  __threadfence();
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------- Shared memory, by its own 32-bit addresses

template <typename T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
#ifdef GROOTVL_PORTABLE
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
#else
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(reinterpret_cast<const uint16_t&>(value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(reinterpret_cast<const uint32_t&>(value)) : "memory");
  } else {
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(address), "l"(reinterpret_cast<const uint64_t&>(value)) : "memory");
  }
#endif
}

template <typename T>
__device__ __forceinline__ void load_shared(uint32_t address, T& value) {
#ifdef GROOTVL_PORTABLE
  value = *static_cast<const T*>(__cvta_shared_to_generic(address));
#else
  if constexpr (sizeof(T) == 2) {
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(value)) : "r"(address) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "r"(address) : "memory");
  }
#endif
}

// ------------------------------------------------------------------ Asynchronous copies from global to shared memory

// A thread commits the copies that it has started as one group; groups complete in the order of their commits. GPUs
// before compute capability 8.0 copy at once.
#if defined(GROOTVL_PORTABLE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
__device__ __forceinline__ void copy_async_4_bytes(uint32_t to, const void* from) {
  store_shared(to, *static_cast<const uint32_t*>(from));
}
__device__ __forceinline__ void copy_async_16_bytes(uint32_t to, const void* from) {
  const uint64_t* halves = static_cast<const uint64_t*>(from);
  store_shared(to, halves[0]);
  store_shared(to + 8, halves[1]);
}
__device__ __forceinline__ void copy_async_16_bytes_or_zeros(uint32_t to, const void* from, bool copies) {
  const uint64_t* halves = static_cast<const uint64_t*>(from);
  store_shared(to, copies ? halves[0] : uint64_t{0});
  store_shared(to + 8, copies ? halves[1] : uint64_t{0});
}
__device__ __forceinline__ void commit_async_copies() {}
template <int kPending>
__device__ __forceinline__ void await_async_copies() {}
#else
__device__ __forceinline__ void copy_async_4_bytes(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
// Not kept in the first-level cache.
__device__ __forceinline__ void copy_async_16_bytes(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
// Zeros if not `copies`; nothing is read then.
__device__ __forceinline__ void copy_async_16_bytes_or_zeros(uint32_t to, const void* from, bool copies) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(copies ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_async_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kPending groups committed last are pending.
template <int kPending>
__device__ __forceinline__ void await_async_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

// --------------------------------------------------------------------------------------- Programmatic dependent launch

// Waits until the kernels before this one on the stream have ended and what they wrote can be read.
__device__ __forceinline__ void await_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#ifdef GROOTVL_PORTABLE
  cudaGridDependencySynchronize();
#else
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#endif
}

// Lets the next kernel of the stream be set up while this one runs.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#ifdef GROOTVL_PORTABLE
  cudaTriggerProgrammaticLaunchCompletion();
#else
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

// ---------------------------------------------------------------------------------------------------- Predicated stack

// Pushes and pops on a stack whose top is in a register, `top`, and whose other entries are in shared memory, kStep
// bytes apart; `next` is the address after the last of them. A push or pop is done if `flags` has kFlag. In assembly
// they are a few instructions under one predicate, without branches; from C++ the compiler computes the predicate once
// more for each instruction.
#ifdef GROOTVL_PORTABLE

template <uint32_t kFlag, uint32_t kStep, typename T>
__device__ __forceinline__ void predicated_push(uint32_t flags, T& top, uint32_t& next, T value) {
  if (!(flags & kFlag)) return;
  store_shared(next, top);
  top = value;
  next += kStep;
}

// Pushes `value`, or else adds it to `sum`.
template <uint32_t kFlag, uint32_t kStep, typename T>
__device__ __forceinline__ void predicated_push_or_add(uint32_t flags, T& top, uint32_t& next, T value, T& sum) {
  predicated_push<kFlag, kStep>(flags, top, next, value);
  if (!(flags & kFlag)) sum += value;
}

// Pops into `value`.
template <uint32_t kFlag, uint32_t kStep, typename T>
__device__ __forceinline__ void predicated_pop(uint32_t flags, T& top, uint32_t& next, T& value) {
  if (!(flags & kFlag)) return;
  value = top;
  next -= kStep;
  load_shared(next, top);
}

// Pops, and adds what is popped to `sum`.
template <uint32_t kFlag, uint32_t kStep, typename T>
__device__ __forceinline__ void predicated_pop_and_add(uint32_t flags, T& top, uint32_t& next, T& sum) {
  T value = 0;
  predicated_pop<kFlag, kStep>(flags, top, next, value);
  if (flags & kFlag) sum += value;
}

#else

// p: whether the operand `flags` has the bits of the operand `flag`.
#define GROOTVL_PREDICATE(flags, flag) \
  ".reg .pred p; .reg .b32 t; and.b32 t, " flags ", " flag "; setp.ne.u32 p, t, 0;\n"

// The four operations for values of type T, which PTX calls TYPE and asm constraints call REGISTER.
#define GROOTVL_PREDICATED_STACK(T, TYPE, REGISTER)                                                                 \
  template <uint32_t kFlag, uint32_t kStep>                                                                         \
  __device__ __forceinline__ void predicated_push(uint32_t flags, T& top, uint32_t& next, T value) {                \
    asm volatile("{ " GROOTVL_PREDICATE("%3", "%4") "@p st.shared." TYPE                                            \
                                                    " [%1], %0;\n"                                                  \
                                                    "@p mov." TYPE                                                  \
                                                    " %0, %2;\n"                                                    \
                                                    "@p add.u32 %1, %1, %5; }"                                      \
                 : "+" REGISTER(top), "+r"(next)                                                                    \
                 : REGISTER(value), "r"(flags), "n"(kFlag), "n"(kStep)                                              \
                 : "memory");                                                                                       \
  }                                                                                                                 \
  template <uint32_t kFlag, uint32_t kStep>                                                                         \
  __device__ __forceinline__ void predicated_push_or_add(uint32_t flags, T& top, uint32_t& next, T value, T& sum) { \
    asm volatile("{ " GROOTVL_PREDICATE("%4", "%5") "@p st.shared." TYPE                                            \
                                                    " [%1], %0;\n"                                                  \
                                                    "@p mov." TYPE                                                  \
                                                    " %0, %3;\n"                                                    \
                                                    "@p add.u32 %1, %1, %6;\n"                                      \
                                                    "@!p add." TYPE " %2, %2, %3; }"                                \
                 : "+" REGISTER(top), "+r"(next), "+" REGISTER(sum)                                                 \
                 : REGISTER(value), "r"(flags), "n"(kFlag), "n"(kStep)                                              \
                 : "memory");                                                                                       \
  }                                                                                                                 \
  template <uint32_t kFlag, uint32_t kStep>                                                                         \
  __device__ __forceinline__ void predicated_pop(uint32_t flags, T& top, uint32_t& next, T& value) {                \
    asm volatile("{ " GROOTVL_PREDICATE("%3", "%4") "@p mov." TYPE                                                  \
                                                    " %2, %0;\n"                                                    \
                                                    "@p sub.u32 %1, %1, %5;\n"                                      \
                                                    "@p ld.shared." TYPE " %0, [%1]; }"                             \
                 : "+" REGISTER(top), "+r"(next), "+" REGISTER(value)                                               \
                 : "r"(flags), "n"(kFlag), "n"(kStep)                                                               \
                 : "memory");                                                                                       \
  }                                                                                                                 \
  template <uint32_t kFlag, uint32_t kStep>                                                                         \
  __device__ __forceinline__ void predicated_pop_and_add(uint32_t flags, T& top, uint32_t& next, T& sum) {          \
    asm volatile("{ " GROOTVL_PREDICATE("%3", "%4") "@p add." TYPE                                                  \
                                                    " %2, %2, %0;\n"                                                \
                                                    "@p sub.u32 %1, %1, %5;\n"                                      \
                                                    "@p ld.shared." TYPE " %0, [%1]; }"                             \
                 : "+" REGISTER(top), "+r"(next), "+" REGISTER(sum)                                                 \
                 : "r"(flags), "n"(kFlag), "n"(kStep)                                                               \
                 : "memory");                                                                                       \
  }

GROOTVL_PREDICATED_STACK(float, "f32", "f")
GROOTVL_PREDICATED_STACK(double, "f64", "d")
#undef GROOTVL_PREDICATED_STACK
#undef GROOTVL_PREDICATE

#endif

}  // namespace grootvl
