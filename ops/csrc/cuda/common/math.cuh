// The processor's fast approximations for float, and the exact functions for double.
#pragma once

namespace grootvl {

__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double fast_divide(double a, double b) { return a / b; }

}  // namespace grootvl
