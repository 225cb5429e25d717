// Depthwise 3x3 convolution of channels-last maps, then SiLU.
//
// A thread has kVec neighbouring channels of kRows output rows. It goes from column to column, so that it loads each
// value of these rows and the two beside them once, for all the outputs that need it. A convolution with dilation d is
// one without in each of d x d maps, which consist of every d-th row and column.

#include <initializer_list>

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
constexpr int kBlocks = 4;             // that a multiprocessor runs at a time
constexpr int kAhead = 2;              // columns that are loaded before they are needed
constexpr int64_t kStripColumns = 16;  // about; more would leave too few threads, fewer load more columns twice

// Maps (B, H, W, D), of which x may have a stride from one pixel to the next.
template <typename T, typename acc_t>
struct ConvData {
  const T* x;
  int64_t x_stride;
  const acc_t* weight;  // (D, 3, 3)
  T* out;
  int height, width, channels, dilation;
  int strips_across, strips_down;  // of each of the dilation^2 maps
  int strip_columns;
  int64_t strips;  // in all
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
__device__ __forceinline__ void load_weights(acc_t (&weight)[kTaps][kTaps][kVec], const acc_t* from) {
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
      weight[tap / kTaps][tap % kTaps][i] = flat[i * kTaps * kTaps + tap];
    }
  }
}

template <int kVec, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocks) conv_kernel(ConvData<T, acc_t> data) {
  const int words = data.channels / kVec;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t number = thread / words;
  if (number >= data.strips) return;
  const int channel = (thread - number * words) * kVec;
  const Strip strip(data, number);
  acc_t weight[kTaps][kTaps][kVec];
  load_weights<kVec>(weight, data.weight + int64_t(channel) * kTaps * kTaps);

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
  typename Rows<kInputRows, kVec, T>::Column pending[kAhead];
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) pending[ahead] = rows.next();
  const int columns = min(strip.columns, (data.width - strip.first_column + data.dilation - 1) / data.dilation);
  for (int first = -1; first <= columns; first += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int column = first + ahead;
      if (column > columns) break;
      const auto values = pending[ahead];
      pending[ahead] = rows.next();
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
#pragma unroll
      for (int out = 0; out < kRows; ++out) {
        acc_t result[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          result[i] = sums[0][out][i] * sigmoid(sums[0][out][i]);
          sums[0][out][i] = sums[1][out][i];
          sums[1][out][i] = sums[2][out][i];
          sums[2][out][i] = 0;
        }
        if (column < 1) continue;  // there is no column on the left
        if (inside[out]) store(out_row[out], result);
        out_row[out] += out_stride;
      }
    }
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
      conv_kernel<vec()><<<blocks, kThreads, 0, current_stream()>>>(data);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("depthwise_conv_silu", TORCH_BOX(&grootvl::depthwise_conv_silu));
}
