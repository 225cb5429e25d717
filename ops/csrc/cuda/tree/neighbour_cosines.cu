// Cosines of the vectors of a sequence with the vectors shortly before them: a warp for each vector, a block for
// neighbouring ones, so that a vector comes from memory once, and from the caches where others need it.
#include "../../checks.h"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../common/warp.cuh"

namespace grootvl {
namespace {

constexpr int kThreads = 256;
constexpr int kDistances = 4;  // that are worked on together

struct Sequences {
  int64_t batch, length, channels, neighbours;
  int64_t batch_stride, vertex_stride;
};

// sqrt(square), at least 1e-8; unlike fmax, it keeps NaN.
template <typename acc_t>
__device__ __forceinline__ acc_t limited_norm(acc_t square) {
  const acc_t norm = sqrt(square), smallest = 1e-8;
  return norm < smallest ? smallest : norm;
}

template <int kVec, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads) neighbour_cosines_kernel(const T* x, acc_t* cosines, Sequences shape) {
  await_kernels_before();
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
  if (row >= shape.batch * shape.length) return;
  const int64_t vertex = row % shape.length;
  const T* own = x + row / shape.length * shape.batch_stride + vertex * shape.vertex_stride;
  for (int64_t first = 0; first < shape.neighbours; first += kDistances) {
    acc_t square = 0, products[kDistances] = {}, squares[kDistances] = {};
    for (int64_t c = lane * kVec; c < shape.channels; c += kWarpLanes * kVec) {
      acc_t a[kVec], b[kVec];
      unpack(a, load<kVec>(own + c));
#pragma unroll
      for (int i = 0; i < kVec; ++i) square += a[i] * a[i];
#pragma unroll
      for (int d = 0; d < kDistances; ++d) {
        const int64_t distance = first + d + 1;
        if (distance > vertex || distance > shape.neighbours) continue;
        unpack(b, load<kVec>(own - distance * shape.vertex_stride + c));
#pragma unroll
        for (int i = 0; i < kVec; ++i) products[d] += a[i] * b[i], squares[d] += b[i] * b[i];
      }
    }
    const acc_t norm = limited_norm(warp_sum(square));
#pragma unroll
    for (int d = 0; d < kDistances; ++d) {
      const int64_t distance = first + d + 1;
      if (distance > shape.neighbours) break;
      const acc_t cosine = warp_sum(products[d]) / (norm * limited_norm(warp_sum(squares[d])));
      if (lane == 0) cosines[row * shape.neighbours + distance - 1] = distance > vertex ? acc_t(0) : cosine;
    }
  }
}

Tensor neighbour_cosines(const Tensor& x_, int64_t neighbours) {
  check_neighbour_cosines(x_, neighbours);
  const DeviceGuard guard(x_);
  const Tensor x = x_.stride(2) == 1 || x_.size(2) == 1 ? x_ : contiguous(x_);
  const Sequences shape{x.size(0), x.size(1), x.size(2), neighbours, x.stride(0), x.stride(1)};
  const Tensor cosines = empty(x, {shape.batch, shape.length, neighbours}, accumulation_type(x));
  if (cosines.numel() == 0) return cosines;
  for_floating_type(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using acc_t = Accumulation<T>;
    constexpr int kVec = kVectorBytes / sizeof(T);
    const auto* data = x.const_data_ptr<T>();
    const bool aligned = is_aligned(data) && shape.channels % kVec == 0 && shape.batch_stride % kVec == 0 &&
                         shape.vertex_stride % kVec == 0;
    constexpr int64_t kRows = kThreads / kWarpLanes;
    const int64_t blocks = (shape.batch * shape.length + kRows - 1) / kRows;
    GROOTVL_CHECK(blocks <= INT32_MAX, "x is too large: ", x.sizes());
    launch(aligned ? neighbour_cosines_kernel<kVec, T, acc_t> : neighbour_cosines_kernel<1, T, acc_t>,
           static_cast<unsigned>(blocks), kThreads, 0, current_stream(), data, cosines.mutable_data_ptr<acc_t>(),
           shape);
  });
  return cosines;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("neighbour_cosines", TORCH_BOX(&grootvl::neighbour_cosines)); }
