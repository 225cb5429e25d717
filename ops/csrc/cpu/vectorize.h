// GROOTVL_VECTORIZED marks the inner loops. With GCC on x86-64 Linux they are compiled for processors with AVX-512,
// with AVX2 and FMA, and for the baseline, and the best is chosen when the library is loaded, so that one binary serves
// every machine. The choice is by features, not by a processor's name: "arch=haswell" would leave AMD's processors the
// baseline. GROOTVL_INLINE marks the functions that they call, which must become a part of them.
// GROOTVL_CONTRACT_PRODUCTS lets GCC compute a product and a sum as one instruction in the functions below it, against
// the option of the build. Not for what a backward pass computes again with PyTorch, and must get the same bits of.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#if __GNUC__ >= 12
#define GROOTVL_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GROOTVL_VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define GROOTVL_VECTORIZED
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define GROOTVL_CONTRACT_PRODUCTS _Pragma("GCC optimize(\"fp-contract=fast\")")
#else
#define GROOTVL_CONTRACT_PRODUCTS
#endif

#if defined(__GNUC__)
#define GROOTVL_INLINE inline __attribute__((always_inline))
#else
#define GROOTVL_INLINE __forceinline
#endif
