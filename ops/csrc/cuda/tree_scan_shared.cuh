// The scan of maps that fit into shared memory: a block takes one tree and a few channels, loads them once, and does
// all phases of tree_scan.cuh on the chip. Each thread walks one run for one channel.
#pragma once

#include "tree_scan.cuh"

namespace grootvl {

constexpr int kSharedMaxVertices = 1 << 15;  // 15 bits for a vertex, one for the flag kBig
constexpr uint16_t kBig = 1 << 15;
constexpr uint16_t kNone = 0xffff;

// Shared memory of a block, in this order; sizes in elements.
template <typename acc_t, int kChannels, Pass pass>
struct SharedLayout {
  static constexpr int kStreams = is_backward(pass) ? 2 : 1;
  int num_vertices, runs;

  __host__ __device__ SharedLayout(int num_vertices, int log2_run)
      : num_vertices(num_vertices), runs(max_runs(num_vertices, log2_run)) {}
  __host__ __device__ int data() const { return num_vertices * kChannels; }
  __host__ __device__ int per_run() const { return runs * kChannels; }
  __host__ __device__ int chunks() const { return (num_vertices + 31) / 32; }
  // decay, then each stream's values; beta, then each stream's E and P
  __host__ __device__ size_t bytes() const {
    return sizeof(acc_t) * ((1 + kStreams) * size_t(data()) + (1 + 2 * kStreams) * size_t(per_run())) +
           sizeof(uint32_t) * 2 * (chunks() + 1) + sizeof(uint16_t) * (2 * num_vertices + 5 * runs);
  }
};

// Copies `kChannels` channels of every row between global memory (T) and shared memory (acc_t), in pieces of up to 16
// bytes.
template <typename T, typename acc_t, int kChannels, bool kLoad>
__device__ void copy_rows(std::conditional_t<kLoad, const T*, T*> global, acc_t* shared, int num_vertices, int channels,
                          int first_channel) {
  constexpr int kPiece = 16 / sizeof(T) < kChannels ? 16 / sizeof(T) : kChannels;
  constexpr int kPieces = kChannels / kPiece;
  constexpr int kUnroll = 4;  // independent pieces in flight a thread
  struct alignas(sizeof(T) * kPiece) Piece {
    T value[kPiece];
  };
  const bool aligned = channels % kPiece == 0 && reinterpret_cast<uintptr_t>(global) % sizeof(Piece) == 0;
  const int count = num_vertices * kPieces;
  for (int base = threadIdx.x; base < count; base += blockDim.x * kUnroll) {
    Piece pieces[kUnroll];
    if constexpr (kLoad) {
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int item = base + k * blockDim.x;
        const int channel = first_channel + item % kPieces * kPiece;
        if (item >= count) continue;
        const T* source = global + int64_t(item / kPieces) * channels + channel;
        if (aligned && channel + kPiece <= channels) {
          pieces[k] = *reinterpret_cast<const Piece*>(source);
        } else {
#pragma unroll
          for (int j = 0; j < kPiece; ++j) pieces[k].value[j] = channel + j < channels ? source[j] : T(0);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int item = base + k * blockDim.x;
      const int channel = first_channel + item % kPieces * kPiece;
      if (item >= count) continue;
      acc_t* row = shared + item * kPiece;
      if constexpr (kLoad) {
#pragma unroll
        for (int j = 0; j < kPiece; ++j) row[j] = static_cast<acc_t>(pieces[k].value[j]);
      } else {
        T* target = global + int64_t(item / kPieces) * channels + channel;
#pragma unroll
        for (int j = 0; j < kPiece; ++j) pieces[k].value[j] = static_cast<T>(row[j]);
        if (aligned && channel + kPiece <= channels) {
          *reinterpret_cast<Piece*>(target) = pieces[k];
        } else {
          for (int j = 0; j < kPiece && channel + j < channels; ++j) target[j] = pieces[k].value[j];
        }
      }
    }
  }
}

template <typename T, typename acc_t, int kChannels, Pass pass, int kThreads>
__global__ void __launch_bounds__(kThreads) scan_in_shared(ScanData<T> data, int log2_run) {
  using Layout = SharedLayout<acc_t, kChannels, pass>;
  constexpr int kStreams = Layout::kStreams;
  constexpr bool kDown = pass != Pass::kUp;
  // The second stream of kUpBackward, the output's gradient, is swept down only.
  constexpr bool kGradUp = pass == Pass::kFullBackward;

  const int num_vertices = data.num_vertices;
  const Layout layout(num_vertices, log2_run);
  extern __shared__ __align__(16) unsigned char memory[];
  acc_t* decay = reinterpret_cast<acc_t*>(memory);
  acc_t* value = decay + layout.data();                   // [stream][vertex][channel]: x, then u, then h
  acc_t* beta = value + kStreams * layout.data();         // [run][channel]
  acc_t* below = beta + layout.per_run();                 // [stream][run][channel]: E
  acc_t* bottom_h = below + kStreams * layout.per_run();  // [stream][run][channel]: P, then h_bottom
  uint32_t* chunk_cuts = reinterpret_cast<uint32_t*>(bottom_h + kStreams * layout.per_run());
  uint32_t* chunk_first = chunk_cuts + layout.chunks();  // runs that end before this chunk of 32 vertices
  uint16_t* postorder = reinterpret_cast<uint16_t*>(chunk_first + layout.chunks() + 2);
  uint16_t* parent = postorder + num_vertices;       // by vertex, with kBig
  uint16_t* run_end = parent + num_vertices;         // one past its last vertex in the postorder
  uint16_t* run_subtree = run_end + layout.runs;     // where the subtree of its last vertex begins
  uint16_t* run_vertex = run_subtree + layout.runs;  // its last vertex
  uint16_t* run_parent = run_vertex + layout.runs;
  uint16_t* run_bottom = run_parent + layout.runs;

  const int groups = (data.channels + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / groups;
  const int first_channel = blockIdx.x % groups * kChannels;
  const int64_t rows = image * num_vertices;
  const int lane = threadIdx.x % 32;

  // Load the tree and mark where runs end.
  {
    const int32_t* tree_parent = data.parent + rows;
    const int32_t* tree_order = data.order + rows;
    const int32_t* tree_size = data.subtree_size + rows;
    for (int t = threadIdx.x; t < layout.chunks() * 32; t += kThreads) {
      bool cut = false;
      if (t < num_vertices) {
        const unsigned limit = num_vertices - 1;  // a damaged tree must not lead outside of the arrays
        const unsigned v = min(unsigned(tree_order[num_vertices - 1 - t]), limit);
        const unsigned p = min(unsigned(tree_parent[v]), limit);
        const int size = tree_size[v];
        postorder[t] = v;
        parent[v] = p | (size >> log2_run > 0 ? kBig : 0);
        cut = ends_run(size, tree_size[p], v == p, t == num_vertices - 1, log2_run);
      }
      const uint32_t cuts = __ballot_sync(0xffffffff, cut);
      if (lane == 0) chunk_cuts[t / 32] = cuts;
    }
    const int64_t offset = rows * data.channels;
    copy_rows<T, acc_t, kChannels, true>(data.decay + offset, decay, num_vertices, data.channels, first_channel);
    copy_rows<T, acc_t, kChannels, true>(data.x + offset, value, num_vertices, data.channels, first_channel);
    if constexpr (kStreams == 2) {
      copy_rows<T, acc_t, kChannels, true>(data.grad + offset, value + layout.data(), num_vertices, data.channels,
                                           first_channel);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t before = 0;
    for (int first = 0; first < layout.chunks(); first += 32) {
      const int chunk = first + lane;
      uint32_t sum = chunk < layout.chunks() ? __popc(chunk_cuts[chunk]) : 0;
      const uint32_t own = sum;
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, sum, step);
        if (lane >= step) sum += other;
      }
      if (chunk < layout.chunks()) chunk_first[chunk] = before + sum - own;
      before += __shfl_sync(0xffffffff, sum, 31);
    }
    if (lane == 0) chunk_first[layout.chunks()] = before;
  }
  __syncthreads();
  const int runs = min(int(chunk_first[layout.chunks()]), layout.runs);
  for (int t = threadIdx.x; t < num_vertices; t += kThreads) {
    const uint32_t cuts = chunk_cuts[t / 32];
    const int run = chunk_first[t / 32] + __popc(cuts & ((1u << (t % 32)) - 1));
    if (cuts >> (t % 32) & 1 && run < runs) {
      const int v = postorder[t];
      run_end[run] = t + 1;
      run_vertex[run] = v;
      run_subtree[run] = max(t + 1 - data.subtree_size[rows + v], 0);
    }
  }
  __syncthreads();
  // The run above is the first one after it whose last vertex has this run in its subtree.
  for (int run = threadIdx.x; run < runs; run += kThreads) {
    const int v = run_vertex[run];
    int above = run + 1;
    while (above < runs && run_subtree[above] >= run_end[run]) ++above;
    run_parent[run] = (parent[v] & ~kBig) == v || above >= runs ? kNone : above;
  }

  // (1) Each run by itself, from its first vertex to its last.
  for (int item = threadIdx.x; item < runs * kChannels; item += kThreads) {
    const int run = item / kChannels, c = item % kChannels;
    const int end = run_end[run];
    int t = run > 0 ? run_end[run - 1] : 0;
    int v = postorder[t], bottom = kNone;
    acc_t product = 1, carry[kStreams] = {}, chain[kStreams] = {}, bottom_sum[kStreams] = {}, current[kStreams];
    for (int s = 0; s < kStreams; ++s) current[s] = value[s * layout.data() + v * kChannels + c];
    for (; t < end; ++t) {
      // The next vertex's value is read before this one's contribution is written: that goes to the next one in
      // registers.
      const bool last = t + 1 == end;
      const int next = last ? kNone : postorder[t + 1];
      const int p = parent[v] & ~kBig;
      const bool big = parent[v] & kBig;
      const acc_t a = decay[v * kChannels + c];
      if (big && bottom == kNone) bottom = v;
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        acc_t* values = value + s * layout.data() + c;
        const acc_t following = last ? acc_t(0) : values[next * kChannels];
        const acc_t u = current[s] + carry[s];
        acc_t contribution = a * u;
        carry[s] = 0;
        if (s == 0 || kGradUp) {
          values[v * kChannels] = u;
          if (!last && p != v) {
            if (p == next) {
              carry[s] = contribution;
            } else {
              values[p * kChannels] += contribution;
            }
          }
        } else {
          contribution = 0;  // swept down only: a vertex's own value alone reaches the bottom
        }
        if (big) {
          bottom_sum[s] += product * (u - chain[s]);
          chain[s] = contribution;
        }
        current[s] = following;
      }
      if (big && !last) product *= a;
      v = next;
    }
    beta[item] = product;
    for (int s = 0; s < kStreams; ++s) {
      below[s * layout.per_run() + item] = 0;
      bottom_h[s * layout.per_run() + item] = bottom_sum[s];
    }
    if (c == 0) run_bottom[run] = bottom;
  }
  __syncthreads();

  // (2) The runs among themselves, a thread for each stream and channel.
  if (threadIdx.x < kStreams * kChannels) {
    const int s = threadIdx.x / kChannels, c = threadIdx.x % kChannels;
    const acc_t* values = value + s * layout.data() + c;
    acc_t* entering = below + s * layout.per_run() + c;
    acc_t* bottoms = bottom_h + s * layout.per_run() + c;
    const bool up = s == 0 || kGradUp;
    const auto end_of = [&](int run) { return values[run_vertex[run] * kChannels]; };
    if (up) {
      acc_t carry = 0;
      for (int run = 0; run < runs; ++run) {
        const int above = run_parent[run];
        const acc_t e = entering[run * kChannels] + carry;
        const acc_t u = end_of(run) + beta[run * kChannels + c] * e;
        const acc_t contribution = above == kNone ? acc_t(0) : decay[run_vertex[run] * kChannels + c] * u;
        entering[run * kChannels] = e;
        carry = above == run + 1 ? contribution : acc_t(0);
        if (above != kNone && above != run + 1) entering[above * kChannels] += contribution;
      }
    }
    if (kDown) {
      acc_t previous = 0;
      for (int run = runs - 1; run >= 0; --run) {
        const int above = run_parent[run];
        const acc_t a = decay[run_vertex[run] * kChannels + c], b = beta[run * kChannels + c];
        const acc_t e = entering[run * kChannels];
        acc_t from_above = 0;
        if (above != kNone) {
          from_above = above == run + 1 ? previous : bottoms[above * kChannels];
          if (up) from_above -= a * (end_of(run) + b * e);
        }
        previous = e + bottoms[run * kChannels] + b * a * from_above;
        bottoms[run * kChannels] = previous;
      }
    }
  }
  __syncthreads();

  // (3) Finish each run: what enters from below along the chain, then the sweep down.
  for (int item = threadIdx.x; item < runs * kChannels; item += kThreads) {
    const int run = item / kChannels, c = item % kChannels;
    const int begin = run > 0 ? run_end[run - 1] : 0, last = run_vertex[run];
    if (run_bottom[run] != kNone) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (s == 1 && !kGradUp) continue;
        acc_t* values = value + s * layout.data() + c;
        acc_t entering = below[s * layout.per_run() + item];
        for (int v = run_bottom[run];; v = parent[v] & ~kBig) {
          values[v * kChannels] += entering;
          if (v == last) break;
          entering *= decay[v * kChannels + c];
        }
      }
    }
    if constexpr (kDown) {
      const int above = run_parent[run];
      acc_t h[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        h[s] = above == kNone ? acc_t(0) : bottom_h[s * layout.per_run() + above * kChannels + c];
      }
      int previous = kNone;
      for (int t = run_end[run] - 1; t >= begin; --t) {
        const int v = postorder[t], p = parent[v] & ~kBig;
        acc_t& a_slot = decay[v * kChannels + c];
        const acc_t a = a_slot;
        acc_t u[kStreams], from_above[kStreams];
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          const acc_t* values = value + s * layout.data() + c;
          u[s] = values[v * kChannels];
          if (previous != kNone && p != previous) h[s] = values[p * kChannels];
          from_above[s] = s == 0 || kGradUp ? h[s] - a * u[s] : h[s];
          h[s] = v == p ? u[s] : u[s] + a * from_above[s];
        }
        if constexpr (kStreams == 1) {
          value[v * kChannels + c] = h[0];
        } else {
          // The gradient of the edge to the parent; h for x itself is needed by the vertices below only.
          a_slot = v == p ? acc_t(0) : kGradUp ? u[1] * from_above[0] + u[0] * from_above[1] : u[0] * from_above[1];
          if constexpr (kGradUp) value[v * kChannels + c] = h[0];
          value[layout.data() + v * kChannels + c] = h[1];
        }
        previous = v;
      }
    }
  }
  __syncthreads();

  const int64_t offset = rows * data.channels;
  copy_rows<T, acc_t, kChannels, false>(data.out + offset, value + (kStreams - 1) * layout.data(), num_vertices,
                                        data.channels, first_channel);
  if constexpr (kStreams == 2) {
    copy_rows<T, acc_t, kChannels, false>(data.ddecay + offset, decay, num_vertices, data.channels, first_channel);
  }
}

}  // namespace grootvl
