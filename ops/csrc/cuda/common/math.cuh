// The processor's fast approximations for float, and the exact functions for double.
#pragma once

#include "ptx.cuh"

namespace grootvl {

__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double fast_divide(double a, double b) { return a / b; }

// a b, rounded: the compiler makes no single instruction of it and a sum that follows.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// 1 / (1 + exp(-x)).
__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2e = 1.44269504f;
  return reciprocal_without_denormals(1 + exp2_without_denormals(-kLog2e * x));
}
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

}  // namespace grootvl
