// Depthwise 3x3 convolutions of channels-last maps with SiLU, and their gradients.
//
// A block has a tile of rows and columns of some channels, in some images. It goes from row to row, while the next rows
// are copied into a ring in shared memory. A thread has two channels of kColumns columns. It adds each row to the sums
// of the three rows of results that need it, and reads each value from shared memory once for all of its columns. The
// gradient of the input is the convolution of the gradient of the result, with the weights turned around. The values
// that it reads, times the input, are the gradient of the weights: with gradients, a thread has nine more sums for each
// channel, to the end. A convolution with dilation d is one without in each of d x d maps, which consist of every d-th
// row and column.

#include <algorithm>
#include <limits>

#include "../../checks.h"
#include "../common/addressing.cuh"
#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "../common/sum.cuh"
#include "../common/vector.cuh"

namespace grootvl {
namespace {

constexpr int kTaps = 3;            // in each direction
constexpr int kColumns = 4;         // of a thread
constexpr int kPair = 2;            // channels of a thread
constexpr int kRing = 8;            // rows in the ring, of half precision
constexpr int kMaxGroups = 7;       // of kColumns columns in a block; more would take registers from other blocks
constexpr int kTileRows = 28;       // at most about; fewer copy more rows twice
constexpr int kFewestTileRows = 4;  // about, for few images

constexpr int kThreads = 128;  // of a block, at most
constexpr int kSiluThreads = 256;

enum class Result { kSilu, kSiluAndBefore, kGradients };  // the second also keeps what SiLU takes

template <Result kResult, typename acc_t>  // that a multiprocessor runs at a time
constexpr int kBlocks = (kResult == Result::kGradients ? 4 : 6) * int(sizeof(float)) / int(sizeof(acc_t));

// Maps (B, H, W, D), which may have a stride from one pixel to the next; `before` has the one of `out`.
template <typename T, typename acc_t>
struct ConvData {
  const T* from;  // what is convolved: the input, or the gradient of the result
  const T* x;     // with gradients: the input
  int64_t from_stride, x_stride, out_stride;
  const acc_t* weight;  // (D, 3, 3)
  T *out, *before;      // the latter: what SiLU takes
  acc_t* parts;         // (blocks with other pixels, D, 3, 3): sums for the gradient of the weights
  int64_t images;
  int height, width, channels, dilation;
  int tiles_across, tiles_down;  // of each of the dilation^2 maps
  int tile_columns, tile_rows;   // the former a multiple of kColumns
  int images_of_block;
  int chunks;  // parts of the channels, one for each block
};

// The tile of a block.
struct Tile {
  int64_t image;                                    // the first
  int images, row, column, rows, columns, channel;  // in the map; how many rows and columns; the first channel

  template <typename T, typename acc_t>
  __device__ __forceinline__ explicit Tile(const ConvData<T, acc_t>& data) {
    const int64_t dilation = data.dilation;
    int64_t rest = blockIdx.x;
    channel = static_cast<int>(rest % data.chunks) * blockDim.x * kPair;
    rest /= data.chunks;
    const int across = rest % data.tiles_across;
    rest /= data.tiles_across;
    const int down = rest % data.tiles_down;
    rest /= data.tiles_down;
    const int first_column = rest % dilation, first_row = rest / dilation;
    row = first_row + down * data.tile_rows * data.dilation;
    column = first_column + across * data.tile_columns * data.dilation;
    rows = min(data.tile_rows, static_cast<int>((data.height - row + dilation - 1) / dilation));
    columns = min(data.tile_columns, static_cast<int>((data.width - column + dilation - 1) / dilation));
    image = int64_t(blockIdx.y) * data.images_of_block;
    images = static_cast<int>(min(int64_t(data.images_of_block), data.images - image));
  }
};

// Pixels of rows of a map, which a block copies into its ring one row after the other: kBeside pixels more than a tile
// has columns. A thread copies the same words of each row. Without kWords a word is one value, for maps whose pixels do
// not begin at multiples of 16 bytes.
template <bool kWords, int kBeside, typename T>
class Rows {
 public:
  static constexpr int kValues = kWords ? kVectorBytes / int(sizeof(T)) : 1;  // of a word
  // A tile has kColumns pixels for each kPair channels of a thread.
  static constexpr int kCopies = (kColumns * kPair + kValues - 1) / kValues + (kBeside * kPair + kValues - 1) / kValues;

  // From the column `column` of the tile on; right of `right` there are zeros.
  template <typename Data>
  __device__ __forceinline__ Rows(const T* map, int64_t stride, const Data& data, const Tile& tile, int column,
                                  int right, uint32_t pixel_bytes)
      : row_(map + tile.image * data.height * data.width * stride + tile.channel), row_stride_(data.width * stride) {
    const int words = blockDim.x * kPair / kValues;  // of a pixel; a power of two
    const int count = (data.tile_columns + kBeside) * words, threads = blockDim.x * blockDim.y;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int word = threadIdx.y * blockDim.x + threadIdx.x + i * threads;
      const int pixel = word / words, value = word % words * kValues;
      const int x = tile.column + (column + pixel) * data.dilation;
      exists_[i] = word < count;
      inside_[i] = x >= 0 && x < right && tile.channel + value < data.channels;
      from_[i] = inside_[i] ? static_cast<int>(x * stride) + value : 0;
      to_[i] = pixel * pixel_bytes + value * uint32_t(sizeof(T));
    }
  }

  // Copies row y of the image, or zeros if not `inside`.
  __device__ __forceinline__ void copy(uint32_t to, int64_t y, bool inside) const {
    const T* row = row_ + y * row_stride_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (!exists_[i]) continue;
      const bool copies = inside && inside_[i];
      if constexpr (kWords) {
        copy_async_16_bytes_or_zeros(to + to_[i], row + from_[i], copies);
      } else {
        store_shared(to + to_[i], copies ? row[from_[i]] : T(0));
      }
    }
  }

  __device__ __forceinline__ void next_image(int height) { row_ += height * row_stride_; }

 private:
  const T* row_;
  int64_t row_stride_;
  int from_[kCopies];
  uint32_t to_[kCopies];
  bool exists_[kCopies], inside_[kCopies];
};

// Copies rows of a tile into the ring: a row of what is convolved with the pixels beside it, and with gradients the
// next row of the input.
template <bool kWords, Result kResult, typename T, typename acc_t>
class Copier {
 public:
  __device__ __forceinline__ Copier(const ConvData<T, acc_t>& data, const Tile& tile, uint32_t pixel_bytes)
      : data_(data),
        tile_(tile),
        inputs_at_((data.tile_columns + kTaps - 1) * pixel_bytes),
        images_left_(tile.images),
        from_(data.from, data.from_stride, data, tile, -1, data.width, pixel_bytes),
        inputs_(data.x, data.x_stride, data, tile, 0, tile.column + tile.columns * data.dilation, pixel_bytes) {}

  __device__ __forceinline__ void next(uint32_t to) {
    if (images_left_ > 0) {
      const int y = tile_.row + row_ * data_.dilation;
      from_.copy(to, y, y >= 0 && y < data_.height);
      ++row_;
      if constexpr (kResult == Result::kGradients) {
        inputs_.copy(to + inputs_at_, y + data_.dilation, row_ < tile_.rows);
      }
      if (row_ > tile_.rows) {
        row_ = -1;
        --images_left_;
        from_.next_image(data_.height);
        inputs_.next_image(data_.height);
      }
    }
    commit_async_copies();
  }

 private:
  const ConvData<T, acc_t>& data_;
  const Tile& tile_;
  uint32_t inputs_at_;
  int images_left_, row_ = -1;
  Rows<kWords, kTaps - 1, T> from_;
  Rows<kWords, 0, T> inputs_;
};

template <typename T, typename acc_t>
__device__ __forceinline__ void load_pair(uint32_t address, acc_t (&values)[kPair]) {
  Vector<T, kPair> pair;
  if constexpr (sizeof(T) == 8) {
    load_shared(address, pair.values[0]);
    load_shared(address + sizeof(T), pair.values[1]);
  } else {
    load_shared(address, pair);
  }
  unpack(values, pair);
}

// Of as many channels as are left.
template <bool kWords, typename T, typename acc_t>
__device__ __forceinline__ void store_pair(T* to, const acc_t (&values)[kPair], int left) {
  if constexpr (kWords) {
    if (left > 0) store(to, values);
  } else {
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
      if (k < left) to[k] = static_cast<T>(values[k]);
    }
  }
}

template <bool kWords, Result kResult, typename T, typename acc_t>
__global__ void __launch_bounds__(kThreads, kBlocks<kResult, acc_t>) conv_kernel(ConvData<T, acc_t> data) {
  await_kernels_before();
  constexpr bool kGradients = kResult == Result::kGradients;
  constexpr int kRows = std::max<int>(4, 2 * kRing / int(sizeof(T)));  // of the ring
  const Tile tile(data);
  const uint32_t pixel_bytes = blockDim.x * kPair * uint32_t(sizeof(T)) + (blockDim.x < 32 ? 16 : 0);  // see launch
  Copier<kWords, kResult, T, acc_t> copier(data, tile, pixel_bytes);
  const uint32_t row_bytes = pixel_bytes * (data.tile_columns * (kGradients ? 2 : 1) + kTaps - 1);
#pragma unroll
  for (int row = 0; row < kRows - 1; ++row) copier.next(shared_address() + row * row_bytes);

  const int channel = tile.channel + threadIdx.x * kPair, column = threadIdx.y * kColumns;
  acc_t weight[kTaps][kTaps][kPair];
#pragma unroll
  for (int tap = 0; tap < kTaps * kTaps; ++tap) {
    const int from = kGradients ? tap : kTaps * kTaps - 1 - tap;
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      const bool inside = channel + i < data.channels;
      weight[tap / kTaps][tap % kTaps][i] = inside ? data.weight[(channel + i) * kTaps * kTaps + from] : acc_t(0);
    }
  }
  acc_t dweight[kTaps][kTaps][kPair] = {};

  const uint32_t values_at = (column * pixel_bytes) + threadIdx.x * kPair * uint32_t(sizeof(T));
  const uint32_t inputs_at = values_at + (data.tile_columns + kTaps - 1) * pixel_bytes;
  uint32_t slot = 0, next_slot = kRows - 1;
  for (int image = 0; image < tile.images; ++image) {
    // Of the rows before, at and after the row of values; the first is complete when this row is added.
    acc_t sums[kTaps][kColumns][kPair] = {};
    acc_t inputs[kTaps][kColumns][kPair] = {};
    T* out = data.out +
             (((tile.image + image) * data.height + tile.row - int64_t{2} * data.dilation) * data.width + tile.column +
              int64_t(column) * data.dilation) *
                 data.out_stride +
             channel;
#pragma unroll 3  // so that sums stay in their registers
    for (int row = -1; row <= tile.rows; ++row) {
      await_async_copies<kRows - 2>();
      __syncthreads();  // the copies of this row are there, and all threads have read the row before
      copier.next(shared_address() + next_slot * row_bytes);
      next_slot = next_slot + 1 == kRows ? 0 : next_slot + 1;
      const uint32_t from = shared_address() + slot * row_bytes;
      slot = slot + 1 == kRows ? 0 : slot + 1;
      acc_t values[kColumns + 2][kPair];
#pragma unroll
      for (int i = 0; i < kColumns + 2; ++i) load_pair<T>(from + values_at + i * pixel_bytes, values[i]);
      if constexpr (kGradients) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) load_pair<T>(from + inputs_at + i * pixel_bytes, inputs[kTaps - 1][i]);
      }
#pragma unroll
      for (int down = 0; down < kTaps; ++down) {
#pragma unroll
        for (int side = 0; side < kTaps; ++side) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
#pragma unroll
            for (int k = 0; k < kPair; ++k) {
              const acc_t value = values[i + kTaps - 1 - side][k];
              sums[down][i][k] += weight[down][side][k] * value;
              if constexpr (kGradients) dweight[down][side][k] += inputs[down][i][k] * value;
            }
          }
        }
      }
      if (row > 0) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (column + i >= tile.columns) continue;
          acc_t(&result)[kPair] = sums[0][i];
          T* to = out + int64_t(i) * data.dilation * data.out_stride;
          const int left = data.channels - channel;
          if constexpr (kResult == Result::kSiluAndBefore)
            store_pair<kWords>(data.before + (to - data.out), result, left);
          if constexpr (!kGradients) {
#pragma unroll
            for (int k = 0; k < kPair; ++k) result[k] *= sigmoid(result[k]);
          }
          store_pair<kWords>(to, result, left);
        }
      }
      out += int64_t(data.dilation) * data.width * data.out_stride;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          sums[0][i][k] = sums[1][i][k];
          sums[1][i][k] = sums[2][i][k];
          sums[2][i][k] = 0;
          inputs[0][i][k] = inputs[1][i][k];
          inputs[1][i][k] = inputs[2][i][k];
        }
      }
    }
  }
  if constexpr (kGradients) {
    acc_t values[kPair * kTaps * kTaps];  // (channels, taps)
#pragma unroll
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
#pragma unroll
      for (int k = 0; k < kPair; ++k) values[k * kTaps * kTaps + tap] = dweight[tap / kTaps][tap % kTaps][k];
    }
    const int64_t part = blockIdx.y * (gridDim.x / data.chunks) + blockIdx.x / data.chunks;
    acc_t* to = data.parts + (part * data.channels + tile.channel) * kTaps * kTaps;
    write_block_sums(values, to, (data.channels - tile.channel) * kTaps * kTaps);
  }
}

// Writes the convolution of `from` (B, L, D) into `out`, whose pixels have one distance from each other, and returns
// what SiLU takes; for gradients writes that of x, and returns that of the weight.
template <Result kResult>
Tensor convolve(const Tensor& from_, const Tensor& x_, const Tensor& weight_, int64_t height, int64_t dilation,
                const Tensor& out) {
  const DeviceGuard guard(from_);
  const Tensor from = rows_of(from_), x = kResult == Result::kGradients ? rows_of(x_) : from;
  const ScalarType accumulation = accumulation_type(from);
  const Tensor weight = contiguous(to(weight_, accumulation));
  Tensor other;
  if (kResult == Result::kSiluAndBefore) other = empty_like(from);
  if (from.numel() == 0) return kResult == Result::kGradients ? zeros(from, weight.sizes(), accumulation) : other;
  const int64_t channels = from.size(2), width = from.size(1) / height;
  const int64_t from_stride = from.stride(1), x_stride = x.stride(1), out_stride = out.stride(1);
  constexpr int64_t kMaxRow = std::numeric_limits<int>::max();
  GROOTVL_CHECK(width * std::max(from_stride, x_stride) <= kMaxRow, "a row of the map may take up to ", kMaxRow,
                " values, got x ", from.sizes());
  for_floating_type(from.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using acc_t = Accumulation<T>;
    const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    ConvData<T, acc_t> data{};
    data.from = from.const_data_ptr<T>();
    data.x = x.const_data_ptr<T>();
    data.from_stride = from_stride;
    data.x_stride = x_stride;
    data.out_stride = out_stride;
    data.weight = weight.const_data_ptr<acc_t>();
    data.out = out.mutable_data_ptr<T>();
    if (kResult == Result::kSiluAndBefore) data.before = other.mutable_data_ptr<T>();
    data.images = from.size(0);
    data.height = static_cast<int>(height);
    data.width = static_cast<int>(width);
    data.channels = static_cast<int>(channels);
    data.dilation = static_cast<int>(dilation);
    const int64_t rows = divide(data.height, dilation), columns = divide(data.width, dilation);
    data.tiles_across = static_cast<int>(divide(columns, kMaxGroups * kColumns));
    const int groups = static_cast<int>(divide(divide(columns, data.tiles_across), kColumns));
    data.tile_columns = groups * kColumns;
    // Few columns take more channels, for about as many threads. A warp with two groups of columns reads values of
    // pixels four apart, which 16 bytes more for each pixel bring into different banks.
    const int words = groups > 4 ? 16 : groups > 2 ? 32 : 64;
    data.chunks = static_cast<int>(divide(data.channels, words * kPair));
    // Few images have tiles of fewer rows: a block needs a time for each row, and there is room for more blocks.
    const int multiprocessors = current_limits().multiprocessors;
    const int64_t strips = int64_t(data.tiles_across) * dilation * dilation;
    int tile_rows = kTileRows;
    while (tile_rows > kFewestTileRows &&
           divide(rows, tile_rows) * strips * data.chunks * data.images < multiprocessors) {
      tile_rows = (tile_rows + 1) / 2;
    }
    data.tiles_down = static_cast<int>(divide(rows, tile_rows));
    data.tile_rows = static_cast<int>(divide(rows, data.tiles_down));
    const int64_t tiles = strips * data.tiles_down;
    // Blocks of small maps take several images, so that few write sums for the gradient of the weights.
    const int64_t blocks = tiles * data.chunks * data.images,
                  at_once = int64_t(kBlocks<kResult, acc_t>) * multiprocessors;
    const bool several = kResult == Result::kGradients && rows <= kTileRows / 2;
    const int64_t most = several ? divide(blocks, at_once) : 1;
    constexpr int64_t kMaxGrid = 65535;  // of CUDA
    data.images_of_block = static_cast<int>(std::max(std::min(most, data.images), divide(data.images, kMaxGrid)));
    const int64_t images = divide(data.images, data.images_of_block);
    Tensor parts;
    if (kResult == Result::kGradients) {
      parts = empty_parts(from, {images * tiles, weight.numel()}, accumulation);
      data.parts = parts.mutable_data_ptr<acc_t>();
    }
    const int64_t pixel_bytes = int64_t(words) * kPair * sizeof(T) + (words < 32 ? 16 : 0);
    const int64_t pixels = data.tile_columns * (kResult == Result::kGradients ? 2 : 1) + kTaps - 1;
    int64_t shared = std::max<int64_t>(4, 2 * kRing / sizeof(T)) * pixels * pixel_bytes;
    if (kResult == Result::kGradients) {
      shared = std::max<int64_t>(shared, sizeof(acc_t) * groups * words * kPair * kTaps * kTaps);
    }
    constexpr int64_t kValues = kVectorBytes / sizeof(T);
    bool words_fit = channels % kValues == 0;
    for (const int64_t stride : {from_stride, x_stride, out_stride}) words_fit &= stride % kValues == 0;
    for (const Tensor* map : {&from, &x, &out}) words_fit &= is_aligned(map->const_data_ptr());
    const auto launch_kernel = [&](auto kernel) {
      launch_with_much_shared(kernel, dim3(tiles * data.chunks, images), dim3(words, groups), shared, current_stream(),
                              data);
    };
    if (words_fit) {
      launch_kernel(conv_kernel<true, kResult, T, acc_t>);
    } else {
      launch_kernel(conv_kernel<false, kResult, T, acc_t>);
    }
    if (kResult == Result::kGradients) other = sum_parts_later(parts, 1, weight.sizes(), accumulation);
  });
  return other;
}

std::tuple<Tensor, Tensor> depthwise_conv_silu(const Tensor& x, const Tensor& weight, int64_t height, int64_t dilation,
                                               bool keep) {
  check_depthwise_conv(x, weight, height, dilation);
  const Tensor out = empty_like(x);
  if (keep) return {out, convolve<Result::kSiluAndBefore>(x, x, weight, height, dilation, out)};
  convolve<Result::kSilu>(x, x, weight, height, dilation, out);
  return {out, empty(x, {0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor> depthwise_conv_silu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        int64_t height, int64_t dilation) {
  check_depthwise_conv(x, weight, height, dilation);
  check_like("grad", grad, "x", x, x.sizes());
  const Tensor dx = empty_like(x);
  return {dx, convolve<Result::kGradients>(grad, x, weight, height, dilation, dx)};
}

// The gradient of what SiLU takes, from that of what it gives: the sum of two maps, or one. All are contiguous.
template <int kWord, typename T, typename acc_t>
__global__ void __launch_bounds__(kSiluThreads)
    silu_backward_kernel(const T* grad, const T* more, const T* before, int64_t words, T* result) {
  await_kernels_before();
  const int64_t word = int64_t(blockIdx.x) * kSiluThreads + threadIdx.x;
  if (word >= words) return;
  acc_t values[kWord], added[kWord] = {}, v[kWord];
  unpack(values, load<kWord>(grad + word * kWord));
  if (more != nullptr) unpack(added, load<kWord>(more + word * kWord));
  unpack(v, load<kWord>(before + word * kWord));
#pragma unroll
  for (int i = 0; i < kWord; ++i) {
    const acc_t sum = static_cast<acc_t>(static_cast<T>(values[i] + added[i]));  // as a map of sums would be
    const acc_t gate = sigmoid(v[i]);
    values[i] = sum * gate * (1 + v[i] * (1 - gate));
  }
  store(result + word * kWord, values);
}

Tensor silu_backward(const Tensor& grad_, const std::optional<Tensor>& more_, const Tensor& before_) {
  const DeviceGuard guard(before_);
  const Tensor grad = contiguous(grad_), more = more_ ? contiguous(*more_) : Tensor(), before = contiguous(before_);
  const Tensor result = empty_like(before);
  if (result.numel() == 0) return result;
  for_floating_type(result.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using acc_t = Accumulation<T>;
    const auto launch_words = [&](auto word) {
      const int64_t words = result.numel() / word(), blocks = (words + kSiluThreads - 1) / kSiluThreads;
      GROOTVL_CHECK(blocks <= INT32_MAX, "the map is too large: ", result.sizes());
      launch(silu_backward_kernel<word(), T, acc_t>, dim3(blocks), dim3(kSiluThreads), 0, current_stream(),
             grad.const_data_ptr<T>(), more_ ? more.const_data_ptr<T>() : nullptr, before.const_data_ptr<T>(), words,
             result.mutable_data_ptr<T>());
    };
    constexpr int kWord = kVectorBytes / sizeof(T);
    bool words_fit = result.numel() % kWord == 0;
    for (const Tensor* map : {&grad, more_ ? &more : &grad, &before}) words_fit &= is_aligned(map->const_data_ptr());
    if (words_fit) {
      launch_words(std::integral_constant<int, kWord>());
    } else {
      launch_words(std::integral_constant<int, 1>());
    }
  });
  return result;
}

// From the gradient of what SiLU gives, grad + more, and what it took: writes the gradient of x into dx, whose pixels
// may have a distance, and returns the one of the weight.
Tensor depthwise_conv_silu_backward_into(Tensor dx, const Tensor& grad, const std::optional<Tensor>& more,
                                         const Tensor& before, const Tensor& x, const Tensor& weight, int64_t height,
                                         int64_t dilation) {
  check_depthwise_conv(x, weight, height, dilation);
  check_like("grad", grad, "x", x, x.sizes());
  if (more) check_like("more", *more, "x", x, x.sizes());
  check_like("before", before, "x", x, x.sizes());
  check_like("dx", dx, "x", x, x.sizes());
  GROOTVL_CHECK(dx.numel() == 0 || has_rows(dx), "dx must have one distance between neighbouring pixels, got strides ",
                dx.strides());
  return convolve<Result::kGradients>(silu_backward(grad, more, before), x, weight, height, dilation, dx);
}

}  // namespace
}  // namespace grootvl

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) {
  m.impl("depthwise_conv_silu", TORCH_BOX(&grootvl::depthwise_conv_silu));
  m.impl("depthwise_conv_silu_backward", TORCH_BOX(&grootvl::depthwise_conv_silu_backward));
  m.impl("depthwise_conv_silu_backward_into", TORCH_BOX(&grootvl::depthwise_conv_silu_backward_into));
}
