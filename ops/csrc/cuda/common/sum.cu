#include "sum.cuh"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "launch.cuh"
#include "shares.cuh"
#include "warp.cuh"

namespace grootvl {
namespace {

constexpr int kPartsAhead = 8;  // parts that a thread loads together: the compiler would wait for each one

// The sums of a column over `count` rows, `inner` values apart, for kColumns columns at a time by a block of
// (kColumns, rows) threads. The threads of row 0 have them.
template <int kColumns, typename acc_t>
__device__ __forceinline__ acc_t sum_column(const acc_t* first, int count, int inner) {
  acc_t sum = 0;
  for (int part = threadIdx.y; part < count; part += kPartsAhead * blockDim.y) {
    acc_t values[kPartsAhead];
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) {
      const int next = part + i * blockDim.y;
      values[i] = next < count ? first[int64_t{next} * inner] : acc_t(0);
    }
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) sum += values[i];
  }
  constexpr int kRows = kWarpLanes / kColumns;  // of a warp
  const auto sum_rows = [&] {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance >= kColumns; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
  };
  sum_rows();
  if (blockDim.y > kRows) {
    __shared__ acc_t of_warps[kMaxBlockThreads / kWarpLanes][kColumns];
    if (threadIdx.y % kRows == 0) of_warps[threadIdx.y / kRows][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y >= kRows) return sum;
    sum = 0;
    for (unsigned warp = threadIdx.y; warp < blockDim.y / kRows; warp += kRows) sum += of_warps[warp][threadIdx.x];
    sum_rows();
  }
  return sum;
}

// `parts` (outer, count, inner) to `sums` (outer, inner). A block has kColumns columns, and blockDim.y threads for
// each.
template <int kColumns, typename acc_t, typename out_t>
__global__ void __launch_bounds__(kMaxBlockThreads)
    sum_parts_kernel(const acc_t* parts, int count, int inner, out_t* sums) {
  await_kernels_before();
  const int column = blockIdx.x * kColumns + threadIdx.x;
  const bool valid = column < inner;
  const acc_t sum =
      sum_column<kColumns>(parts + blockIdx.y * int64_t{count} * inner + (valid ? column : 0), count, inner);
  if (valid && threadIdx.y == 0) sums[blockIdx.y * int64_t{inner} + column] = static_cast<out_t>(sum);
}

// Sums of several operations: of each, `parts` (count, inner) to `sums` (inner).
struct Sum {
  const float* parts;
  float* sums;
  int count, inner;
  int first_block;
};
constexpr int kSectorColumns = 8;  // of float32 fill a sector of memory
constexpr int kMostSums = 64;      // of a launch
constexpr int kSumThreads = 512;
struct Sums {
  Sum of[kMostSums];
  int count;
};

__global__ void __launch_bounds__(kSumThreads) sum_several_kernel(const __grid_constant__ Sums all) {
  const Sum& sum = find_share(all.of, all.count, blockIdx.x);
  const int column = (blockIdx.x - sum.first_block) * kSectorColumns + threadIdx.x;
  const bool valid = column < sum.inner;
  await_kernels_before();
  const float total = sum_column<kSectorColumns>(sum.parts + (valid ? column : 0), sum.count, sum.inner);
  if (valid && threadIdx.y == 0) sum.sums[column] = total;
}

// The same with one thread for each column, for many columns.
template <typename acc_t, typename out_t>
__global__ void sum_long_parts_kernel(const acc_t* parts, int64_t count, int64_t inner, out_t* sums) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= inner) return;
  const acc_t* next = parts + blockIdx.y * count * inner + column;
  acc_t sum = 0;
  for (int64_t part = 0; part < count; part += kPartsAhead) {
    acc_t values[kPartsAhead];
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i, next += inner) values[i] = part + i < count ? *next : acc_t(0);
#pragma unroll
    for (int i = 0; i < kPartsAhead; ++i) sum += values[i];
  }
  sums[blockIdx.y * inner + column] = static_cast<out_t>(sum);
}

}  // namespace

Tensor sum_parts(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type) {
  const Tensor sums = empty(parts, sizes, type);
  const int64_t inner = sums.numel() / outer, count = parts.numel() / std::max<int64_t>(1, sums.numel());
  if (sums.numel() == 0) return sums;
  for_accumulation_type(parts.scalar_type(), [&](auto value) {
    using acc_t = decltype(value);
    for_floating_type(type, [&](auto result) {
      using out_t = decltype(result);
      const auto launch_columns = [&](auto columns) {
        // As many threads share a column as load all parts at once, if a block can have them.
        constexpr int kRows = kWarpLanes / columns();  // of a warp
        constexpr int64_t kMostWarps = kMaxBlockThreads / kWarpLanes;
        const int64_t warps = (count + kPartsAhead * kRows - 1) / (kPartsAhead * kRows);
        const dim3 block(columns(), std::min(std::max<int64_t>(warps, 1), kMostWarps) * kRows);
        launch(sum_parts_kernel<columns(), acc_t, out_t>, dim3((inner + columns() - 1) / columns(), outer), block, 0,
               current_stream(), parts.const_data_ptr<acc_t>(), count, inner, sums.mutable_data_ptr<out_t>());
      };
      constexpr int64_t kManyColumns = 1 << 13, kThreadsForAll = 1 << 15, kMostParts = 1 << 30;
      if (inner >= kThreadsForAll || count > kMostParts) {
        constexpr int kThreads = 256;
        const dim3 blocks((inner + kThreads - 1) / kThreads, outer);
        sum_long_parts_kernel<acc_t, out_t><<<blocks, kThreads, 0, current_stream()>>>(
            parts.const_data_ptr<acc_t>(), count, inner, sums.mutable_data_ptr<out_t>());
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      } else if (inner >= kManyColumns) {
        launch_columns(std::integral_constant<int, kWarpLanes>());
      } else {
        launch_columns(std::integral_constant<int, kSectorColumns>());
      }
    });
  });
  return sums;
}

namespace {

// Of the thread of a backward pass: parts and sums of (outer, count, inner).
struct WaitingSum {
  Tensor parts, sums;
  int64_t outer, count, inner;
};
thread_local bool sums_wait = false;
thread_local std::vector<WaitingSum> waiting_sums;

// Tensors of float32 that share allocations of `capacity` values: an allocation of its own, and its end, take the host
// longer than a launch.
class SharedAllocation {
 public:
  explicit SharedAllocation(int64_t capacity) : capacity_(capacity) {}

  Tensor take(const Tensor& like, Sizes sizes) {
    constexpr int64_t kAlignment = 32;  // values, for whole lines of memory
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    if (count > capacity_) return empty(like, sizes, ScalarType::Float);
    if (!memory_ || memory_->device() != like.device() || used_ + count > capacity_) {
      memory_ = empty(like, {capacity_}, ScalarType::Float);
      used_ = 0;
    }
    const int64_t first = used_;
    used_ += (count + kAlignment - 1) / kAlignment * kAlignment;
    return reshaped(*memory_, sizes, first);
  }

  // The tensors keep the memory until they end.
  void leave() { memory_.reset(); }

 private:
  const int64_t capacity_;
  std::optional<Tensor> memory_;
  int64_t used_ = 0;
};
thread_local SharedAllocation waiting_parts(int64_t{4} << 20), sums_of_parts(int64_t{16} << 10);

}  // namespace

Tensor empty_parts(const Tensor& like, Sizes sizes, ScalarType type) {
  return sums_wait && type == ScalarType::Float ? waiting_parts.take(like, sizes) : empty(like, sizes, type);
}

Tensor sum_parts_later(const Tensor& parts, int64_t outer, Sizes sizes, ScalarType type) {
  if (!sums_wait || parts.scalar_type() != ScalarType::Float || type != ScalarType::Float) {
    return sum_parts(parts, outer, sizes, type);
  }
  const Tensor sums = sums_of_parts.take(parts, sizes);
  if (sums.numel() == 0) return sums;
  waiting_sums.push_back({parts, sums, outer, parts.numel() / sums.numel(), sums.numel() / outer});
  return sums;
}

void compute_waiting_sums() {
  waiting_parts.leave();
  sums_of_parts.leave();
  if (waiting_sums.empty()) return;
  const std::vector<WaitingSum> waiting = std::move(waiting_sums);
  waiting_sums.clear();
  const DeviceGuard guard(waiting[0].sums);
  Sums all{};
  int64_t blocks = 0;
  const auto launch_all = [&] {
    if (blocks > 0) {
      launch(sum_several_kernel, dim3(blocks), dim3(kSectorColumns, kSumThreads / kSectorColumns), 0, current_stream(),
             all);
    }
    all.count = 0;
    blocks = 0;
  };
  for (const WaitingSum& sum : waiting) {
    const int64_t of_sum = (sum.inner + kSectorColumns - 1) / kSectorColumns;
    for (int64_t i = 0; i < sum.outer; ++i) {
      if (all.count == kMostSums || blocks + of_sum > INT32_MAX / 2) launch_all();
      all.of[all.count++] = {sum.parts.const_data_ptr<float>() + i * sum.count * sum.inner,
                             sum.sums.mutable_data_ptr<float>() + i * sum.inner, static_cast<int>(sum.count),
                             static_cast<int>(sum.inner), static_cast<int>(blocks)};
      blocks += of_sum;
    }
  }
  launch_all();
}

namespace {

// From here on, sums of the operations of this thread wait.
void let_sums_wait(const Tensor&) { sums_wait = true; }

// Until here.
void run_sums(const Tensor&) {
  sums_wait = false;
  compute_waiting_sums();
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("sums_wait", TORCH_BOX(&grootvl::let_sums_wait));
  m.impl("sums_run", TORCH_BOX(&grootvl::run_sums));
}
