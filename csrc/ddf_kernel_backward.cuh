// Device code of the backward pass. No atomics: every sum has one owner and a fixed order, so results repeat exactly.
//
//   grad_features_kernel      gathers, with the spatial filters in registers as in forward_kernel; common options only
//   grad_features_channels_last_kernel  the same for 16 bytes of channels of four pixels, as in the forward pass
//   grad_features_any_kernel  gathers, every size and option; also the border that replication adds to
//   grad_spatial_kernel       a thread owns a pixel and sums over channels; lanes lie along x or along the channels
//   grad_channel_kernel       a thread owns a few channels and sums over pixels; then warp, block and sum_kernel
//   sum_kernel                adds up the pieces of the two kernels above
#pragma once

#include "ddf_kernel.cuh"

namespace ddfup {
namespace cuda {

// Products, stride 1, scale SCALE; in the zeros' case complete, in that of replication right except for the image's
// border. The tap (u, v) of a grid pixel lands on this pixel if that grid pixel is this one's tap (K-1-u, K-1-v): so
// the windows are those of the forward pass, with flipped filters and with grad_output in the place of the features.
template <typename T, int K, int SCALE, int ROWS>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(K * K * SCALE * SCALE * ROWS))
    grad_features_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kTaps = K * K, kHalf = K / 2, kWindow = ROWS + K - 1, kSubs = SCALE * SCALE, kFilter = kSubs * kTaps;
  constexpr int kPitch = round_up(kFilter, 16 / sizeof(A));
  __shared__ __align__(16) A filters[kStage][kPitch];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int dilation = static_cast<int>(p.dilation);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int64_t item = job.pixel_block * kThreads + threadIdx.x;
  const bool active = item < call.work.pixels;
  const unsigned index = active ? static_cast<unsigned>(item) : 0;
  const int x = index % static_cast<unsigned>(width);
  const int y = first_row(index / static_cast<unsigned>(width), dilation, ROWS);

  const Strides& os = call.output_strides;
  const int centre_y = clamped(y, height), last_y = clamped(last_row(y, dilation, ROWS, height), height);
  const T* centre = call.grad_output + job.n * os.n + job.begin * os.c + centre_y * SCALE * os.y + x * SCALE * os.x;
  int row[kWindow];
  unsigned row_keep[kWindow];
#pragma unroll
  for (int r = 0; r < kWindow; ++r) {
    const int position = y + (r - kHalf) * dilation;
    row[r] =
        (place_of(position, height, Padding::kZeros, centre_y, last_y) - centre_y) * SCALE * static_cast<int>(os.y);
    row_keep[r] = keep_of(position, height, Padding::kZeros);
  }
  const T* column[K];
  unsigned column_keep[K];
#pragma unroll
  for (int v = 0; v < K; ++v) {
    const int position = x + (v - kHalf) * dilation;
    column[v] = centre + (place_of(position, width, Padding::kZeros, x, x) - x) * SCALE * static_cast<int>(os.x);
    column_keep[v] = keep_of(position, width, Padding::kZeros);
  }
  const int sub_row = static_cast<int>(os.y), sub_column = static_cast<int>(os.x);

  A spatial[ROWS][kSubs][kTaps];
  const Strides& ss = call.spatial_strides;
  const T* spatial_filter = call.spatial_filter + job.n * ss.n + job.head * kTaps * ss.c;
#pragma unroll
  for (int q = 0; q < ROWS; ++q) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) {
      const int yy = y + (q + k / K - kHalf) * dilation, xx = x + (k % K - kHalf) * dilation;
      const unsigned keep = row_keep[q + k / K] & column_keep[k % K];
      const T* from = spatial_filter + clamped(yy, height) * ss.y + clamped(xx, width) * ss.x;
#pragma unroll
      for (int s = 0; s < kSubs; ++s) {
        spatial[q][s][k] = load(from + (s * p.heads * kTaps + kTaps - 1 - k) * ss.c, keep);
      }
    }
  }

  const Strides& rs = call.result_strides;
  T* out = call.result + job.n * rs.n + job.begin * rs.c + y * rs.y + x * rs.x;
  const int rows = active && y < height ? (height - 1 - y) / dilation + 1 : 0;  // or more than ROWS
  for (int first = job.begin; first < job.end; first += kStage) {
    const int count = min(kStage, job.end - first);
    __syncthreads();  // the previous stage has been read
    const T* source = call.channel_filter + (job.n * kSubs * p.channels + first) * kTaps;
    for (int i = threadIdx.x; i < count * kFilter; i += kThreads) {
      const int tap = i % kTaps, channel = i / kTaps % count, sub = i / (kTaps * count);
      filters[channel][sub * kTaps + tap] = load(source + (sub * p.channels + channel) * kTaps + kTaps - 1 - tap);
    }
    __syncthreads();

#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      A filter[kPitch];
      copy_row<kPitch>(filters[c], filter);
      A sum[ROWS] = {};
#pragma unroll
      for (int r = 0; r < kWindow; ++r) {
#pragma unroll
        for (int s = 0; s < kSubs; ++s) {
          A gradient[K];
#pragma unroll
          for (int v = 0; v < K; ++v) {
            const int offset = row[r] + s / SCALE * sub_row + s % SCALE * sub_column;
            gradient[v] = load(column[v] + offset);
          }
#pragma unroll
          for (int q = 0; q < ROWS; ++q) {
            if (q > r || r - q >= K) continue;
#pragma unroll
            for (int v = 0; v < K; ++v) {
              const int k = (r - q) * K + v;
              sum[q] += spatial[q][s][k] * filter[s * kTaps + k] * gradient[v];
            }
          }
        }
      }
#pragma unroll
      for (int v = 0; v < K; ++v) column[v] += os.c;
      T* to = out;
#pragma unroll
      for (int q = 0; q < ROWS; ++q, to += call.work.row_step) {
        if (q < rows) *to = narrow<T>(sum[q]);
      }
      out += rs.c;
    }
  }
}

// Channels that a block of grad_features_channels_last_kernel can take, in vectors of 16 bytes: their filters, of all
// sub-positions, must fit into shared memory.
template <typename T, int K, int SCALE>
__host__ __device__ constexpr int grad_channels_last_lanes() {
  constexpr int kBytes = K * K * SCALE * SCALE * 16 / sizeof(T) * sizeof(Accumulator<T>);
  int lanes = kWarp;
  while (lanes * kBytes > (40 << 10)) lanes /= 2;
  return lanes;
}

// As grad_features_kernel; an item is a quad of pixels.
template <typename T, int K, int SCALE>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(16 / sizeof(T) * (K + 4) + 4 * K))
    grad_features_channels_last_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kTaps = K * K, kHalf = K / 2, kSubs = SCALE * SCALE, kVector = 16 / sizeof(T);
  constexpr int kPitch = grad_channels_last_lanes<T, K, SCALE>() * kVector;
  __shared__ __align__(16) A filters[kSubs * kTaps][kPitch];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lane = threadIdx.x % call.work.lanes;
  const int dilation = static_cast<int>(p.dilation);
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int channels = job.end - job.begin;

  const T* source = call.channel_filter + (job.n * kSubs * p.channels + job.begin) * kTaps;
  for (int i = threadIdx.x; i < kSubs * channels * kTaps; i += kThreads) {
    const int tap = i % kTaps, channel = i / kTaps % channels, sub = i / (kTaps * channels);
    filters[sub * kTaps + tap][channel] = load(source + (sub * p.channels + channel) * kTaps + kTaps - 1 - tap);
  }
  __syncthreads();
  if (lane * kVector >= channels) return;

  const Strides& ss = call.spatial_strides;
  const Strides& os = call.output_strides;
  const Strides& rs = call.result_strides;
  const T* gradients = call.grad_output + job.n * os.n + job.begin + lane * kVector;
  const T* spatial_filter = call.spatial_filter + job.n * ss.n + job.head * kTaps * ss.c;

  for (int round = 0; round < call.work.rounds; ++round) {
    const Quad quad = quad_of(call.work, job, round, dilation, width);
    if (!quad.inside) return;
    const int y = quad.y, x = quad.x;
    A sum[kQuad][kVector] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int position = y + (u - kHalf) * dilation;
      const int yy = place_of(position, height, Padding::kZeros, y, y);
      const unsigned row_keep = keep_of(position, height, Padding::kZeros);
#pragma unroll 1
      for (int s = 0; s < kSubs; ++s) {
        A filter[K][kVector], spatial[kQuad][K];
#pragma unroll
        for (int v = 0; v < K; ++v) copy_row<kVector>(&filters[s * kTaps + u * K + v][lane * kVector], filter[v]);
        const T* weights = spatial_filter + (s * p.heads * kTaps + kTaps - 1 - u * K) * ss.c + yy * ss.y;
#pragma unroll
        for (int q = 0; q < kQuad; ++q) {
#pragma unroll
          for (int v = 0; v < K; ++v) {
            const int xx = x + (q + v - kHalf) * dilation;
            spatial[q][v] =
                load(weights - v * ss.c + clamped(xx, width) * ss.x, row_keep & keep_of(xx, width, Padding::kZeros));
          }
        }
        const T* row = gradients + (static_cast<int64_t>(yy) * SCALE + s / SCALE) * os.y + s % SCALE * os.x;
#pragma unroll
        for (int r = 0; r < kQuad + K - 1; ++r) {
          A gradient[kVector];
          const int at = x + (r - kHalf) * dilation;
          load_vector(row + static_cast<int64_t>(place_of(at, width, Padding::kZeros, x, quad.last_x)) * SCALE * os.x,
                      gradient);
          add_column(r, spatial, filter, gradient, sum);
        }
      }
    }
    T* out = call.result + job.n * rs.n + job.begin + lane * kVector + y * rs.y;
    write_quad<T>(out, rs.x, quad, dilation, width, sum);
  }
}

struct Range {
  int64_t first, last;
};

// The grid positions, of `count`, whose tap `offset` pixels from the centre reads pixel `target` of `size`.
__device__ inline Range grid_range(int64_t target, int64_t offset, int64_t size, int64_t count, int64_t stride,
                                   Padding padding) {
  const int64_t distance = target - offset;  // = position * stride
  const bool replicate = padding == Padding::kReplicate;
  Range range;
  range.first = replicate && target == 0 ? 0 : max(int64_t{0}, distance <= 0 ? 0 : divide_up(distance, stride));
  range.last = replicate && target == size - 1 ? count - 1 : min(count - 1, distance < 0 ? -1 : distance / stride);
  return range;
}

// The pixel of item `index`: of the whole image, or of its border only.
__device__ inline void pixel_of(int64_t index, const Problem& p, bool border, int64_t* y, int64_t* x) {
  if (!border) {
    *y = index / p.width, *x = index % p.width;
  } else if (index < 2 * p.width) {
    *y = index < p.width ? 0 : p.height - 1, *x = index % p.width;
  } else {
    const int64_t side = index - 2 * p.width;
    *y = 1 + side / 2, *x = side % 2 ? p.width - 1 : 0;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) grad_features_any_kernel(const Call<T> call, bool border) {
  using A = Accumulator<T>;
  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lanes = call.work.lanes;
  const int64_t item = job.pixel_block * (kThreads / lanes) + threadIdx.x / lanes;
  const int channel = job.begin + static_cast<int>(threadIdx.x) % lanes;
  if (item >= call.work.pixels || channel >= job.end) return;
  int64_t y, x;
  pixel_of(item, p, border, &y, &x);
  const bool multiply = p.combine == Combine::kMul;
  const int64_t half = p.kernel_size / 2, taps = p.kernel_size * p.kernel_size, subs = p.scale * p.scale;
  const Strides& ss = call.spatial_strides;
  const Strides& os = call.output_strides;
  const T* gradient = call.grad_output + job.n * os.n;
  const T* spatial = call.spatial_filter + job.n * ss.n + job.head * taps * ss.c;
  const T* filter = call.channel_filter + job.n * subs * p.channels * taps;

  A sum[kWide] = {};
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t down = (k / p.kernel_size - half) * p.dilation, right = (k % p.kernel_size - half) * p.dilation;
    const Range rows = grid_range(y, down, p.height, p.grid_height, p.stride, p.padding);
    const Range columns = grid_range(x, right, p.width, p.grid_width, p.stride, p.padding);
    for (int64_t row = rows.first; row <= rows.last; ++row) {
      for (int64_t column = columns.first; column <= columns.last; ++column) {
        for (int64_t s = 0; s < subs; ++s) {
          const A weight = load(spatial + (s * p.heads * taps + k) * ss.c + row * ss.y + column * ss.x);
          const int64_t at = (row * p.scale + s / p.scale) * os.y + (column * p.scale + s % p.scale) * os.x;
#pragma unroll
          for (int q = 0; q < kWide; ++q) {
            const int64_t c = min(channel + q * lanes, job.end - 1);
            const A mixed = mix(weight, load(filter + (s * p.channels + c) * taps + k), multiply);
            sum[q] += mixed * load(gradient + c * os.c + at);
          }
        }
      }
    }
  }
  const Strides& rs = call.result_strides;
  T* out = call.result + job.n * rs.n + y * rs.y + x * rs.x;
#pragma unroll
  for (int q = 0; q < kWide; ++q) {
    const int c = channel + q * lanes;
    if (c < job.end) out[c * rs.c] = narrow<T>(sum[q]);
  }
}

// A rectangle of U x V taps of the window, as a block of the next two kernels owns it; index: job.tap.
template <typename Offset, int U, int V>
struct Taps {
  int first_u, first_v;
  Offset row[U], column[V];  // to add to the centre's address
  bool row_inside[U], column_inside[V];

  __device__ Taps(const Problem& p, int index) {
    const int across = static_cast<int>(p.kernel_size) / V;
    first_u = index / across * U, first_v = index % across * V;
  }
  __device__ void move_to(const Problem& p, const Strides& strides, Offset y, Offset x) {
    const Offset half = static_cast<Offset>(p.kernel_size / 2), dilation = static_cast<Offset>(p.dilation);
    const Offset centre_y = y * static_cast<Offset>(p.stride), centre_x = x * static_cast<Offset>(p.stride);
#pragma unroll
    for (int a = 0; a < U; ++a) {
      const Offset to = centre_y + (first_u + a - half) * dilation;
      const Offset nearest = max(Offset{0}, min(to, static_cast<Offset>(p.height) - 1));
      row[a] = (nearest - centre_y) * static_cast<Offset>(strides.y);
      row_inside[a] = nearest == to || p.padding == Padding::kReplicate;
    }
#pragma unroll
    for (int b = 0; b < V; ++b) {
      const Offset to = centre_x + (first_v + b - half) * dilation;
      const Offset nearest = max(Offset{0}, min(to, static_cast<Offset>(p.width) - 1));
      column[b] = (nearest - centre_x) * static_cast<Offset>(strides.x);
      column_inside[b] = nearest == to || p.padding == Padding::kReplicate;
    }
  }
  struct Pixel {
    Offset y, x;
  };
  __device__ static Pixel pixel(const Problem& p, int64_t item) {
    if constexpr (sizeof(Offset) == 8) return {item / p.grid_width, item % p.grid_width};
    const unsigned small = static_cast<unsigned>(item), width = static_cast<unsigned>(p.grid_width);
    return {static_cast<Offset>(small / width), static_cast<Offset>(small % width)};
  }
  __device__ int tap(const Problem& p, int a, int b) const {
    return (first_u + a) * static_cast<int>(p.kernel_size) + first_v + b;
  }
};

template <int U, int V>
using TapOffset = std::conditional_t<U * V == 1, int64_t, int>;  // the kernel for single taps takes planes of any size

template <typename T, int U, int V>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>(4 * U * V)) grad_spatial_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kPitch = round_up(U * V, 16 / sizeof(A));
  __shared__ __align__(16) A filters[kStage][kPitch];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lanes = call.work.lanes, lane = threadIdx.x % lanes;
  const int64_t item = job.pixel_block * (kThreads / lanes) + threadIdx.x / lanes;
  const bool active = item < call.work.pixels;
  const int64_t taps = p.kernel_size * p.kernel_size, subs = p.scale * p.scale;
  Taps<TapOffset<U, V>, U, V> window(p, job.tap);
  const auto [y, x] = window.pixel(p, active ? item : 0);
  window.move_to(p, call.features_strides, y, x);

  const Strides& fs = call.features_strides;
  const Strides& os = call.output_strides;
  const T* centre =
      call.features + job.n * fs.n + (job.begin + lane) * fs.c + y * p.stride * fs.y + x * p.stride * fs.x;
  const T* gradient = call.grad_output + job.n * os.n + (job.begin + lane) * os.c +
                      (y * p.scale + job.sub / p.scale) * os.y + (x * p.scale + job.sub % p.scale) * os.x;
  const int64_t feature_step = lanes * fs.c, gradient_step = lanes * os.c;
  const T* source = call.channel_filter + (job.n * subs + job.sub) * p.channels * taps;
  A sum[U][V] = {};
  for (int first = job.begin; first < job.end; first += kStage) {
    const int count = min(kStage, job.end - first);
    __syncthreads();  // the previous stage has been read
    for (int i = threadIdx.x; i < count * U * V; i += kThreads) {
      const int k = i % (U * V), channel = i / (U * V);
      filters[channel][k] =
          p.combine == Combine::kMul ? load(source + (first + channel) * taps + window.tap(p, k / V, k % V)) : A(1);
    }
    __syncthreads();
#pragma unroll 1
    for (int c = lane; c < count; c += lanes) {
      A filter[kPitch];
      copy_row<kPitch>(filters[c], filter);
      const A incoming = load(gradient);
#pragma unroll
      for (int a = 0; a < U; ++a) {
#pragma unroll
        for (int b = 0; b < V; ++b) {
          sum[a][b] += incoming * filter[a * V + b] * load(centre + (window.row[a] + window.column[b]));
        }
      }
      centre += feature_step;
      gradient += gradient_step;
    }
  }
  const int64_t plane = p.grid_height * p.grid_width;
  const int64_t at = ((job.n * subs + job.sub) * p.heads + job.head) * taps * plane + item;
  const int64_t total = p.batch * subs * p.heads * taps * plane;
#pragma unroll
  for (int a = 0; a < U; ++a) {
#pragma unroll
    for (int b = 0; b < V; ++b) {
      A value = window.row_inside[a] && window.column_inside[b] ? sum[a][b] : A(0);
      for (int other = lanes / 2; other > 0; other /= 2) value += __shfl_xor_sync(~0u, value, other);
      if (!active || lane != 0) continue;
      const int64_t to = at + window.tap(p, a, b) * plane;
      if (call.work.slices == 1) {
        call.result[to] = narrow<T>(value);
      } else {
        call.partial[job.slice * total + to] = value;
      }
    }
  }
}

template <int U, int V>
__host__ __device__ constexpr int grad_channel_wide() {
  return U * V > 9 ? 2 : kWide;
}

// A slice is lanes * grad_channel_wide() channels, a pixel block kThreads / lanes * rounds pixels.
template <typename T, int U, int V>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>((grad_channel_wide<U, V>() + 2) * U * V))
    grad_channel_kernel(const Call<T> call) {
  using A = Accumulator<T>;
  constexpr int kChannels = grad_channel_wide<U, V>(), kWarps = kThreads / kWarp;
  __shared__ A shares[2][kWarps][kWarp];

  const Problem& p = call.problem;
  const Job job = job_of_block(p, call.work);
  const int lanes = call.work.lanes, thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  const int slots = kThreads / lanes;
  const int64_t taps = p.kernel_size * p.kernel_size, subs = p.scale * p.scale;
  const Strides& fs = call.features_strides;
  const Strides& ss = call.spatial_strides;
  const Strides& os = call.output_strides;
  const T* spatial_filter = call.spatial_filter + job.n * ss.n + (job.sub * p.heads + job.head) * taps * ss.c;
  const T* features[kChannels];
  const T* gradients[kChannels];
#pragma unroll
  for (int q = 0; q < kChannels; ++q) {
    const int64_t c = min(job.begin + q * lanes + lane, job.end - 1);
    features[q] = call.features + job.n * fs.n + c * fs.c;
    gradients[q] = call.grad_output + job.n * os.n + c * os.c + job.sub / p.scale * os.y + job.sub % p.scale * os.x;
  }
  Taps<TapOffset<U, V>, U, V> window(p, job.tap);

  A sum[kChannels][U][V] = {};
  for (int round = 0; round < call.work.rounds; ++round) {
    const int64_t item = (job.pixel_block * call.work.rounds + round) * slots + thread / lanes;
    if (item >= call.work.pixels) break;
    const auto [y, x] = window.pixel(p, item);
    window.move_to(p, fs, y, x);
    const T* from = spatial_filter + y * ss.y + x * ss.x;
    const int64_t centre = y * p.stride * fs.y + x * p.stride * fs.x;
    const int64_t at = y * p.scale * os.y + x * p.scale * os.x;
    A incoming[kChannels];
    const T* feature[kChannels];
#pragma unroll
    for (int q = 0; q < kChannels; ++q) {
      incoming[q] = load(gradients[q] + at);
      feature[q] = features[q] + centre;
    }
#pragma unroll
    for (int a = 0; a < U; ++a) {
      const T* weight = from + window.tap(p, a, 0) * ss.c;
#pragma unroll
      for (int b = 0; b < V; ++b, weight += ss.c) {
        // Outside the image any pixel will do, with the weight zero.
        const bool counts = window.row_inside[a] && window.column_inside[b];
        A spatial = p.combine == Combine::kMul ? load(weight) : A(1);
        if (!counts) spatial = 0;
        const auto offset = window.row[a] + window.column[b];
#pragma unroll
        for (int q = 0; q < kChannels; ++q) sum[q][a][b] += incoming[q] * spatial * load(feature[q] + offset);
      }
    }
  }

  const int64_t total = p.batch * subs * p.channels * taps;
#pragma unroll
  for (int q = 0; q < kChannels; ++q) {
#pragma unroll
    for (int a = 0; a < U; ++a) {
#pragma unroll
      for (int b = 0; b < V; ++b) {
        A value = sum[q][a][b];
        for (int other = kWarp / 2; other >= lanes; other /= 2) value += __shfl_xor_sync(~0u, value, other);
        // Two halves in turn: the next value's stores cannot overtake the reads of this one.
        auto& half = shares[((q * U + a) * V + b) % 2];
        if (thread % kWarp < lanes) half[thread / kWarp][lane] = value;
        __syncthreads();
        const int c = job.begin + q * lanes + lane;
        if (thread >= lanes || c >= job.end) continue;
        value = half[0][lane];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) value += half[w][lane];
        const int64_t to = ((job.n * subs + job.sub) * p.channels + c) * taps + window.tap(p, a, b);
        if (call.work.pixel_blocks == 1) {
          call.result[to] = narrow<T>(value);
        } else {
          call.partial[job.pixel_block * total + to] = value;
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Accumulator<T>* partial, T* result, int64_t total, int pieces) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  Accumulator<T> sum = partial[at];
  for (int piece = 1; piece < pieces; ++piece) sum += partial[piece * total + at];
  result[at] = narrow<T>(sum);
}

}  // namespace cuda
}  // namespace ddfup
