// Forward on the CPU where channels are last in memory: vectors along the channels of a pixel, nothing transposed.
#pragma once

#include "ddf_cpu_tile.h"

namespace ddfup {

template <typename T, typename A>
DDFUP_INLINE Vec<A> load_wide(const T* from) {
  if constexpr (std::is_same_v<T, A>) {
    return load(from);
#if defined(__AVX512F__)
    // Through memory, the whole vector would wait for its halves.
  } else if constexpr (sizeof(T) == 2) {
    __m256i packed;
    std::memcpy(&packed, from, sizeof(packed));
    return reinterpret_cast<Vec<A>>(widen_vector(packed, T{}));
#endif
  } else {
    A wide[kLanes<A>];
    load_run(from, 1, wide, kLanes<A>);
    return load(wide);
  }
}

template <typename T, typename A>
DDFUP_INLINE void store_narrow(T* to, Vec<A> value, bool past_caches) {
  if constexpr (std::is_same_v<T, A>) {
    past_caches ? stream(to, value) : store(to, value);
  } else {
    A wide[kLanes<A>];
    store(wide, value);
    store_run(wide, to, 1, kLanes<A>);
  }
}

constexpr int64_t kMostTaps = 7;  // a side of the largest kernel that is taken
// Of channels at a time, and of neighbouring pixels that share their filters: the sums stay in registers.
constexpr int kMostVectors = 4;
constexpr int kPixels = kVectorBytes == 64 ? 4 : 2;

// A row of the grid, for some vectors of channels and one sub-position.
template <typename T>
struct PixelRow {
  using A = Wide<T>;
  const T* lines[kMostTaps];      // the rows of the image in the window, from their first pixel on
  int64_t steps[kMostTaps];       // from pixel to pixel; 0 where the row is padding
  const T* zeros;                 // a pixel of padding; null where the nearest pixel of the image serves
  int64_t offsets[kMostVectors];  // of the vectors among the channels
  const A* channel;               // [K * K][vectors][lanes]
  const A* spatial;               // [K * K][pitch]
  T* out;
  int64_t out_step, pitch, count, width, kernel_size, stride, dilation;
  bool past_caches;  // whether to stream `out`, every vector of which then lies on a multiple of one
};

// P neighbouring grid points from x on. Where none of their taps leaves the image (`kInside`), tap by tap they lie one
// step apart.
template <typename T, bool kAdd, int B, int P, bool kInside>
DDFUP_INLINE void filter_pixels(const PixelRow<T>& row, int64_t x) {
  using A = Wide<T>;
  constexpr int L = kLanes<A>;
  const int64_t first = x * row.stride - row.kernel_size / 2 * row.dilation;
  const A *channels = row.channel, *weights = row.spatial + x;
  Vec<A> sum[P][B] = {};
  // Not unrolled: the work of a tap is enough, and compiling every size took minutes.
  for (int64_t u = 0; u < row.kernel_size; ++u)
    for (int64_t v = 0; v < row.kernel_size; ++v, channels += B * L, weights += row.pitch) {
      const int64_t column = first + v * row.dilation;
      const T* pixel = row.lines[u] + std::clamp<int64_t>(column, 0, row.width - 1) * row.steps[u];
      if (!kInside && row.zeros && (column < 0 || column >= row.width)) pixel = row.zeros;
      const int64_t step = row.stride * row.steps[u];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Vec<A> channel = load(channels + b * L);
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) {
          const Vec<A> feature = load_wide<T, A>(pixel + i * step + row.offsets[b]);
          if constexpr (kAdd)
            sum[i][b] += (channel + weights[i]) * feature;
          else
            sum[i][b] += (feature * channel) * weights[i];
        }
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      store_narrow<T, A>(row.out + (x + i) * row.out_step + row.offsets[b], sum[i][b], row.past_caches);
}

template <typename T, bool kAdd, int B>
void filter_pixel_row(const PixelRow<T>& row) {
  const int64_t margin = row.kernel_size / 2 * row.dilation;
  const int64_t reach = (kPixels - 1) * row.stride + (row.kernel_size - 1) * row.dilation;
  for (int64_t x = 0; x < row.count;) {
    const int64_t first = x * row.stride - margin;
    if (first >= 0 && x + kPixels <= row.count && first + reach < row.width) {
      filter_pixels<T, kAdd, B, kPixels, true>(row, x);
      x += kPixels;
    } else {
      filter_pixels<T, kAdd, B, 1, false>(row, x);
      x += 1;
    }
  }
}

template <typename T, bool kAdd>
auto pixel_row_for(int64_t vectors) -> void (*)(const PixelRow<T>&) {
  switch (vectors) {
    case 1:
      return filter_pixel_row<T, kAdd, 1>;
    case 2:
      return filter_pixel_row<T, kAdd, 2>;
    default:
      return filter_pixel_row<T, kAdd, kMostVectors>;
  }
}

// One call of the forward kernel for features with channels last.
template <typename T>
struct PixelForward {
  using A = Wide<T>;
  static constexpr int64_t L = kLanes<A>;
  Problem p;
  const T *features, *channel, *spatial;
  Strides fs, ss;
  T* out;
  Strides os;
  int64_t taps, positions, per_head, vectors;
  bool past_caches;
  Cuts down;

  static bool serves(const Problem& p, const Strides& fs, const Strides& os) {
    return fs.c == 1 && os.c == 1 && p.channels / p.heads >= L && p.kernel_size <= kMostTaps;
  }

  PixelForward(const Problem& problem, const T* features_, const Strides& fs_, const T* channel_, const T* spatial_,
               const Strides& ss_, T* out_, const Strides& os_, int64_t threads)
      : p(problem),
        features(features_),
        channel(channel_),
        spatial(spatial_),
        fs(fs_),
        ss(ss_),
        out(out_),
        os(os_),
        taps(p.kernel_size * p.kernel_size),
        positions(p.scale * p.scale),
        per_head(p.channels / p.heads),
        vectors(ceil_div(per_head, L)),
        past_caches(std::is_same_v<T, A> && per_head % L == 0 && os.x % L == 0 && os.y % L == 0 && os.n % L == 0 &&
                    can_stream(out) && is_large<T>(p.batch * p.channels * positions * p.grid_height * p.grid_width)),
        down(p.grid_height, std::max<int64_t>(1, p.grid_height * p.batch / (4 * threads)), 1) {}

  // How many vectors are worked on at once, 4, 2 or 1, when so many are done.
  int64_t together(int64_t done) const {
    const int64_t left = vectors - done;
    return left >= kMostVectors ? kMostVectors : left >= 2 ? 2 : 1;
  }

  // Among the channels of a head; the last vector overlaps the one before where the channels do not fill it.
  int64_t offset(int64_t vector) const { return std::min(vector * L, per_head - L); }

  // All channel filters of a sample: [position][head][vector block][K * K][vectors of the block][lanes].
  void pack_channels(int64_t n, A* to) const {
    for (int64_t position = 0; position < positions; ++position)
      for (int64_t head = 0; head < p.heads; ++head)
        for (int64_t done = 0, count; done < vectors; done += count) {
          count = together(done);
          for (int64_t k = 0; k < taps; ++k)
            for (int64_t v = done; v < done + count; ++v)
              for (int64_t lane = 0; lane < L; ++lane) {
                const int64_t c = head * per_head + offset(v) + lane;
                *to++ = widen(channel[((n * positions + position) * p.channels + c) * taps + k]);
              }
        }
  }

  void run_row(int64_t n, int64_t y, const A* channels, const T* zeros, A* weights) const {
    PixelRow<T> row{};
    row.zeros = p.padding == Padding::kReplicate ? nullptr : zeros;
    row.pitch = row.count = p.grid_width;
    row.width = p.width;
    row.kernel_size = p.kernel_size;
    row.stride = p.stride;
    row.dilation = p.dilation;
    row.spatial = weights;
    row.out_step = p.scale * os.x;
    row.past_caches = past_caches;
    for (int64_t position = 0; position < positions; ++position)
      for (int64_t head = 0; head < p.heads; ++head) {
        for (int64_t k = 0; k < taps; ++k)
          load_run(spatial + n * ss.n + ((position * p.heads + head) * taps + k) * ss.c + y * ss.y, ss.x,
                   weights + k * row.pitch, row.count);
        for (int64_t u = 0; u < p.kernel_size; ++u) {
          const int64_t line = y * p.stride + (u - p.kernel_size / 2) * p.dilation;
          const bool padding = row.zeros && (line < 0 || line >= p.height);
          const T* start = features + n * fs.n + std::clamp<int64_t>(line, 0, p.height - 1) * fs.y + head * per_head;
          row.lines[u] = padding ? zeros : start;
          row.steps[u] = padding ? 0 : fs.x;
        }
        row.out = out + n * os.n + (y * p.scale + position / p.scale) * os.y + position % p.scale * os.x +
                  head * per_head;
        for (int64_t done = 0, count; done < vectors; done += count) {
          count = together(done);
          for (int64_t v = 0; v < count; ++v) row.offsets[v] = offset(done + v);
          row.channel = channels + ((position * p.heads + head) * vectors + done) * taps * L;
          const auto filter = p.combine == Combine::kAdd ? pixel_row_for<T, true>(count) : pixel_row_for<T, false>(count);
          filter(row);
        }
      }
  }

  template <typename Parallel>
  void run(const Parallel& parallel_for) const {
    parallel_for(p.batch * down.count, [&](int64_t begin, int64_t end) {
      const Scratch<A> channels(positions * p.heads * vectors * taps * L), weights(taps * p.grid_width);
      const Scratch<T> zeros(per_head);
      std::fill_n(zeros.get(), per_head, T{});
      int64_t packed = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / down.count, piece = task % down.count;
        if (n != packed) pack_channels(packed = n, channels.get());
        for (int64_t y = down.begin(piece); y < down.end(piece); ++y)
          run_row(n, y, channels.get(), zeros.get(), weights.get());
      }
      finish_streams();
    });
  }
};

}  // namespace ddfup
