// GROOTVL_VECTORIZED marks the inner loops. With GCC on x86-64 Linux they are compiled for AVX-512, AVX2 and the
// baseline, and the processor's best is chosen when the library is loaded, so that one binary serves every machine.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define GROOTVL_VECTORIZED __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define GROOTVL_VECTORIZED
#endif
