// Forward on the CPU: tiles of the grid in parallel, vectors along x.
#pragma once

#include "ddf_cpu_forward_rows.h"
#include "ddf_cpu_tile.h"

namespace ddfup {

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
        if (strides.x == 1 && plane + kAhead < positions * p.heads * taps)
          prefetch_rows(spatial + (plane + kAhead) * strides.c, strides, y0 + r, y0 + r + 1, x0, x0 + columns);
        load_run(spatial + plane * strides.c + (y0 + r) * strides.y + x0 * strides.x, strides.x, row, columns);
        fill_run(row + columns, A(0), round_up(columns, kAlign) - columns);
      }
}

// Puts the sub-positions of an output row side by side; `together` of them already are, in one row of `pitch` each.
template <typename A>
void interleave(const A* __restrict__ from, int64_t pitch, int64_t together, int64_t scale, int64_t columns,
                A* __restrict__ to) {
  for (int64_t j = 0; j < scale; j += together)
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t i = 0; i < together; ++i) to[x * scale + j + i] = from[j * pitch + x * together + i];
}

// One call of the forward kernel, for features of any strides.
//
// Every channel needs the whole of the spatial filters. So a tile of the grid keeps them, packed, in the second-level
// cache with the features of a group of channels, and takes a piece of a row at a time, whose filters stay in the
// first-level cache while channel after channel uses them.
template <typename T>
struct Forward {
  using A = Wide<T>;
  Problem p;
  const T *features, *channel, *spatial;
  Strides fs, ss;
  T* out;
  Strides os;

  int64_t taps, positions, per_head;
  FilterRowKernel<A> unit_row, generic_row;
  int64_t together;  // sub-positions per call of the row kernel
  bool direct;       // whether the row kernel may write the output itself
  bool past_caches;  // whether the output is written so
  Cuts across, down;
  int64_t pitch;
  FeatureTile tile;
  int64_t group;  // channels per tile
  int64_t chunk;  // columns per piece of a row
  Cuts blocks;    // of the channels of a head

  static int64_t pitch_for(const Problem& p, const Cuts& across, bool unit) {
    return unit ? kForwardPitch : round_up(across.step + (p.kernel_size - 1) * p.dilation / p.stride, kAlign) + kAlign;
  }
  // Half of a second-level cache of half a megabyte and more, and most of a first-level cache of 32 kilobytes.
  static constexpr int64_t kTileBytes = 256 * 1024;
  static constexpr int64_t kChunkBytes = 28 * 1024;
  static constexpr int64_t kMostRows = 16;
  // Wide tiles, because memory likes long runs.
  static int64_t columns_per_tile(const Problem& p) {
    return std::clamp<int64_t>(kTileBytes / filter_bytes<A>(p) / kAlign * kAlign, 4 * kAlign, kForwardColumns);
  }
  static int64_t rows_per_tile(const Problem& p, const Cuts& across, int64_t threads) {
    const int64_t cached = std::clamp<int64_t>(kTileBytes / (filter_bytes<A>(p) * across.step), 1, kMostRows);
    return std::min(cached, rows_for(p, across, 2 * threads));
  }
  // A multiple of the two vectors that row kernels work on.
  static int64_t columns_per_chunk(const Problem& p) {
    return std::max<int64_t>(1, kChunkBytes * p.scale / filter_bytes<A>(p) / (2 * kLanes<A>)) * 2 * kLanes<A>;
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
        direct(std::is_same_v<T, A> && unit_row && p.scale == together && os.x == 1),
        past_caches(is_large<T>(p.batch * p.channels * positions * p.grid_height * p.grid_width)),
        across(p.grid_width, columns_per_tile(p), kAlign),
        down(p.grid_height, rows_per_tile(p, across, threads), 1),
        pitch(pitch_for(p, across, unit_row)),
        tile(p, down.step, pitch),
        group(channels_last(fs) ? std::min(kChannelGroup, per_head)
                                : Cuts(per_head, std::max<int64_t>(1, kTileBytes / (tile.size() * kSize<A>)), 1).step),
        chunk(columns_per_chunk(p)),
        // Fewer tiles than threads: split the channels too, though each part packs the spatial filters again.
        blocks(per_head, std::max(group, ceil_div(per_head, ceil_div(threads, std::max<int64_t>(tiles(), 1)))), group) {
  }

  int64_t tiles() const { return p.batch * p.heads * down.count * across.count; }

  // Some channels of a tile of the grid.
  struct Part {
    int64_t n, y0, y1, x0, x1;
    int64_t first, count;  // channels
  };

  // Scratch memory of one thread.
  struct Memory {
    Scratch<A> filters, windows, sums, lines, numbers;
    std::unique_ptr<const A*[]> pointers;
    explicit Memory(const Forward& f)
        : filters(f.down.step * f.positions * f.taps * f.pitch),
          windows(f.group * f.tile.size()),
          sums(f.p.scale * f.pitch),
          lines((channels_last(f.os) ? f.group : 1) * f.p.scale * f.pitch),
          numbers(f.group * f.positions * f.taps),
          pointers(new const A*[static_cast<size_t>(f.taps)]) {}
  };

  void fill_windows(const Part& part, A* to) const {
    const T* const plane = features + part.n * fs.n + part.first * fs.c;
    const int64_t rows = part.y1 - part.y0, columns = part.x1 - part.x0;
    if (channels_last(fs)) return fill_features(p, tile, plane, fs, part.count, part.y0, rows, part.x0, columns, to);
    const bool prefetch = fs.x == 1 && p.stride == 1;
    for (int64_t c = 0; c < part.count; ++c) {
      if (prefetch && c + 1 < part.count)
        prefetch_rows(plane + (c + 1) * fs.c, fs, std::max<int64_t>(0, part.y0 - tile.margin),
                      std::min(p.height, part.y1 + tile.margin), part.x0, part.x1);
      fill_features(p, tile, plane + c * fs.c, fs, 1, part.y0, rows, part.x0, columns, to + c * tile.size());
    }
  }

  // The row kernel's arguments for the sub-positions from `position` on of a grid row of a tile, from column x on.
  FilterRow<A> row_of(const Memory& m, int64_t c, int64_t r, int64_t position, int64_t x, int64_t columns) const {
    FilterRow<A> row{};
    row.taps = taps;
    row.pitch = pitch;
    row.count = columns;
    row.channel[0] = m.numbers.get() + (c * positions + position) * taps;
    row.channel[1] = row.channel[0] + taps;
    row.spatial = m.filters.get() + (r * positions + position) * taps * pitch + x;
    const A* window = m.windows.get() + c * tile.size() + x;
    if (unit_row) {
      row.features = window + tile.row(r, 0);
      return row;
    }
    for (int64_t k = 0; k < taps; ++k)
      m.pointers[k] = window + tile.row(r, k / p.kernel_size) + tile.column(k % p.kernel_size);
    row.windows = m.pointers.get();
    return row;
  }

  // A row kernel's whole vectors straight to `target`; the last one may overhang, which the scratch row bears.
  void filter_directly(FilterRow<A> row, A* target, A* scratch) const {
    const int64_t columns = row.count, whole = columns / kLanes<A> * kLanes<A>;
    row.count = whole;
    row.out = target;
    row.past_caches = past_caches;
    unit_row(row);
    if (whole == columns) return;
    row.count = columns - whole;
    row.features += whole;
    row.spatial += whole;
    row.out = scratch;
    row.past_caches = false;
    unit_row(row);
    copy_run(scratch, target + whole * together, row.count * together);
  }

  // The output row i of grid row r of a tile, for one channel and a piece of the row.
  void filter(const Memory& m, int64_t c, int64_t r, int64_t i, int64_t x, int64_t columns, T* target) const {
    if constexpr (std::is_same_v<T, A>) {
      if (direct && (!past_caches || can_stream(target))) {
        filter_directly(row_of(m, c, r, i * p.scale, x, columns), target, m.sums.get());
        return;
      }
    }
    A* const line = m.lines.get() + (channels_last(os) ? c : 0) * p.scale * pitch;
    A* const result = p.scale == together ? line : m.sums.get();
    for (int64_t j = 0; j < p.scale; j += together) {
      FilterRow<A> row = row_of(m, c, r, i * p.scale + j, x, columns);
      row.out = result + j * pitch;
      (unit_row ? unit_row : generic_row)(row);
    }
    if (result != line) interleave(result, pitch, together, p.scale, columns, line);
    if (channels_last(os)) return;  // stored with the group's other channels
    if (os.x == 1)
      write_run(line, target, columns * p.scale, past_caches);
    else
      store_run(line, target, os.x, columns * p.scale);
  }

  // Asks for what a piece of an output row of channel c will write, unless it goes past the caches, as whole lines do;
  // and for a share of what the next channels of the tile will read.
  DDFUP_INLINE void prefetch_for(const Part& part, int64_t c, int64_t y, int64_t i, int64_t x, int64_t columns,
                                 const T* target) const {
    const int64_t count = columns * p.scale;
    if (os.x == 1 && c < part.count) {
      if (!past_caches) {
        for (int64_t at = 0; at < count; at += 64 / kSize<T>) __builtin_prefetch(target + at, 1, 3);
      } else {
        // The lines at both ends are shared with what others write.
        if (!can_stream(target)) __builtin_prefetch(target, 1, 3);
        if (!can_stream(target + count)) __builtin_prefetch(target + count - 1, 1, 3);
      }
    }
    const int64_t next = part.first + part.count + c - 1;
    if (i > 0 || fs.x != 1 || p.stride != 1 || next / per_head != part.first / per_head) return;
    const int64_t ready = y == part.y0 ? std::max<int64_t>(0, y - tile.margin) : y + tile.margin;
    prefetch_rows(features + part.n * fs.n + next * fs.c, fs, ready, std::min(p.height, y + tile.margin + 1), x,
                  x + columns);
  }

  // All rows of a part, whose spatial filters are packed.
  void run_part(const Memory& m, const Part& part) const {
    fill_windows(part, m.windows.get());
    for (int64_t c = 0; c < part.count; ++c)
      for (int64_t position = 0; position < positions; ++position)
        load_run(channel + ((part.n * positions + position) * p.channels + part.first + c) * taps, 1,
                 m.numbers.get() + (c * positions + position) * taps, taps);
    for (int64_t y = part.y0; y < part.y1; ++y)
      for (int64_t i = 0; i < p.scale; ++i)
        for (int64_t x = part.x0; x < part.x1; x += chunk) {
          const int64_t columns = std::min(chunk, part.x1 - x);
          T* const target = out + part.n * os.n + part.first * os.c + (y * p.scale + i) * os.y + x * p.scale * os.x;
          for (int64_t c = 0; c < part.count; ++c) {
            prefetch_for(part, c + 1, y, i, x, columns, target + (c + 1) * os.c);
            filter(m, c, y - part.y0, i, x - part.x0, columns, target + c * os.c);
          }
          if (channels_last(os))
            store_pixels(m.lines.get(), p.scale * pitch, part.count, columns * p.scale, target, os.x, os.c);
        }
  }

  template <typename Parallel>
  void run(const Parallel& parallel_for) const {
    parallel_for(tiles() * blocks.count, [&](int64_t begin, int64_t end) {
      const Memory m(*this);
      for (int64_t task = begin; task < end; ++task) {
        Part part{};
        int64_t rest = task / blocks.count;
        part.x0 = across.begin(rest % across.count);
        part.x1 = across.end(rest % across.count);
        rest /= across.count;
        part.y0 = down.begin(rest % down.count);
        part.y1 = down.end(rest % down.count);
        rest /= down.count;
        const int64_t head = rest % p.heads;
        part.n = rest / p.heads;
        pack_spatial(p, spatial + part.n * ss.n, ss, head, part.y0, part.y1 - part.y0, part.x0, part.x1 - part.x0,
                     m.filters.get(), pitch);
        const int64_t last = blocks.end(task % blocks.count);
        for (int64_t c = blocks.begin(task % blocks.count); c < last; c += group) {
          part.first = head * per_head + c;
          part.count = std::min(group, last - c);
          run_part(m, part);
        }
      }
      finish_streams();
    });
  }
};

}  // namespace ddfup
