// The discretisation of a selective scan (paper, section 3.2): from a pixel's step size before its bias, delta', and
// its input weight B, a channel's decay and input are
//
//     delta = softplus(delta' + bias),   decay = exp(-exp(A_log) delta),   input = delta B x.
//
// In float32 it uses the processor's fast functions and a polynomial, with a relative error of about 1e-6.
#pragma once

#include "../common/math.cuh"

namespace grootvl {

template <typename acc_t>
struct Softplus {
  acc_t value, slope;
};

// max(z, 0) + log(1 + t) with t = exp(-|z|). The processor's logarithm would have an absolute error near 1, hence a
// minimax polynomial for log(1 + t) / t on [0, 1] (relative error 4e-7 in float32).
__device__ __forceinline__ Softplus<float> softplus(float z) {
  const float t = fast_exp(-fabsf(z));
  float log_ratio = -0.0085392092f;
  log_ratio = fmaf(log_ratio, t, 0.0440896391f);
  log_ratio = fmaf(log_ratio, t, -0.107681731f);
  log_ratio = fmaf(log_ratio, t, 0.177452434f);
  log_ratio = fmaf(log_ratio, t, -0.244954639f);
  log_ratio = fmaf(log_ratio, t, 0.3327548f);
  log_ratio = fmaf(log_ratio, t, -0.499974054f);
  log_ratio = fmaf(log_ratio, t, 0.999999806f);
  const float upper = fast_reciprocal(1 + t);
  return {fmaf(t, log_ratio, fmaxf(z, 0.f)), z > 0 ? upper : t * upper};
}

// As PyTorch computes it, which is the identity beyond 20.
__device__ __forceinline__ Softplus<double> softplus(double z) {
  const double e = exp(z > 20 ? 20. : z);
  return {z > 20 ? z : log1p(e), z > 20 ? 1. : e / (1 + e)};
}

// A channel's parameters, and what they make of a step size.
template <typename acc_t>
struct Discretisation {
  acc_t bias, rate;

  struct Step {
    acc_t delta, slope, decay;  // slope: of delta as a function of delta'
  };

  __device__ Discretisation(acc_t delta_bias, acc_t A_log) : bias(delta_bias), rate(-exp(A_log)) {}

  __device__ __forceinline__ Step operator()(acc_t raw_delta) const {
    const Softplus<acc_t> delta = softplus(raw_delta + bias);
    return {delta.value, delta.slope, fast_exp(delta.value * rate)};
  }
};

// In its place where decays are given instead of step sizes.
template <typename acc_t>
struct GivenDecay {
  struct Step {
    acc_t decay;
  };

  __device__ __forceinline__ Step operator()(acc_t decay) const { return {decay}; }
};

}  // namespace grootvl
