// Depthwise 3x3 convolution of channels-last maps, then SiLU, and its gradients.
//
// A thread has kVec neighbouring channels of kRows output rows. It goes from column to column, so that it loads each
// value of these rows and the two beside them once, for all the outputs that need it. A convolution with dilation d is
// one without in each of d x d maps, which consist of every d-th row and column.

#include <tuple>

#include "../../checks.h"
#include "../common/device.cuh"
#include "../common/math.cuh"
#include "../common/vector.cuh"

namespace grootvl {
namespace {

constexpr int kTaps = 3;  // in each direction
constexpr int kRows = 2;
constexpr int kInputRows = kRows + kTaps - 1;
constexpr int kThreads = 128;
constexpr int kBackwardBlocks = 3;     // that a multiprocessor runs at a time; the registers suffice for no more
constexpr int64_t kStripColumns = 16;  // about; more would leave too few threads, fewer load more columns twice

// Maps (B, H, W, D), of which x may have a stride from one pixel to the next.
template <typename T, typename acc_t>
struct ConvData {
  const T* x;
  int64_t x_stride;
  const acc_t* weight;  // (D, 3, 3)
  T* out;
  const T* grad;   // backward: of the result; `out` is then the gradient of what SiLU takes
  acc_t* dweight;  // (teams, D, 3, 3)
  int height, width, channels, dilation;
  int strips_across, strips_down;  // of each of the dilation^2 maps
  int strip_columns;
  int64_t strips;  // in all
  int teams;       // of threads, each with all channels of a strip
};

// A part of kRows rows of a map, of every `dilation`-th row and column.
struct Strip {
  int64_t image;
  int first_row, first_column, columns;

  template <typename Data>
  __device__ __forceinline__ Strip(const Data& data, int64_t number) {
    const int across = number % data.strips_across;
    int64_t rest = number / data.strips_across;
    const int down = rest % data.strips_down;
    rest /= data.strips_down;
    const int column = rest % data.dilation;
    rest /= data.dilation;
    const int row = rest % data.dilation;
    image = rest / data.dilation;
    first_row = row + down * kRows * data.dilation;
    first_column = column + across * data.strip_columns * data.dilation;
    columns = data.strip_columns;
  }
};

// Rows of a map that a thread goes along, from column to column.
template <int kCount, int kVec, typename T>
struct Rows {
  const T* row[kCount];
  bool inside[kCount];
  int column, width, step;
  int64_t column_stride;

  template <typename acc_t>
  __device__ __forceinline__ Rows(const T* map, int64_t pixel_stride, const ConvData<T, acc_t>& data,
                                  const Strip& strip, int first_row, int first_column)
      : column(first_column), width(data.width), step(data.dilation), column_stride(data.dilation * pixel_stride) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int number = first_row + r * data.dilation;
      inside[r] = number >= 0 && number < data.height;
      row[r] = map + ((strip.image * data.height + number) * data.width + first_column) * pixel_stride;
    }
  }

  // A column of values, zero beyond the edges of the map; then the next column is at hand.
  struct Column {
    Vector<T, kVec> rows[kCount];

    template <typename acc_t>
    __device__ __forceinline__ acc_t value(int row, int channel) const {
      return static_cast<acc_t>(rows[row].values[channel]);
    }
  };

  __device__ __forceinline__ Column next() {
    Column values;
    const bool in_width = static_cast<unsigned>(column) < static_cast<unsigned>(width);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      values.rows[r] = Vector<T, kVec>{};
      if (in_width && inside[r]) values.rows[r] = load<kVec>(row[r]);
      row[r] += column_stride;
    }
    column += step;
    return values;
  }
};

// The weights of a thread's channels.
template <int kVec, typename acc_t>
__device__ __forceinline__ void load_weights(acc_t (&weight)[kTaps][kTaps][kVec], const acc_t* from, bool flipped) {
  acc_t flat[kVec * kTaps * kTaps];
#pragma unroll
  for (int k = 0; k < kTaps * kTaps; ++k) {
    const auto word = load<kVec>(from + k * kVec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) flat[k * kVec + i] = word.values[i];
  }
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int source = flipped ? kTaps * kTaps - 1 - tap : tap;
      weight[tap / kTaps][tap % kTaps][i] = flat[i * kTaps * kTaps + source];
    }
  }
}

// The convolution, then SiLU; or with kGradient the gradient of the convolution for its input, without SiLU.
template <int kVec, bool kGradient, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads) conv_kernel(ConvData<T, acc_t> data) {
  const int words = data.channels / kVec;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t number = thread / words;
  if (number >= data.strips) return;
  const int channel = (thread - number * words) * kVec;
  const Strip strip(data, number);
  acc_t weight[kTaps][kTaps][kVec];
  load_weights<kVec>(weight, data.weight + int64_t(channel) * kTaps * kTaps, kGradient);

  // The sums of three columns: that on the left of the values, theirs, and that on the right.
  acc_t sums[kTaps][kRows][kVec] = {};
  Rows<kInputRows, kVec, T> rows(data.x + channel, data.x_stride, data, strip, strip.first_row - data.dilation,
                                 strip.first_column - data.dilation);
  T* out_row[kRows];
  bool inside[kRows];
#pragma unroll
  for (int out = 0; out < kRows; ++out) {
    const int row = strip.first_row + out * data.dilation;
    inside[out] = row < data.height;
    out_row[out] =
        data.out + ((strip.image * data.height + row) * data.width + strip.first_column) * data.channels + channel;
  }
  const int64_t out_stride = int64_t{data.dilation} * data.channels;
  auto next = rows.next();
  const int columns = min(strip.columns, (data.width - strip.first_column + data.dilation - 1) / data.dilation);
#pragma unroll 3
  for (int c = -1; c <= columns; ++c) {
    const auto values = next;
    next = rows.next();
#pragma unroll
    for (int r = 0; r < kInputRows; ++r) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const acc_t value = values.template value<acc_t>(r, i);
#pragma unroll
        for (int out = 0; out < kRows; ++out) {
          if (r < out || r >= out + kTaps) continue;
#pragma unroll
          for (int side = 0; side < kTaps; ++side) sums[side][out][i] += weight[r - out][kTaps - 1 - side][i] * value;
        }
      }
    }
    if (c >= 1) {
#pragma unroll
      for (int out = 0; out < kRows; ++out) {
        acc_t result[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const acc_t sum = sums[0][out][i];
          result[i] = kGradient ? sum : sum * sigmoid(sum);
        }
        if (inside[out]) store(out_row[out], result);
        out_row[out] += out_stride;
      }
    }
#pragma unroll
    for (int out = 0; out < kRows; ++out) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        sums[0][out][i] = sums[1][out][i];
        sums[1][out][i] = sums[2][out][i];
        sums[2][out][i] = 0;
      }
    }
  }
}

// The gradients of what SiLU takes, and of the weights: each team of threads adds up those of its strips.
template <int kVec, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) activation_and_weight_kernel(ConvData<T, acc_t> data) {
  const int words = data.channels / kVec;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t team = thread / words;
  if (team >= data.teams) return;
  const int channel = (thread - team * words) * kVec;
  acc_t weight[kTaps][kTaps][kVec], dweight[kTaps][kTaps][kVec] = {};
  load_weights<kVec>(weight, data.weight + int64_t(channel) * kTaps * kTaps, false);
  const T* map = data.x + channel;
  for (int64_t number = team; number < data.strips; number += data.teams) {
    const Strip strip(data, number);
    Rows<kInputRows, kVec, T> rows(data.x + channel, data.x_stride, data, strip, strip.first_row - data.dilation,
                                   strip.first_column - data.dilation);
    Rows<kRows, kVec, T> grads(data.grad + channel, data.channels, data, strip, strip.first_row, strip.first_column);
    typename Rows<kInputRows, kVec, T>::Column window[kTaps];
#pragma unroll
    for (int side = 0; side < kTaps; ++side) window[side] = rows.next();
    auto grad = grads.next();
    T* out_row = data.out + (grads.row[0] - data.grad) - grads.column_stride;
    const int64_t down = int64_t{data.dilation} * data.width * data.channels;
    const int columns = min(strip.columns, (data.width - strip.first_column + data.dilation - 1) / data.dilation);
    for (int c = 0; c < columns; ++c) {
      const auto next = rows.next();
      const auto next_grad = grads.next();
#pragma unroll
      for (int out = 0; out < kRows; ++out) {
        acc_t sum[kVec] = {};
#pragma unroll
        for (int r = 0; r < kTaps; ++r) {
#pragma unroll
          for (int side = 0; side < kTaps; ++side) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              sum[i] += weight[r][side][i] * window[side].template value<acc_t>(out + r, i);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const acc_t gate = sigmoid(sum[i]);
          sum[i] = grad.template value<acc_t>(out, i) * gate * (1 + sum[i] * (1 - gate));
        }
#pragma unroll
        for (int r = 0; r < kTaps; ++r) {
#pragma unroll
          for (int side = 0; side < kTaps; ++side) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              dweight[r][side][i] += sum[i] * window[side].template value<acc_t>(out + r, i);
            }
          }
        }
        if (grads.inside[out]) store(out_row + out * down, sum);
      }
      out_row += grads.column_stride;
      window[0] = window[1];
      window[1] = window[2];
      window[2] = next;
      grad = next_grad;
    }
  }
  acc_t* to = data.dweight + (team * data.channels + channel) * kTaps * kTaps;
#pragma unroll
  for (int k = 0; k < kTaps * kTaps; ++k) {
    acc_t word[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int place = k * kVec + i, tap = place % (kTaps * kTaps);
      word[i] = dweight[tap / kTaps][tap % kTaps][place / (kTaps * kTaps)];
    }
    store(to + k * kVec, word);
  }
}

template <typename T>
constexpr int kChannelsOfThread = sizeof(T) == 8 ? 2 : 4;

struct ConvInputs {
  Tensor x, weight;
  int64_t dilation;

  ConvInputs(const Tensor& x_, const Tensor& weight_, int64_t dilation_)
      : x(rows_of(x_)), weight(contiguous(to(weight_, accumulation_type(x_)))), dilation(dilation_) {
    if (!is_aligned(weight.const_data_ptr())) weight = clone(weight);
  }

  // The map with the same distance between all neighbouring pixels, and a pixel's channels side by side.
  static Tensor rows_of(const Tensor& map) {
    const bool rows = map.stride(3) == 1 && map.stride(1) == map.size(2) * map.stride(2) &&
                      map.stride(0) == map.size(1) * map.stride(1);
    return rows ? map : contiguous(map);
  }

  template <typename T, typename acc_t>
  ConvData<T, acc_t> data() const {
    ConvData<T, acc_t> data{};
    data.x = x.const_data_ptr<T>();
    data.x_stride = x.stride(2);
    data.weight = weight.const_data_ptr<acc_t>();
    data.height = static_cast<int>(x.size(1));
    data.width = static_cast<int>(x.size(2));
    data.channels = static_cast<int>(x.size(3));
    data.dilation = static_cast<int>(dilation);
    const auto divide = [](int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); };
    const int rows = divide(x.size(1), dilation), columns = divide(x.size(2), dilation);
    data.strips_down = divide(rows, kRows);
    data.strip_columns = divide(columns, divide(columns, kStripColumns));
    data.strips_across = divide(columns, data.strip_columns);
    data.strips = x.size(0) * dilation * dilation * data.strips_down * data.strips_across;
    return data;
  }

  // Whether words of `vec` channels of all maps can be loaded at once.
  bool aligned(int64_t vec, std::initializer_list<const Tensor*> maps) const {
    bool all = x.size(3) % vec == 0 && x.stride(2) % vec == 0 && is_aligned(x.const_data_ptr(), vec * x.element_size());
    for (const Tensor* map : maps) all &= is_aligned(map->const_data_ptr(), vec * map->element_size());
    return all;
  }

  // Calls `launch` with the channels of a thread.
  template <typename T, typename Launch>
  void with_words(std::initializer_list<const Tensor*> maps, Launch launch) const {
    if (aligned(kChannelsOfThread<T>, maps)) {
      launch(std::integral_constant<int, kChannelsOfThread<T>>());
    } else {
      launch(std::integral_constant<int, 1>());
    }
  }
};

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

Tensor depthwise_conv_silu(const Tensor& x, const Tensor& weight, int64_t dilation) {
  check_depthwise_conv(x, weight, dilation);
  const DeviceGuard guard(x);
  const ConvInputs inputs(x, weight, dilation);
  const Tensor out = empty_like(x);
  if (x.numel() == 0) return out;
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    auto data = inputs.data<scalar_t, Accumulation<scalar_t>>();
    data.out = out.mutable_data_ptr<scalar_t>();
    inputs.with_words<scalar_t>({&out}, [&](auto vec) {
      const unsigned blocks = blocks_of(data.strips * (data.channels / vec()));
      conv_kernel<vec(), false><<<blocks, kThreads, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> depthwise_conv_silu_backward(const Tensor& grad_, const Tensor& x, const Tensor& weight,
                                                        int64_t dilation) {
  check_depthwise_conv(x, weight, dilation);
  check_like("grad", grad_, "x", x, x.sizes());
  const DeviceGuard guard(x);
  const ConvInputs inputs(x, weight, dilation);
  const Tensor grad = contiguous(grad_), before = empty_like(x), dx = empty_like(x);
  const ScalarType accumulation = accumulation_type(x);
  if (x.numel() == 0) return {dx, zeros(x, weight.sizes(), accumulation)};
  Tensor dweight;
  for_floating_type(x.scalar_type(), [&](auto value) {
    using scalar_t = decltype(value);
    using acc_t = Accumulation<scalar_t>;
    auto data = inputs.data<scalar_t, acc_t>();
    data.grad = grad.const_data_ptr<scalar_t>();
    data.out = before.mutable_data_ptr<scalar_t>();
    inputs.with_words<scalar_t>({&grad}, [&](auto vec) {
      const int64_t words = data.channels / vec(),
                    most = int64_t{kBackwardBlocks} * kThreads * current_limits().multiprocessors;
      data.teams = static_cast<int>(std::clamp<int64_t>(most / words, 1, data.strips));
      const auto sizes = weight.sizes();
      const Tensor parts = empty(x, {data.teams, sizes[0], sizes[1], sizes[2], sizes[3]}, accumulation);
      data.dweight = parts.mutable_data_ptr<acc_t>();
      activation_and_weight_kernel<vec()><<<blocks_of(data.teams * words), kThreads, 0, current_stream()>>>(data);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      dweight = sum(parts, 0, accumulation);
    });
    data.x = before.const_data_ptr<scalar_t>();
    data.x_stride = data.channels;
    data.out = dx.mutable_data_ptr<scalar_t>();
    const auto launch = [&](auto vec) {
      const unsigned blocks = blocks_of(data.strips * (data.channels / vec()));
      conv_kernel<vec(), true><<<blocks, kThreads, 0, current_stream()>>>(data);
    };
    if (data.channels % kChannelsOfThread<scalar_t> == 0) {  // what was allocated here is aligned
      launch(std::integral_constant<int, kChannelsOfThread<scalar_t>>());
    } else {
      launch(std::integral_constant<int, 1>());
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("depthwise_conv_silu", TORCH_BOX(&grootvl::depthwise_conv_silu));
  m.impl("depthwise_conv_silu_backward", TORCH_BOX(&grootvl::depthwise_conv_silu_backward));
}
