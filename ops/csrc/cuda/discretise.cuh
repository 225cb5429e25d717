// The discretisation of a selective scan (paper, section 3.2): from a pixel's step size before its bias, delta', and
// its input weight B, a channel's decay and input are
//
//     delta = softplus(delta' + bias),   decay = exp(-exp(A_log) delta),   input = delta B x.
//
// In float32 it is done by the fast functions of the processor, with a relative error of about 1e-6.
#pragma once

namespace grootvl {

__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }

// log(1 + e) for e > 0. The processor's logarithm has an absolute error, so near 1 a series (of the inverse hyperbolic
// tangent) takes its place.
__device__ __forceinline__ float fast_log1p(float e) {
  const float s = __fdividef(e, 2 + e), s2 = s * s;
  const float series = 2 * s * (1 + s2 * (1 / 3.f + s2 * (1 / 5.f + s2 * (1 / 7.f))));
  return e < 0.5f ? series : __logf(1 + e);
}
__device__ __forceinline__ double fast_log1p(double e) { return log1p(e); }

__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double fast_divide(double a, double b) { return a / b; }

// A channel's parameters, and what they make of a step size.
template <typename acc_t>
struct Discretisation {
  acc_t bias, rate;

  struct Step {
    acc_t delta, slope, decay;  // slope: of delta as a function of delta'
  };

  __device__ Discretisation(acc_t delta_bias, acc_t A_log) : bias(delta_bias), rate(-exp(A_log)) {}

  __device__ __forceinline__ Step operator()(acc_t raw_delta) const {
    const acc_t z = raw_delta + bias;
    const acc_t e = fast_exp(z > 20 ? acc_t(20) : z);  // beyond 20, softplus is the identity, as in PyTorch
    Step step;
    step.delta = z > 20 ? z : fast_log1p(e);
    step.slope = z > 20 ? acc_t(1) : fast_divide(e, 1 + e);
    step.decay = fast_exp(step.delta * rate);
    return step;
  }
};

}  // namespace grootvl
