// The processor's fast approximations for float, and the exact functions for double.
#pragma once

#include "ptx.cuh"

namespace grootvl {

constexpr float kLog2e = 1.44269504f;

// Results, and 1 / results of fast_reciprocal, too small for normal numbers are 0.
__device__ __forceinline__ float fast_exp(float x) { return exp2_without_denormals(kLog2e * x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }
__device__ __forceinline__ float fast_reciprocal(float x) { return reciprocal_without_denormals(x); }
__device__ __forceinline__ double fast_reciprocal(double x) { return 1 / x; }

// a b, rounded: the compiler makes no single instruction of it and a sum that follows.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 1 / (1 + exp(-x)).
__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1 + fast_exp(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

}  // namespace grootvl
