// Device code of the forward pass, and what it shares with the backward pass (ddf_kernel_backward.cuh).
//
// Free of torch, and of launches: tests/ops/cuda_emulator runs the same code on the CPU. Three kernels:
//   forward_kernel                for any strides, best where x is contiguous: lanes lie along x; a thread holds
//                                 the spatial filters of a few pixels in registers and loops over channels
//   forward_channels_last_kernel  a thread computes 16 bytes of channels for four pixels at once
//   forward_any_kernel            every size and option, in 64-bit arithmetic; lanes along x or along the channels
// A fourth, for large images, is in ddf_kernel_tile.cuh.
#pragma once

#include <type_traits>

#include "ddf.h"

#ifndef DDFUP_CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ddfup {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kStage = 32;  // channels whose filters lie in shared memory at a time

template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

// How the blocks of a launch share the work; ddf_launch.cuh fills it in. A block's index counts, fastest first, pixel
// blocks, sub-positions, tap groups, channel slices and samples. A slice holds channels of one head.
struct Work {
  int64_t pixels;        // items (pixels or groups of pixels) of one sample and sub-position
  int64_t pixel_blocks;  // blocks that share them
  int64_t sub_blocks;    // blocks along the sub-positions
  int64_t tap_blocks;    // blocks along the taps
  int64_t slice;         // channels per slice at most
  int64_t slices;        // slices per head
  int lanes;             // neighbouring threads that take neighbouring channels: 1 where x is contiguous
  int rounds;            // items per thread, where a thread takes several
  int64_t row_step;      // elements between the results of a thread that holds several rows
};

// Everything a kernel gets. In the forward pass `output` is the result; in the backward pass it is the incoming
// gradient, and the result goes to `result`, or in pieces to `partial`.
template <typename T>
struct Call {
  Problem problem;
  // About two waves on the largest GPUs. The same everywhere, so that sums are cut alike on every GPU.
  int64_t enough_blocks = 1024;
  // The tile kernel is not for images that fill less of its tiles than this, in percent.
  int64_t least_filled = 67;
  Work work;
  const T* features;
  const T* channel_filter;
  const T* spatial_filter;
  const T* grad_output;
  T* result;
  Accumulator<T>* partial;
  Strides features_strides, spatial_strides, output_strides;  // output: of the result forward, of grad_output backward
  Strides result_strides;                                     // of the gradient of the features
};

struct Job {
  int64_t n, pixel_block;
  int sub, tap, head, slice;  // sub, tap: index of the block along them
  int begin, end;             // channels
};

__device__ inline Job job_of_block(const Problem& p, const Work& work) {
  Job job;
  unsigned index = blockIdx.x;
  const auto take = [&index](int64_t count) {
    const unsigned digit = index % static_cast<unsigned>(count);
    index /= static_cast<unsigned>(count);
    return static_cast<int>(digit);
  };
  job.pixel_block = take(work.pixel_blocks);
  job.sub = take(work.sub_blocks);
  job.tap = take(work.tap_blocks);
  job.slice = take(work.slices);
  job.head = take(p.heads);
  job.n = index;
  const int per_head = static_cast<int>(p.channels / p.heads);
  job.begin = job.head * per_head + job.slice * static_cast<int>(work.slice);
  job.end = min(job.begin + static_cast<int>(work.slice), (job.head + 1) * per_head);
  return job;
}

// Loads go through the read-only path. `keep` is all ones, or all zeros to get 0 whatever lies there: a tap outside the
// image reads some pixel inside it, so that the loop over the channels needs no branch.
__device__ __forceinline__ float load(const float* from, unsigned keep = ~0u) {
  return __uint_as_float(__float_as_uint(__ldg(from)) & keep);
}
__device__ __forceinline__ double load(const double* from, unsigned keep = ~0u) {
  return __longlong_as_double(__double_as_longlong(__ldg(from)) & static_cast<long long>(static_cast<int>(keep)));
}
__device__ __forceinline__ float load(const __half* from, unsigned keep = ~0u) {
  const unsigned bits = __ldg(reinterpret_cast<const unsigned short*>(from));
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & keep)));
}
__device__ __forceinline__ float load(const __nv_bfloat16* from, unsigned keep = ~0u) {
  const unsigned bits = __ldg(reinterpret_cast<const unsigned short*>(from));
  return __uint_as_float((bits & keep) << 16);
}

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N neighbouring elements, moved by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T value[N];
};

template <typename T>
__device__ __forceinline__ void load_vector(const T* from, Accumulator<T>* to) {
  constexpr int kCount = 16 / sizeof(T);
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if constexpr (sizeof(T) == 4) {
      to[e] = __uint_as_float(words[e]);
    } else {
      const unsigned bits = e % 2 ? words[e / 2] >> 16 : words[e / 2] & 0xffffu;
      if constexpr (std::is_same_v<T, __half>) {
        to[e] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
      } else {
        to[e] = __uint_as_float(bits << 16);
      }
    }
  }
}

__host__ __device__ constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }
__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

__device__ __forceinline__ int clamped(int value, int size) { return max(0, min(value, size - 1)); }

// All ones if a tap at `position` counts: inside the image always, outside only if the border is replicated.
__device__ __forceinline__ unsigned keep_of(int position, int size, Padding padding) {
  return padding == Padding::kReplicate || (position >= 0 && position < size) ? ~0u : 0u;
}

// Where to read for a tap at `position`: outside the image at the nearest pixel, or, where the weight of such taps is
// zero, at `before` or `behind`, pixels that the same window sees anyway: so a NaN there reaches no result that it
// would not reach. (An infinity reaches none either, but its results become NaN.)
__device__ __forceinline__ int place_of(int position, int size, Padding padding, int before, int behind) {
  if (padding == Padding::kReplicate) return clamped(position, size);
  return position < 0 ? before : position >= size ? behind : position;
}

template <typename A>
__device__ __forceinline__ A mix(A spatial, A channel, bool multiply) {
  return multiply ? spatial * channel : spatial + channel;
}

// Copies a row of shared memory to registers, 16 bytes at a time.
template <int COUNT, typename A>
__device__ __forceinline__ void copy_row(const A* from, A* to) {
  constexpr int kStep = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < COUNT; i += kStep) {
    const auto piece = *reinterpret_cast<const Vector<A, kStep>*>(from + i);
#pragma unroll
    for (int e = 0; e < kStep; ++e) to[i + e] = piece.value[e];
  }
}

// An item of these kernels is one grid column x and ROWS grid rows, a dilation apart, so that they share the rows of
// features they read: K + ROWS - 1 instead of K * ROWS. This needs stride 1 unless ROWS is 1.
__device__ __forceinline__ int first_row(unsigned row_group, int dilation, int rows) {
  return row_group / dilation * dilation * rows + row_group % dilation;
}
__host__ __device__ constexpr int64_t row_groups(int64_t height, int64_t dilation, int64_t rows) {
  return rows == 1 ? height : divide_up(height, dilation * rows) * dilation;
}

// Blocks per multiprocessor to leave registers for, where a thread keeps `values` of them through its loop.
template <typename T>
__host__ __device__ constexpr int resident_blocks(int values) {
  return sizeof(T) == 8 ? 2 : values > 80 ? 2 : values > 40 ? 3 : values > 30 ? 4 : 5;
}

// The last of ROWS pixels, a dilation apart, that lies in the image.
__device__ __forceinline__ int last_row(int first, int dilation, int rows, int size) {
  return first + max(0, min(rows - 1, (size - 1 - first) / dilation)) * dilation;
}

// COLUMNS 1: one sub-position per block, any scale. COLUMNS 2: scale 2; threadIdx.y is the sub-row, and a thread writes
// both columns of its pixel as one vector. With ROWS and COLUMNS 1 both ways to combine and any stride, else products
// and stride 1.
template <typename T, int K, int COLUMNS, int ROWS>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(K * K * COLUMNS * ROWS))
    forward_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kTaps = K * K, kHalf = K / 2, kWindow = ROWS + K - 1, kFilter = COLUMNS * kTaps;
  constexpr int kPitch = round_up(kFilter, 16 / sizeof(A));
  // Outside the image, products can have their spatial weight zeroed before the loop; sums need the features to be zero
  // in it.
  constexpr bool kProducts = ROWS * COLUMNS > 1;
  __shared__ __align__(16) A filters[COLUMNS][kStage][kPitch];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const bool multiply = kProducts || p.combine == Combine::kMul;
  const int scale = static_cast<int>(p.scale), stride = static_cast<int>(p.stride);
  const int dilation = static_cast<int>(p.dilation);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int sub = COLUMNS == 2 ? 2 * static_cast<int>(threadIdx.y) : job.sub;

  const int64_t item = job.pixel_block * blockDim.x + threadIdx.x;
  const bool active = item < call.work.pixels;
  const unsigned index = active ? static_cast<unsigned>(item) : 0;
  const int x = index % static_cast<unsigned>(p.grid_width);
  const int y = first_row(index / static_cast<unsigned>(p.grid_width), dilation, ROWS);

  // Offsets relative to the centre tap fit into 32 bits where the plane does not.
  const int centre_y = clamped(y * stride, height), centre_x = x * stride;
  const int last_y = kProducts ? clamped(last_row(y, dilation, ROWS, height), height) : centre_y;
  const Strides& fs = call.features_strides;
  const T* centre = call.features + job.n * fs.n + job.begin * fs.c + centre_y * fs.y + centre_x * fs.x;
  int row[kWindow];
  unsigned row_keep[kWindow];
#pragma unroll
  for (int r = 0; r < kWindow; ++r) {
    const int position = y * stride + (r - kHalf) * dilation;
    row[r] = (place_of(position, height, p.padding, centre_y, last_y) - centre_y) * static_cast<int>(fs.y);
    row_keep[r] = keep_of(position, height, p.padding);
  }
  const T* column[K];
  unsigned column_keep[K];
#pragma unroll
  for (int v = 0; v < K; ++v) {
    const int position = centre_x + (v - kHalf) * dilation;
    column[v] = centre + (place_of(position, width, p.padding, centre_x, centre_x) - centre_x) * static_cast<int>(fs.x);
    column_keep[v] = keep_of(position, width, p.padding);
  }

  A spatial[ROWS][COLUMNS][kTaps];
  const Strides& ss = call.spatial_strides;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) {
    const bool inside = active && y + q * dilation < p.grid_height;
    const T* from = call.spatial_filter + job.n * ss.n + (inside ? (y + q * dilation) * ss.y + x * ss.x : 0);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const T* at = from + ((sub + j) * p.heads + job.head) * kTaps * ss.c;
#pragma unroll
      for (int k = 0; k < kTaps; ++k, at += ss.c) {
        spatial[q][j][k] = load(at, kProducts ? row_keep[q + k / K] & column_keep[k % K] : ~0u);
      }
    }
  }

  const Strides& os = call.output_strides;
  T* out = call.result + job.n * os.n + job.begin * os.c + (static_cast<int64_t>(y) * scale + sub / scale) * os.y +
           (static_cast<int64_t>(x) * scale + sub % scale) * os.x;
  const int grid_height = static_cast<int>(p.grid_height);
  const int rows = active && y < grid_height ? (grid_height - 1 - y) / dilation + 1 : 0;  // or more than ROWS

  for (int first = job.begin; first < job.end; first += kStage) {
    const int count = min(kStage, job.end - first);
    __syncthreads();  // the previous stage has been read
    const T* source = call.channel_filter + (job.n * scale * scale * p.channels + first) * kTaps;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < COLUMNS * count * kFilter; i += kThreads) {
      const int tap = i % kTaps, channel = i / kTaps % count, position = i / (kTaps * count);
      filters[position / COLUMNS][channel][position % COLUMNS * kTaps + tap] =
          load(source + ((COLUMNS == 2 ? position : sub) * p.channels + channel) * kTaps + tap);
    }
    __syncthreads();

#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      A filter[kPitch];
      copy_row<kPitch>(filters[COLUMNS == 2 ? threadIdx.y : 0][c], filter);
      A sum[ROWS][COLUMNS] = {};
#pragma unroll
      for (int r = 0; r < kWindow; ++r) {
        A feature[K];
#pragma unroll
        for (int v = 0; v < K; ++v) {
          feature[v] = load(column[v] + row[r], kProducts ? ~0u : row_keep[r] & column_keep[v]);
        }
#pragma unroll
        for (int q = 0; q < ROWS; ++q) {
          if (q > r || r - q >= K) continue;
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
            for (int v = 0; v < K; ++v) {
              const int k = (r - q) * K + v;
              sum[q][j] += mix(spatial[q][j][k], filter[j * kTaps + k], multiply) * feature[v];
            }
          }
        }
      }
#pragma unroll
      for (int v = 0; v < K; ++v) column[v] += fs.c;
      T* to = out;
#pragma unroll
      for (int q = 0; q < ROWS; ++q, to += call.work.row_step) {
        Vector<T, COLUMNS> written;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) written.value[j] = narrow<T>(sum[q][j]);
        if (q < rows) *reinterpret_cast<Vector<T, COLUMNS>*>(to) = written;
      }
      out += os.c;
    }
  }
}

// Channels a block of forward_channels_last_kernel can take; its channel filters fill shared memory.
template <typename T, int K>
__host__ __device__ constexpr int channels_last_lanes() {
  return K <= 5 ? kWarp : kWarp / 2;
}

// What a thread of the kernels for channels-last features takes at a time: kQuad columns, a dilation apart, of one row,
// and 16 bytes of channels.
constexpr int kQuad = 4;

struct Quad {
  bool inside;  // whether there is one
  int y, x, last_x;
};

// The thread's quad of a round, of an image `width` wide.
__device__ __forceinline__ Quad quad_of(const Work& work, const Job& job, int round, int dilation, int width) {
  const int slot = threadIdx.x / work.lanes, slots = kThreads / work.lanes;
  const unsigned groups = static_cast<unsigned>(row_groups(width, dilation, kQuad));
  const int64_t item = (job.pixel_block * work.rounds + round) * slots + slot;
  Quad quad{};
  quad.inside = item < work.pixels;
  if (!quad.inside) return quad;
  quad.y = static_cast<int>(static_cast<unsigned>(item) / groups);
  quad.x = clamped(first_row(static_cast<unsigned>(item) % groups, dilation, kQuad), width);
  quad.last_x = last_row(quad.x, dilation, kQuad, width);
  return quad;
}

// Adds what the pixels of a quad take from column `r` of their common window, counted from its left.
template <int K, int VECTOR, typename A>
__device__ __forceinline__ void add_column(int r, const A (&spatial)[kQuad][K], const A (&filter)[K][VECTOR],
                                           const A (&value)[VECTOR], A (&sum)[kQuad][VECTOR]) {
#pragma unroll
  for (int q = 0; q < kQuad; ++q) {
    if (q > r || r - q >= K) continue;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) sum[q][e] += spatial[q][r - q] * filter[r - q][e] * value[e];
  }
}

// Writes the sums of a quad whose row begins at `out`; `step` elements lie between columns.
template <typename T, int VECTOR>
__device__ __forceinline__ void write_quad(T* out, int64_t step, const Quad& quad, int dilation, int width,
                                           const Accumulator<T> (&sum)[kQuad][VECTOR]) {
#pragma unroll
  for (int q = 0; q < kQuad; ++q) {
    const int column = quad.x + q * dilation;
    if (column >= width) continue;
    Vector<T, VECTOR> written;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) written.value[e] = narrow<T>(sum[q][e]);
    *reinterpret_cast<Vector<T, VECTOR>*>(out + column * step) = written;
  }
}

// Products and stride 1 only; an item is a quad of grid pixels.
template <typename T, int K>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(16 / sizeof(T) * (K + 4) + 4 * K))
    forward_channels_last_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kTaps = K * K, kHalf = K / 2, kVector = 16 / sizeof(T);
  constexpr int kPitch = channels_last_lanes<T, K>() * kVector;
  __shared__ __align__(16) A filters[kTaps][kPitch];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lane = threadIdx.x % call.work.lanes;
  const int scale = static_cast<int>(p.scale), dilation = static_cast<int>(p.dilation);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int channels = job.end - job.begin;

  const T* source = call.channel_filter + ((job.n * scale * scale + job.sub) * p.channels + job.begin) * kTaps;
  for (int i = threadIdx.x; i < channels * kTaps; i += kThreads) filters[i % kTaps][i / kTaps] = load(source + i);
  __syncthreads();
  if (lane * kVector >= channels) return;

  const Strides& fs = call.features_strides;
  const Strides& ss = call.spatial_strides;
  const Strides& os = call.output_strides;
  const T* features = call.features + job.n * fs.n + job.begin + lane * kVector;
  const T* spatial_filter = call.spatial_filter + job.n * ss.n + (job.sub * p.heads + job.head) * kTaps * ss.c;

  for (int round = 0; round < call.work.rounds; ++round) {
    const Quad quad = quad_of(call.work, job, round, dilation, width);
    if (!quad.inside) return;
    const int y = quad.y, x = quad.x;
    A sum[kQuad][kVector] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int position = y + (u - kHalf) * dilation;
      const T* row = features + place_of(position, height, p.padding, y, y) * fs.y;
      const unsigned row_keep = keep_of(position, height, p.padding);
      A filter[K][kVector], spatial[kQuad][K];
#pragma unroll
      for (int v = 0; v < K; ++v) copy_row<kVector>(&filters[u * K + v][lane * kVector], filter[v]);
#pragma unroll
      for (int q = 0; q < kQuad; ++q) {
        const T* at = spatial_filter + u * K * ss.c + y * ss.y + clamped(x + q * dilation, width) * ss.x;
#pragma unroll
        for (int v = 0; v < K; ++v, at += ss.c) {
          spatial[q][v] = load(at, row_keep & keep_of(x + (q + v - kHalf) * dilation, width, p.padding));
        }
      }
#pragma unroll
      for (int r = 0; r < kQuad + K - 1; ++r) {
        A feature[kVector];
        const int at = x + (r - kHalf) * dilation;
        load_vector(row + place_of(at, width, p.padding, x, quad.last_x) * fs.x, feature);
        add_column(r, spatial, filter, feature, sum);
      }
    }
    T* out = call.result + job.n * os.n + job.begin + lane * kVector +
             (static_cast<int64_t>(y) * scale + job.sub / scale) * os.y + job.sub % scale * os.x;
    write_quad<T>(out, scale * os.x, quad, dilation, width, sum);
  }
}

// Channels per thread of the kernels for every case; a thread's channels lie `lanes` apart.
constexpr int kWide = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_any_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lanes = call.work.lanes;
  const int64_t item = job.pixel_block * (kThreads / lanes) + threadIdx.x / lanes;
  const int channel = job.begin + static_cast<int>(threadIdx.x) % lanes;
  if (item >= call.work.pixels || channel >= job.end) return;
  const int64_t y = item / p.grid_width, x = item % p.grid_width, half = p.kernel_size / 2;
  const bool multiply = p.combine == Combine::kMul;
  const Strides& fs = call.features_strides;
  const Strides& ss = call.spatial_strides;
  const int64_t taps = p.kernel_size * p.kernel_size;
  const T* features = call.features + job.n * fs.n;
  const T* spatial =
      call.spatial_filter + job.n * ss.n + (job.sub * p.heads + job.head) * taps * ss.c + y * ss.y + x * ss.x;
  const T* filter = call.channel_filter + (job.n * p.scale * p.scale + job.sub) * p.channels * taps;

  A sum[kWide] = {};
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t row = y * p.stride + (k / p.kernel_size - half) * p.dilation;
    const int64_t column = x * p.stride + (k % p.kernel_size - half) * p.dilation;
    const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
    const unsigned keep = inside || p.padding == Padding::kReplicate ? ~0u : 0u;
    const int64_t at =
        max(int64_t{0}, min(row, p.height - 1)) * fs.y + max(int64_t{0}, min(column, p.width - 1)) * fs.x;
    const A weight = load(spatial + k * ss.c);
#pragma unroll
    for (int q = 0; q < kWide; ++q) {
      const int64_t c = min(channel + q * lanes, job.end - 1);
      sum[q] += mix(weight, load(filter + c * taps + k), multiply) * load(features + c * fs.c + at, keep);
    }
  }
  const Strides& os = call.output_strides;
  T* out =
      call.result + job.n * os.n + (y * p.scale + job.sub / p.scale) * os.y + (x * p.scale + job.sub % p.scale) * os.x;
#pragma unroll
  for (int q = 0; q < kWide; ++q) {
    const int c = channel + q * lanes;
    if (c < job.end) out[c * os.c] = narrow<T>(sum[q]);
  }
}

}  // namespace cuda
}  // namespace ddfup
