// Weights of the edges between neighbouring pixels of channels-last feature maps.
//
// A group of 4 to 32 lanes takes a tile of 4 x 2 pixels. Each lane loads 16 bytes of a row at a time and each channel
// once, and keeps the sums of all edges of the tile (and the norms of the pixels they touch) in registers, so that a
// row is loaded once for several edges. The rows that neighbouring tiles share come from the caches.

#include <string>
#include <type_traits>

#include "../../checks.h"
#include "../common/device.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../common/warp.cuh"

namespace grootvl {
namespace {

constexpr int kTileHeight = 4;
constexpr int kTileWidth = 2;
constexpr int kTilePixels = kTileHeight * kTileWidth;
constexpr int kTileEdges = 2 * kTilePixels;  // of each pixel the edge down and the edge to the right
// The rows a tile reads: its pixels, and those below and to the right of them, without the corner.
constexpr int kRows = (kTileHeight + 1) * (kTileWidth + 1) - 1;
constexpr int kSums = 32;  // sums of a tile: an edge each, then a row each, padded to a power of two
static_assert(kTileEdges + kRows <= kSums);
constexpr int kThreads = 128;

struct Map {
  int64_t batch, height, width, channels;
  int64_t batch_stride, row_stride, column_stride;
};

// Sums each of the first kCount values over a group of kGroup lanes; lane i of the group ends with the totals i *
// kCount / kGroup to (i + 1) * kCount / kGroup - 1 in values[0], values[1], ...
template <int kGroup, int kCount, typename Accumulator>
__device__ __forceinline__ void reduce_scatter(Accumulator (&values)[kSums]) {
  if constexpr (kGroup > 1) {
    const bool upper = threadIdx.x & (kGroup / 2);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const Accumulator low = values[i];
      const Accumulator high = values[i + kCount / 2];
      const Accumulator received = __shfl_xor_sync(kAllLanes, upper ? low : high, kGroup / 2);
      values[i] = (upper ? high : low) + received;
    }
    reduce_scatter<kGroup / 2, kCount / 2>(values);
  }
}

template <Metric kMetric, int kGroup, int kVector, typename Scalar, typename Accumulator>
__global__ void __launch_bounds__(kThreads)
    edge_weights_kernel(const Scalar* __restrict__ features, Accumulator* __restrict__ weights, Map map) {
  __shared__ Accumulator shared_sums[kThreads / kGroup][kSums];
  await_kernels_before();

  const int lane = threadIdx.x % kGroup;
  const int64_t tiles_x = (map.width + kTileWidth - 1) / kTileWidth;
  const int64_t tiles_y = (map.height + kTileHeight - 1) / kTileHeight;
  const int64_t tiles = map.batch * tiles_y * tiles_x;
  const int64_t group = blockIdx.x * int64_t(kThreads / kGroup) + threadIdx.x / kGroup;
  // Lanes without a tile compute the last one again, as the shuffles need all lanes, and store nothing.
  const int64_t tile = group < tiles ? group : tiles - 1;
  const int64_t left = tile % tiles_x * kTileWidth;
  const int64_t top = tile / tiles_x % tiles_y * kTileHeight;
  const int64_t batch = tile / tiles_x / tiles_y;

  // Row r of the tile is pixel (r / (kTileWidth + 1), r % (kTileWidth + 1)). Those beyond the map repeat its last.
  const Scalar* rows[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int64_t y = min(top + row / (kTileWidth + 1), map.height - 1);
    const int64_t x = min(left + row % (kTileWidth + 1), map.width - 1);
    rows[row] = features + batch * map.batch_stride + y * map.row_stride + x * map.column_stride;
  }

  Accumulator sums[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;

  for (int64_t channel = int64_t(lane) * kVector; channel < map.channels; channel += kGroup * kVector) {
    Vector<Scalar, kVector> loaded[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      loaded[row] = load<kVector>(rows[row] + channel);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Accumulator values[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) values[row] = static_cast<Accumulator>(loaded[row].values[i]);
      if (kMetric == Metric::kCosine) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) sums[kTileEdges + row] += values[row] * values[row];
      }
#pragma unroll
      for (int edge = 0; edge < kTileEdges; ++edge) {
        const int row = edge / 2 / kTileWidth * (kTileWidth + 1) + edge / 2 % kTileWidth;
        const Accumulator f = values[row];
        const Accumulator g = values[edge % 2 == 0 ? row + kTileWidth + 1 : row + 1];
        if (kMetric == Metric::kCosine) {
          sums[edge] += f * g;
        } else if (kMetric == Metric::kEuclidean) {
          sums[edge] += (f - g) * (f - g);
        } else {
          sums[edge] += f < g ? g - f : f - g;  // NaN if f or g is
        }
      }
    }
  }

  reduce_scatter<kGroup, kSums>(sums);
  Accumulator* totals = shared_sums[threadIdx.x / kGroup];
#pragma unroll
  for (int i = 0; i < kSums / kGroup; ++i) totals[lane * (kSums / kGroup) + i] = sums[i];
  __syncwarp();

  if (group >= tiles) return;
  const int64_t vertical_edges = (map.height - 1) * map.width;
  Accumulator* output = weights + batch * (vertical_edges + map.height * (map.width - 1));
  for (int edge = lane; edge < kTileEdges; edge += kGroup) {
    const int row = edge / 2 / kTileWidth * (kTileWidth + 1) + edge / 2 % kTileWidth;
    const bool vertical = edge % 2 == 0;
    const int64_t y = top + edge / 2 / kTileWidth;
    const int64_t x = left + edge / 2 % kTileWidth;
    if (y + vertical >= map.height || x + !vertical >= map.width) continue;
    Accumulator weight = totals[edge];
    if (kMetric == Metric::kCosine) {
      const Accumulator smallest = 1e-8;
      Accumulator f = sqrt(totals[kTileEdges + row]);
      Accumulator g = sqrt(totals[kTileEdges + (vertical ? row + kTileWidth + 1 : row + 1)]);
      f = f < smallest ? smallest : f;  // unlike fmax, keeps NaN
      g = g < smallest ? smallest : g;
      weight = exp(-weight / (f * g));
    } else if (kMetric == Metric::kEuclidean) {
      weight = sqrt(weight);
    }
    output[vertical ? y * map.width + x : vertical_edges + y * (map.width - 1) + x] = weight;
  }
}

template <Metric kMetric, int kVector, typename Scalar, typename Accumulator>
void compute_weights(const Scalar* features, Accumulator* weights, const Map& map) {
  const int64_t tiles =
      map.batch * ((map.height + kTileHeight - 1) / kTileHeight) * ((map.width + kTileWidth - 1) / kTileWidth);
  const int64_t vectors = map.channels / kVector;
  // Few lanes a tile need the fewest additions across lanes; many share the work of long rows, or of few tiles.
  const int64_t lanes_to_fill_device = int64_t{current_limits().multiprocessors} * 512;
  int group = kVector == 1 ? 32 : 4;
  while (group < 32 && (vectors >= 8 * group || (vectors > group && tiles * group < lanes_to_fill_device))) group *= 2;

  const int64_t blocks = (tiles * group + kThreads - 1) / kThreads;
  GROOTVL_CHECK(blocks < (int64_t(1) << 31), "features with ", map.batch, " maps of ", map.height, " x ", map.width,
                " pixels are too large");
  const auto launch_groups = [&](auto size) {
    launch(edge_weights_kernel<kMetric, size(), kVector, Scalar, Accumulator>, static_cast<unsigned>(blocks), kThreads,
           0, current_stream(), features, weights, map);
  };
  if constexpr (kVector > 1) {
    if (group == 4) return launch_groups(std::integral_constant<int, 4>());
    if (group == 8) return launch_groups(std::integral_constant<int, 8>());
    if (group == 16) return launch_groups(std::integral_constant<int, 16>());
  }
  launch_groups(std::integral_constant<int, 32>());
}

template <typename Scalar, typename Accumulator>
void compute_weights(const Tensor& features, const Tensor& weights, const Map& map, Metric metric) {
  constexpr int kVector = kVectorBytes / sizeof(Scalar);
  const auto* data = features.const_data_ptr<Scalar>();
  auto* output = weights.mutable_data_ptr<Accumulator>();
  const bool aligned = is_aligned(data) && map.channels % kVector == 0 && map.batch_stride % kVector == 0 &&
                       map.row_stride % kVector == 0 && map.column_stride % kVector == 0;
  const auto choose = [&](auto metric_constant) {
    constexpr Metric kMetric = decltype(metric_constant)::value;
    aligned ? compute_weights<kMetric, kVector>(data, output, map) : compute_weights<kMetric, 1>(data, output, map);
  };
  if (metric == Metric::kCosine) {
    choose(std::integral_constant<Metric, Metric::kCosine>());
  } else if (metric == Metric::kEuclidean) {
    choose(std::integral_constant<Metric, Metric::kEuclidean>());
  } else {
    choose(std::integral_constant<Metric, Metric::kManhattan>());
  }
}

Tensor edge_weights(const Tensor& features, const std::string& metric_name) {
  check_features(features);
  const Metric metric = parse_metric(metric_name);
  const DeviceGuard guard(features);
  const Tensor input = features.stride(3) == 1 || features.size(3) == 1 ? features : contiguous(features);
  const Map map{input.size(0),   input.size(1),   input.size(2),  input.size(3),
                input.stride(0), input.stride(1), input.stride(2)};
  const Tensor weights = empty(input, {map.batch, num_grid_edges(map.height, map.width)}, accumulation_type(input));
  if (weights.numel() == 0) return weights;

  for_floating_type(input.scalar_type(), [&](auto value) {
    compute_weights<decltype(value), Accumulation<decltype(value)>>(input, weights, map, metric);
  });
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grootvl_ops, CUDA, m) { m.impl("edge_weights", TORCH_BOX(&edge_weights)); }

}  // namespace grootvl
