// Functions that the inner loops of the CPU kernels are made of. Those for
// float are free of calls and branches, so that compilers turn the loops around
// them into vector instructions; their relative error is about 1e-7. For double
// they are those of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectorize.h"

namespace grootvl {

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, by a polynomial. NaN is passed
// on; results below 1e-38 are 0, and those beyond the largest float are
// infinite.
GROOTVL_INLINE float exponential(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: in the sum, the last
                                          // bits of the mantissa are the integer
  constexpr uint32_t kRounderBits = 0x4b400000;
  const float above = x < -87.3f ? -87.3f : x, clamped = above > 88.3f ? 88.3f : above;
  const float rounded = clamped * kLog2E + kRounder;
  uint32_t bits;  // unsigned, because those of NaN would overflow
  std::memcpy(&bits, &rounded, sizeof bits);
  const float n = rounded - kRounder;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const uint32_t scale_bits = (bits - kRounderBits + 127) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  const float result = p * scale;
  return x < -87.3f ? 0.f : x > 88.3f ? INFINITY : result;
}
GROOTVL_INLINE double exponential(double x) { return std::exp(x); }

template <typename scalar_t>
GROOTVL_INLINE scalar_t sigmoid(scalar_t x) {
  return scalar_t(1) / (scalar_t(1) + exponential(-x));
}

// log(1 + exp(x)) as max(x, 0) + log(1 + t) with t = exp(-|x|), and a minimax
// polynomial for log(1 + t) / t on [0, 1].
GROOTVL_INLINE float softplus(float x) {
  const float t = exponential(x < 0 ? x : -x);
  float log_ratio = -0.0085392092f;
  log_ratio = log_ratio * t + 0.0440896391f;
  log_ratio = log_ratio * t - 0.107681731f;
  log_ratio = log_ratio * t + 0.177452434f;
  log_ratio = log_ratio * t - 0.244954639f;
  log_ratio = log_ratio * t + 0.3327548f;
  log_ratio = log_ratio * t - 0.499974054f;
  log_ratio = log_ratio * t + 0.999999806f;
  return t * log_ratio + (x < 0 ? 0 : x);
}
// As PyTorch computes it, which is the identity beyond 20.
GROOTVL_INLINE double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

}  // namespace grootvl
