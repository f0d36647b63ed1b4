// Forward on the CPU: tiles of the grid in parallel, vectors along x.
#pragma once

#include "ddf_cpu_tile.h"

namespace ddfup {

constexpr int64_t kForwardColumns = 512;
// From row to row of a tile: known to the compiler, and no power of two, which would crowd a few cache sets.
constexpr int kForwardPitch = 528;

template <typename A>
struct FilterRow {
  const A* features;        // unit kernels: window of the first grid point
  const A* const* windows;  // generic kernel: one pointer per tap
  const A* spatial;         // [J][K * K][pitch]
  const A* channel[2];      // [J]: K * K numbers
  A* out;                   // [J][pitch]
  int64_t taps, pitch, count;
};

// Stride and dilation 1: all distances are compile-time constants. J neighbouring sub-positions share the features.
template <typename A, int K, bool kAdd, int J>
void filter_row(const FilterRow<A>& row) {
  constexpr int P = kForwardPitch;
  A channel[J][K * K];
  for (int j = 0; j < J; ++j)
    for (int k = 0; k < K * K; ++k) channel[j][k] = row.channel[j][k];
  const A* __restrict__ features = row.features;
  const A* __restrict__ spatial = row.spatial;
  A* __restrict__ out = row.out;
  for (int64_t x = 0; x < row.count; x += kLanes<A>) {
    Vec<A> sum[J] = {};
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
#pragma GCC unroll 8
      for (int v = 0; v < K; ++v) {
        const Vec<A> feature = load(features + x + u * P + v);
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
          const Vec<A> weight = load(spatial + x + (j * K * K + u * K + v) * P);
          if constexpr (kAdd)
            sum[j] += (weight + channel[j][u * K + v]) * feature;
          else
            sum[j] += (feature * channel[j][u * K + v]) * weight;
        }
      }
    }
    for (int j = 0; j < J; ++j) store(out + x + j * P, sum[j]);
  }
}

template <typename A, bool kAdd>
void filter_row_generic(const FilterRow<A>& row) {
  const A* __restrict__ spatial = row.spatial;
  A* __restrict__ out = row.out;
  for (int64_t x = 0; x < row.count; x += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t k = 0; k < row.taps; ++k) {
      const Vec<A> weight = load(spatial + k * row.pitch + x);
      if constexpr (kAdd)
        sum += (weight + row.channel[0][k]) * load(row.windows[k] + x);
      else
        sum += (load(row.windows[k] + x) * row.channel[0][k]) * weight;
    }
    store(out + x, sum);
  }
}

template <typename A, bool kAdd, int J>
auto unit_filter_row(int64_t kernel_size) -> void (*)(const FilterRow<A>&) {
  switch (kernel_size) {
    case 1:
      return filter_row<A, 1, kAdd, J>;
    case 3:
      return filter_row<A, 3, kAdd, J>;
    case 5:
      return filter_row<A, 5, kAdd, J>;
    case 7:
      return filter_row<A, 7, kAdd, J>;
    default:
      return nullptr;
  }
}

// The specialised kernel, or null where there is none.
template <typename A, bool kAdd>
auto filter_row_for(const Problem& p) -> void (*)(const FilterRow<A>&) {
  if (p.stride != 1 || p.dilation != 1) return nullptr;
  return p.scale % 2 == 0 ? unit_filter_row<A, kAdd, 2>(p.kernel_size) : unit_filter_row<A, kAdd, 1>(p.kernel_size);
}

// Copies the spatial filters of a tile to [row][S][K * K][pitch].
template <typename T, typename A>
void pack_spatial(const Problem& p, const T* spatial, const Strides& strides, int64_t head, int64_t y0, int64_t rows,
                  int64_t x0, int64_t columns, A* to, int64_t pitch) {
  const int64_t taps = p.kernel_size * p.kernel_size, positions = p.scale * p.scale;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t position = 0; position < positions; ++position)
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t plane = (position * p.heads + head) * taps + k;
        A* row = to + ((r * positions + position) * taps + k) * pitch;
        load_run(spatial + plane * strides.c + (y0 + r) * strides.y + x0 * strides.x, strides.x, row, columns);
        fill_run(row + columns, A(0), round_up(columns, kAlign) - columns);
      }
}

// Writes the sub-positions of one output row, [j][pitch], side by side.
template <typename A>
void interleave(const A* __restrict__ from, int64_t pitch, int64_t scale, int64_t columns, A* __restrict__ to) {
  if (scale == 2) {
    const A* __restrict__ odd = from + pitch;
    DDFUP_IVDEP
    for (int64_t x = 0; x < columns; ++x) {
      to[2 * x] = from[x];
      to[2 * x + 1] = odd[x];
    }
    return;
  }
  for (int64_t j = 0; j < scale; ++j)
    for (int64_t x = 0; x < columns; ++x) to[x * scale + j] = from[j * pitch + x];
}

// One call of the forward kernel, for features of any strides.
template <typename T>
struct Forward {
  using A = Wide<T>;
  Problem p;
  const T *features, *channel, *spatial;
  Strides fs, ss;
  T* out;
  Strides os;

  int64_t taps, positions, per_head;
  void (*unit_row)(const FilterRow<A>&);
  void (*generic_row)(const FilterRow<A>&);
  int64_t together;  // sub-positions per call of the row kernel
  bool direct;       // whether the row kernel writes the output itself
  Cuts across, down;
  int64_t pitch;
  FeatureTile tile;
  int64_t group;  // channels per tile
  Cuts blocks;    // of the channels of a head

  static int64_t pitch_for(const Problem& p, const Cuts& across, bool unit) {
    return unit ? kForwardPitch : round_up(across.step + (p.kernel_size - 1) * p.dilation / p.stride, kAlign) + kAlign;
  }
  // Tiles whose spatial filters stay in the second-level cache; wide ones, because memory likes long runs.
  static constexpr int64_t kTileBytes = 256 * 1024;
  static int64_t column_bytes(const Problem& p) {
    return p.scale * p.scale * p.kernel_size * p.kernel_size * static_cast<int64_t>(sizeof(A));
  }
  static int64_t columns_per_tile(const Problem& p) {
    return std::clamp<int64_t>(kTileBytes / (2 * column_bytes(p)) / kAlign * kAlign, 4 * kAlign, kForwardColumns);
  }
  static int64_t rows_per_tile(const Problem& p, const Cuts& across, int64_t threads) {
    const int64_t cached = std::clamp<int64_t>(kTileBytes / (column_bytes(p) * across.step), 1, 16);
    return std::min(cached, rows_for(p, across, 2 * threads));
  }

  Forward(const Problem& problem, const T* features_, const Strides& fs_, const T* channel_, const T* spatial_,
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
        unit_row(p.combine == Combine::kAdd ? filter_row_for<A, true>(p) : filter_row_for<A, false>(p)),
        generic_row(p.combine == Combine::kAdd ? filter_row_generic<A, true> : filter_row_generic<A, false>),
        together(unit_row && p.scale % 2 == 0 ? 2 : 1),
        direct(std::is_same_v<T, A> && unit_row && p.scale == 1 && os.x == 1),
        across(p.grid_width, columns_per_tile(p), kAlign),
        down(p.grid_height, rows_per_tile(p, across, threads), 1),
        pitch(pitch_for(p, across, unit_row)),
        tile(p, down.step, pitch),
        group(fs.c == 1 && fs.x != 1 ? std::min(kChannelGroup, per_head) : 1),
        // Fewer tiles than threads: split the channels too, though each part packs the spatial filters again.
        blocks(per_head, std::max(group, ceil_div(per_head, ceil_div(threads, std::max<int64_t>(tiles(), 1)))), group) {
  }

  int64_t tiles() const { return p.batch * p.heads * down.count * across.count; }

  // Scratch memory of one thread.
  struct Memory {
    Scratch<A> filters, windows, sums, lines, numbers;
    std::unique_ptr<const A*[]> pointers;
    explicit Memory(const Forward& f)
        : filters(f.down.step * f.positions * f.taps * f.pitch),
          windows(f.group * f.tile.size()),
          sums(f.p.scale * f.pitch),
          lines(f.group * f.p.scale * f.pitch),
          numbers(f.group * f.positions * f.taps),
          pointers(new const A*[static_cast<size_t>(f.taps)]) {}
  };

  // Computes the `together` sub-positions from j on of one grid row and channel into `result`, or into `target`.
  void filter(const Memory& m, const A* window, const A* weights, int64_t r, int64_t position, int64_t columns,
              A* result, [[maybe_unused]] T* target) const {
    FilterRow<A> row;
    row.taps = taps;
    row.pitch = pitch;
    row.count = columns;
    row.channel[0] = weights + position * taps;
    row.channel[1] = row.channel[0] + taps;
    row.spatial = m.filters.get() + (r * positions + position) * taps * pitch;
    row.out = result;
    if (!unit_row) {
      for (int64_t k = 0; k < taps; ++k)
        m.pointers[k] = window + tile.row(r, k / p.kernel_size) + tile.column(k % p.kernel_size);
      row.windows = m.pointers.get();
      generic_row(row);
      return;
    }
    row.features = window + tile.row(r, 0);
    if constexpr (std::is_same_v<T, A>) {
      if (direct) {
        row.out = target;
        row.count = columns / kLanes<A> * kLanes<A>;
        unit_row(row);
        if (row.count == columns) return;
        // The last vector may overhang the row, which the scratch row bears.
        row.features += row.count;
        row.spatial += row.count;
        row.out = result;
        target += row.count;
        row.count = columns - row.count;
        unit_row(row);
        copy_run(result, target, row.count);
        return;
      }
    }
    unit_row(row);
  }

  // All rows of a tile for the channels from `first` on.
  void run_channels(const Memory& m, int64_t n, int64_t first, int64_t count, bool more, int64_t y0, int64_t y1,
                    int64_t x0, int64_t x1) const {
    const T* plane = features + n * fs.n + first * fs.c;
    fill_features(p, tile, plane, fs, count, y0, y1 - y0, x0, x1 - x0, m.windows.get());
    for (int64_t c = 0; c < count; ++c)
      for (int64_t position = 0; position < positions; ++position)
        load_run(channel + ((n * positions + position) * p.channels + first + c) * taps, 1,
                 m.numbers.get() + (c * positions + position) * taps, taps);
    const bool prefetch = more && fs.x == 1 && p.stride == 1 && group == 1;
    int64_t ready = std::max<int64_t>(0, y0 - tile.margin);
    for (int64_t y = y0; y < y1; ++y) {
      if (prefetch) {
        const int64_t wanted = std::min(p.height, y + tile.margin + 1);
        prefetch_rows(plane + fs.c, fs, ready, wanted, x0, x1);
        ready = wanted;
      }
      for (int64_t i = 0; i < p.scale; ++i) {
        T* target = out + n * os.n + first * os.c + (y * p.scale + i) * os.y + x0 * p.scale * os.x;
        for (int64_t c = 0; c < count; ++c) {
          A* line = m.lines.get() + c * p.scale * pitch;
          A* result = p.scale == 1 ? line : m.sums.get();
          for (int64_t j = 0; j < p.scale; j += together)
            filter(m, m.windows.get() + c * tile.size(), m.numbers.get() + c * positions * taps, y - y0,
                   i * p.scale + j, x1 - x0, result + j * pitch, target + c * os.c);
          if (p.scale > 1) interleave(result, pitch, p.scale, x1 - x0, line);
        }
        if (!direct) store_pixels(m.lines.get(), p.scale * pitch, count, (x1 - x0) * p.scale, target, os.x, os.c);
      }
    }
  }

  template <typename Parallel>
  void run(const Parallel& parallel_for) const {
    parallel_for(tiles() * blocks.count, [&](int64_t begin, int64_t end) {
      const Memory m(*this);
      for (int64_t task = begin; task < end; ++task) {
        int64_t rest = task / blocks.count;
        const int64_t x0 = across.begin(rest % across.count), x1 = across.end(rest % across.count);
        rest /= across.count;
        const int64_t y0 = down.begin(rest % down.count), y1 = down.end(rest % down.count);
        rest /= down.count;
        const int64_t head = rest % p.heads, n = rest / p.heads;
        pack_spatial(p, spatial + n * ss.n, ss, head, y0, y1 - y0, x0, x1 - x0, m.filters.get(), pitch);
        const int64_t last = blocks.end(task % blocks.count);
        for (int64_t c = blocks.begin(task % blocks.count); c < last; c += group)
          run_channels(m, n, head * per_head + c, std::min(group, last - c), c + group < last, y0, y1, x0, x1);
      }
    });
  }
};

}  // namespace ddfup
