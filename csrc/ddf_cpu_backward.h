// Backward on the CPU, without conflicts: every gradient row has one owner, and partial sums meet in a fixed order.
#pragma once

#include "ddf_cpu_backward_rows.h"
#include "ddf_cpu_forward.h"

namespace ddfup {

// The features that a tile of the grid owns along one axis, and the grid points whose windows reach them.
struct Owned {
  int64_t begin, end;            // of the features; negative or beyond the image where the edge is replicated
  int64_t grid_begin, grid_end;  // may leave the grid
  Owned(const Problem& p, int64_t first, int64_t last, int64_t length, int64_t grid_length, bool wanted) {
    const int64_t margin = p.kernel_size / 2 * p.dilation;
    const int64_t extra = p.padding == Padding::kReplicate ? margin : 0;
    begin = first == 0 ? -extra : first * p.stride;
    end = last == grid_length ? length + extra : last * p.stride;
    if (!wanted) end = begin;
    grid_begin = wanted ? std::min(first, floor_div(begin - margin, p.stride)) : first;
    grid_end = wanted ? std::max(last, floor_div(end - 1 + margin, p.stride) + 1) : last;
  }
};

// Everything of one call that its tasks share.
template <typename T>
struct Backward {
  using A = Wide<T>;
  Problem p;
  const T *grad, *features, *channel, *spatial;
  Strides gs, fs, ss;
  T *grad_features, *grad_channel, *grad_spatial;  // null where not needed
  Strides gfs;                                     // of grad_features; grad_spatial is contiguous

  int64_t taps, positions, per_head;
  BackwardRows<A> rows;
  Cuts across, down;
  int64_t pitch, halo_rows, region_pitch;
  FeatureTile tile;
  int64_t group;  // channels per tile
  int64_t chunk;  // columns per piece of a row

  // Tiles whose filters and their gradients nearly stay in the second-level cache, and whose halo is not most of them.
  static constexpr int64_t kTileBytes = 1024 * 1024;
  // A group of channels keeps what it needs there, a piece of a row its filters in the first-level cache.
  static constexpr int64_t kGroupBytes = 256 * 1024;
  static constexpr int64_t kChunkBytes = 24 * 1024;
  static int64_t columns_per_tile(const Problem& p) {
    const int64_t rows = 2 * 4 + p.kernel_size - 1;
    return std::clamp<int64_t>(kTileBytes / (filter_bytes<A>(p) * rows) / kAlign * kAlign, 4 * kAlign,
                               kBackwardColumns);
  }
  static int64_t rows_per_tile(const Problem& p, const Cuts& across) {
    const int64_t halo = (p.kernel_size - 1) * p.dilation / p.stride;
    const int64_t cached = std::clamp<int64_t>((kTileBytes / (filter_bytes<A>(p) * across.step) - halo) / 2, 1, 16);
    // The tiles decide how sums are rounded, so the number of threads must not decide the tiles.
    return std::min(cached, rows_for(p, across, 16));
  }
  static int64_t pitch_for(const Problem& p, const Cuts& across, bool unit) {
    const int64_t reach = (p.kernel_size - 1) * p.dilation / p.stride;
    return unit ? kBackwardPitch : round_up(across.step + 2 * reach + 4, kAlign) + kAlign;
  }

  Backward(const Problem& problem, const T* grad_, const Strides& gs_, const T* features_, const Strides& fs_,
           const T* channel_, const T* spatial_, const Strides& ss_, T* grad_features_, const Strides& gfs_,
           T* grad_channel_, T* grad_spatial_)
      : p(problem),
        grad(grad_),
        features(features_),
        channel(channel_),
        spatial(spatial_),
        gs(gs_),
        fs(fs_),
        ss(ss_),
        grad_features(grad_features_),
        grad_channel(grad_channel_),
        grad_spatial(grad_spatial_),
        gfs(gfs_),
        taps(p.kernel_size * p.kernel_size),
        positions(p.scale * p.scale),
        per_head(p.channels / p.heads),
        rows(p.combine == Combine::kAdd ? backward_rows<A, true>(p) : backward_rows<A, false>(p)),
        across(p.grid_width, columns_per_tile(p), kAlign),
        down(p.grid_height, rows_per_tile(p, across), 1),
        pitch(pitch_for(p, across, rows.unit)),
        halo_rows(down.step + 2 * ((p.kernel_size - 1) * p.dilation / p.stride) + 4),
        region_pitch(region_lead() + round_up(across.step * p.stride + (p.kernel_size - 1) * p.dilation, kAlign) +
                     kAlign),
        tile(p, down.step, pitch),
        group(group_for()),
        chunk(std::max<int64_t>(1, kChunkBytes / (taps * kSize<A>) / (2 * kAlign)) * 2 * kAlign) {}

  // Unit kernels work on several channels, so that these share what a piece of a row has of the filters.
  int64_t group_for() const {
    if (channels_last(fs)) return std::min(kChannelGroup, per_head);
    if (!rows.unit) return 1;
    const int64_t rows_seen = down.step + p.kernel_size - 1;
    const int64_t bytes = (positions * rows_seen * pitch + tile.size() + down.step * region_pitch) * kSize<A>;
    return Cuts(per_head, std::max<int64_t>(2, kGroupBytes / bytes), 1).step;
  }

  // The gradients of both filters are made together; for one of them alone it would not pay to have other kernels.
  bool needs_filters() const { return grad_channel || grad_spatial; }

  // Where packed rows of grid points and the rows of owned features begin: for unit kernels so that a tile's first
  // column is on a multiple of a vector in both.
  int64_t base(const Owned& ox, int64_t x0) const { return rows.unit ? x0 - kLead : ox.grid_begin; }
  int64_t region_lead() const { return rows.unit ? kAlign : 0; }
  int64_t region_base(const Owned& ox, int64_t x0) const { return rows.unit ? x0 - region_lead() : ox.begin; }

  int64_t region_size() const { return region_rows() * region_pitch; }
  int64_t region_rows() const { return down.step * p.stride + (p.kernel_size - 1) * p.dilation; }

  // Scratch memory of one thread.
  struct Memory {
    Scratch<A> filters, grad_filters, windows, grads, region, line, numbers;
    std::unique_ptr<Vec<A>[]> sums;
    std::unique_ptr<const A*[]> windows_of, grads_of, spatials_of;
    explicit Memory(const Backward& b)
        : filters(b.halo_rows * b.positions * b.taps * b.pitch),
          grad_filters(b.needs_filters() ? b.down.step * b.positions * b.taps * b.pitch : 0),
          windows(b.needs_filters() ? b.group * b.tile.size() : 0),
          grads(b.group * b.positions * b.halo_rows * b.pitch),
          region(b.grad_features ? b.group * b.region_rows() * b.region_pitch : 0),
          line(b.pitch),
          numbers((b.group + 1) * b.positions * b.taps),
          sums(new Vec<A>[static_cast<size_t>(b.group * b.positions * b.taps)]),
          windows_of(new const A*[static_cast<size_t>(b.taps)]),
          grads_of(new const A*[static_cast<size_t>(b.taps)]),
          spatials_of(new const A*[static_cast<size_t>(b.taps)]) {}
  };

  // How much of a packed row is read: vectors overhang the tile by less than two.
  int64_t used(const Owned& ox, int64_t x0) const {
    return std::min(pitch, round_up(ox.grid_end - base(ox, x0), kAlign) + kAlign);
  }

  // The spatial filters of the grid points in `oy` x `ox`; zeros outside the grid.
  void pack_filters(int64_t n, int64_t head, const Owned& oy, const Owned& ox, int64_t x0, A* to) const {
    const int64_t left = std::max<int64_t>(ox.grid_begin, 0), right = std::min(ox.grid_end, p.grid_width);
    const int64_t before = left - base(ox, x0), filled = used(ox, x0);
    for (int64_t y = oy.grid_begin; y < oy.grid_end; ++y)
      for (int64_t position = 0; position < positions; ++position)
        for (int64_t k = 0; k < taps; ++k, to += pitch) {
          if (y < 0 || y >= p.grid_height) {
            fill_run(to, A(0), filled);
            continue;
          }
          const int64_t plane = (position * p.heads + head) * taps + k;
          const T* const from = spatial + n * ss.n + plane * ss.c;
          if (ss.x == 1 && plane + kAhead < positions * p.heads * taps)
            prefetch_rows(from + kAhead * ss.c, ss, y, y + 1, left, right);
          fill_run(to, A(0), before);
          load_run(from + y * ss.y + left * ss.x, ss.x, to + before, right - left);
          fill_run(to + before + right - left, A(0), filled - before - (right - left));
        }
  }

  // The output gradients there, of `count` channels.
  void fill_grads(int64_t n, int64_t c, int64_t count, const Owned& oy, const Owned& ox, int64_t x0, A* to) const {
    const int64_t left = std::max<int64_t>(ox.grid_begin, 0), right = std::min(ox.grid_end, p.grid_width);
    const int64_t before = left - base(ox, x0), filled = used(ox, x0);
    const int64_t channel_size = positions * halo_rows * pitch;
    for (int64_t y = oy.grid_begin; y < oy.grid_end; ++y)
      for (int64_t position = 0; position < positions; ++position) {
        A* row = to + (position * halo_rows + y - oy.grid_begin) * pitch;
        if (y < 0 || y >= p.grid_height) {
          for (int64_t q = 0; q < count; ++q) fill_run(row + q * channel_size, A(0), filled);
          continue;
        }
        const T* from = grad + n * gs.n + c * gs.c + (y * p.scale + position / p.scale) * gs.y +
                        (left * p.scale + position % p.scale) * gs.x;
        for (int64_t q = 0; q < count; ++q) {
          fill_run(row + q * channel_size, A(0), before);
          fill_run(row + q * channel_size + before + right - left, A(0), filled - before - (right - left));
        }
        load_pixels(from, p.scale * gs.x, gs.c, right - left, count, row + before, channel_size);
      }
  }

  // Asks for what the next channel's tile will read.
  DDFUP_INLINE void prefetch_next(int64_t n, int64_t c, const Owned& oy, const Owned& ox, int64_t y0, int64_t y1,
                                  int64_t x0, int64_t x1) const {
    if (gs.x == 1)
      prefetch_rows(grad + n * gs.n + c * gs.c, gs, std::max<int64_t>(oy.grid_begin, 0) * p.scale,
                    std::min(oy.grid_end, p.grid_height) * p.scale, std::max<int64_t>(ox.grid_begin, 0) * p.scale,
                    std::min(ox.grid_end, p.grid_width) * p.scale);
    if (fs.x == 1 && needs_filters())
      prefetch_rows(features + n * fs.n + c * fs.c, fs, std::max<int64_t>(y0 * p.stride - tile.margin, 0),
                    std::min((y1 - 1) * p.stride + tile.margin + 1, p.height), x0 * p.stride,
                    std::min(x1 * p.stride, p.width));
  }

  // The output gradients and features of a tile's channels from `first` on.
  void fill_channels(const Memory& m, int64_t n, int64_t first, int64_t count, const Owned& oy, const Owned& ox,
                     int64_t y0, int64_t y1, int64_t x0, int64_t x1) const {
    const int64_t together = channels_last(fs) ? count : 1;
    for (int64_t q = 0; q < count; q += together) {
      if (together == 1 && (first + q + 1) % per_head != 0) prefetch_next(n, first + q + 1, oy, ox, y0, y1, x0, x1);
      fill_grads(n, first + q, together, oy, ox, x0, m.grads.get() + q * positions * halo_rows * pitch);
      if (needs_filters())
        fill_features(p, tile, features + n * fs.n + (first + q) * fs.c, fs, together, y0, y1 - y0, x0, x1 - x0,
                      m.windows.get() + q * tile.size());
    }
    for (int64_t q = 0; q < count; ++q)
      for (int64_t position = 0; position < positions; ++position)
        load_run(channel + ((n * positions + position) * p.channels + first + q) * taps, 1,
                 m.numbers.get() + (q * positions + position) * taps, taps);
  }

  // Adds what some channels' tiles give to the gradients of both filters.
  void filter_grads(const Memory& m, int64_t count, int64_t y0, int64_t y1, int64_t x0, int64_t columns,
                    const Owned& oy, const Owned& ox) const {
    FilterGradRow<A> row{};
    row.taps = taps;
    row.pitch = pitch;
    row.channels = count;
    row.grad_step = positions * halo_rows * pitch;
    row.window_step = tile.size();
    row.channel_step = row.sums_step = positions * taps;
    row.windows = m.windows_of.get();
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t position = 0; position < positions; ++position) {
        const int64_t grid_row = y - oy.grid_begin, column = x0 - base(ox, x0);
        const A* const grad_row = m.grads.get() + (position * halo_rows + grid_row) * pitch + column;
        const A* const spatial_row = m.filters.get() + (grid_row * positions + position) * taps * pitch + column;
        A* const grad_spatial_row = m.grad_filters.get() + ((y - y0) * positions + position) * taps * pitch;
        row.channel = m.numbers.get() + position * taps;
        row.grad_channel = m.sums.get() + position * taps;
        if (rows.unit) {
          for (int64_t x = 0; x < columns; x += chunk) {
            row.grad = grad_row + x;
            row.window = m.windows.get() + tile.row(y - y0, 0) + x;
            row.spatial = spatial_row + x;
            row.grad_spatial = grad_spatial_row + x;
            row.count = std::min(chunk, columns - x);
            rows.filters(row);
          }
          continue;
        }
        row.spatial = spatial_row;
        row.grad_spatial = grad_spatial_row;
        row.count = columns;
        for (int64_t q = 0; q < count; ++q) {
          for (int64_t k = 0; k < taps; ++k)
            m.windows_of[k] = m.windows.get() + q * tile.size() + tile.row(y - y0, k / p.kernel_size) +
                              tile.column(k % p.kernel_size);
          row.grad = grad_row + q * row.grad_step;
          rows.filters(row);
          row.channel += row.channel_step;
          row.grad_channel += row.sums_step;
        }
      }
  }

  // Gathers the gradients of the owned features of some channels.
  void feature_grads(const Memory& m, int64_t count, int64_t x0, const Owned& oy, const Owned& ox) const {
    const int64_t margin = p.kernel_size / 2 * p.dilation;
    // From the tile's first column on, or a vector before, where there are owned features.
    const int64_t start = ox.begin < x0 ? x0 - kAlign : x0, columns = ox.end - start;
    FeatureGradRow<A> row{};
    row.spatial_row = positions * taps * pitch;
    for (int64_t y = oy.begin; y < oy.end; ++y) {
      A* const target = m.region.get() + (y - oy.begin) * region_pitch + start - region_base(ox, x0);
      for (int64_t q = 0; q < count; ++q) fill_run(target + q * region_size(), A(0), round_up(columns, kAlign));
      const int64_t top = y + margin - oy.grid_begin, left = start - base(ox, x0);
      for (int64_t position = 0; position < positions; ++position)
        for (int64_t x = 0; x < columns; x += chunk) {
          row.count = std::min(chunk, columns - x);
          row.spatial = m.filters.get() + (top * positions + position) * taps * pitch + left + x;
          for (int64_t q = 0; q < count; ++q) {
            row.grad = m.grads.get() + ((q * positions + position) * halo_rows + top) * pitch + left + x;
            row.channel = m.numbers.get() + (q * positions + position) * taps;
            row.out = target + q * region_size() + x;
            rows.features(row);
          }
        }
    }
  }

  // The same for one channel with any stride and dilation.
  void feature_grads_generic(const Memory& m, const A* grads, const A* numbers, A* region, const Owned& oy,
                             const Owned& ox) const {
    const int64_t margin = p.kernel_size / 2 * p.dilation;
    A* const chosen = m.numbers.get() + group * positions * taps;
    FeatureGradRow<A> row{};
    row.grads = m.grads_of.get();
    row.spatials = m.spatials_of.get();
    row.channel = chosen;
    row.out = m.line.get();
    for (int64_t y = oy.begin; y < oy.end; ++y) {
      A* target = region + (y - oy.begin) * region_pitch;
      for (int64_t phase = 0; phase < p.stride && ox.begin + phase < ox.end; ++phase) {
        row.count = ceil_div(ox.end - ox.begin - phase, p.stride);
        fill_run(m.line.get(), A(0), round_up(row.count, kAlign));
        for (int64_t position = 0; position < positions; ++position) {
          row.taps = 0;
          for (int64_t k = 0; k < taps; ++k) {
            const int64_t down_by = y + margin - k / p.kernel_size * p.dilation;
            const int64_t right_by = ox.begin + phase + margin - k % p.kernel_size * p.dilation;
            const int64_t gy = floor_div(down_by, p.stride), gx = floor_div(right_by, p.stride);
            if (gy * p.stride != down_by || gx * p.stride != right_by || gy < 0 || gy >= p.grid_height) continue;
            const int64_t at = gy - oy.grid_begin, left = gx - ox.grid_begin;
            m.grads_of[row.taps] = grads + (position * halo_rows + at) * pitch + left;
            m.spatials_of[row.taps] = m.filters.get() + ((at * positions + position) * taps + k) * pitch + left;
            chosen[row.taps++] = numbers[position * taps + k];
          }
          rows.features(row);
        }
        for (int64_t x = 0; x < row.count; ++x) target[phase + x * p.stride] = m.line.get()[x];
      }
    }
  }

  // Adds the replicated edge to the pixels it came from, and writes the rows.
  void store_features(A* region, int64_t n, int64_t c, int64_t count, const Owned& oy, const Owned& ox,
                      int64_t x0) const {
    const int64_t base_column = region_base(ox, x0), lead = ox.begin - base_column;
    const int64_t columns = ox.end - ox.begin;
    for (int64_t q = 0; q < count; ++q) {
      A* const tile_of = region + q * region_size();
      for (int64_t y = oy.begin; y < oy.end; ++y) {
        const int64_t into = std::clamp<int64_t>(y, 0, p.height - 1);
        if (into == y) continue;
        const A* row = tile_of + (y - oy.begin) * region_pitch + lead;
        A* target = tile_of + (into - oy.begin) * region_pitch + lead;
        for (int64_t x = 0; x < columns; ++x) target[x] += row[x];
      }
      for (int64_t y = std::max<int64_t>(oy.begin, 0); y < std::min(oy.end, p.height); ++y) {
        A* row = tile_of + (y - oy.begin) * region_pitch + lead;
        for (int64_t x = ox.begin; x < 0; ++x) row[-ox.begin] += row[x - ox.begin];
        for (int64_t x = p.width; x < ox.end; ++x) row[p.width - 1 - ox.begin] += row[x - ox.begin];
      }
    }
    const int64_t left = std::max<int64_t>(ox.begin, 0), right = std::min(ox.end, p.width);
    for (int64_t y = std::max<int64_t>(oy.begin, 0); y < std::min(oy.end, p.height); ++y)
      store_pixels(region + (y - oy.begin) * region_pitch + left - base_column, region_size(), count, right - left,
                   grad_features + n * gfs.n + c * gfs.c + y * gfs.y + left * gfs.x, gfs.x, gfs.c);
  }

  // One tile of one head; `partial` gathers the channel filter's gradient, [S][C / heads][K * K].
  void run_tile(const Memory& m, int64_t n, int64_t head, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                A* partial) const {
    const Owned oy(p, y0, y1, p.height, p.grid_height, grad_features != nullptr);
    const Owned ox(p, x0, x1, p.width, p.grid_width, grad_features != nullptr);
    const int64_t columns = x1 - x0;
    pack_filters(n, head, oy, ox, x0, m.filters.get());
    if (needs_filters())
      for (int64_t row = 0; row < (y1 - y0) * positions * taps; ++row)
        fill_run(m.grad_filters.get() + row * pitch, A(0), round_up(columns, kAlign));
    for (int64_t c0 = 0; c0 < per_head; c0 += group) {
      const int64_t first = head * per_head + c0, count = std::min(group, per_head - c0);
      fill_channels(m, n, first, count, oy, ox, y0, y1, x0, x1);
      if (needs_filters()) {
        const int64_t sums = count * positions * taps;
        std::fill_n(m.sums.get(), sums, Vec<A>{});
        filter_grads(m, count, y0, y1, x0, columns, oy, ox);
        for (int64_t i = 0; grad_channel && i < sums; ++i) {
          const int64_t q = i / (positions * taps), position = i / taps % positions;
          partial[(position * per_head + c0 + q) * taps + i % taps] += lane_sum<A>(m.sums[i]);
        }
      }
      if (!grad_features) continue;
      if (rows.unit)
        feature_grads(m, count, x0, oy, ox);
      else
        for (int64_t q = 0; q < count; ++q)
          feature_grads_generic(m, m.grads.get() + q * positions * halo_rows * pitch,
                                m.numbers.get() + q * positions * taps, m.region.get() + q * region_size(), oy, ox);
      store_features(m.region.get(), n, first, count, oy, ox, x0);
    }
    if (!grad_spatial) return;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t position = 0; position < positions; ++position)
        for (int64_t k = 0; k < taps; ++k) {
          const int64_t plane = ((n * positions + position) * p.heads + head) * taps + k;
          store_run(m.grad_filters.get() + (((y - y0) * positions + position) * taps + k) * pitch,
                    grad_spatial + (plane * p.grid_height + y) * p.grid_width + x0, 1, columns);
        }
  }

  template <typename Parallel>
  void run(const Parallel& parallel_for) const {
    // A task runs a fixed set of tiles one after the other, which bounds the number of partial sums.
    const int64_t tiles = down.count * across.count;
    const Cuts sets(tiles,
                    std::max<int64_t>(1, ceil_div(tiles, ceil_div(128, std::max<int64_t>(p.batch * p.heads, 1)))), 1);
    const int64_t partial_size = positions * per_head * taps;
    const Scratch<A> partials(grad_channel ? p.batch * p.heads * sets.count * partial_size : 0);
    parallel_for(p.batch * p.heads * sets.count, [&](int64_t begin, int64_t end) {
      const Memory m(*this);
      for (int64_t task = begin; task < end; ++task) {
        A* partial = partials.get() + (grad_channel ? task * partial_size : 0);
        if (grad_channel) fill_run(partial, A(0), partial_size);
        const int64_t set = task % sets.count, head = task / sets.count % p.heads, n = task / sets.count / p.heads;
        for (int64_t index = sets.begin(set); index < sets.end(set); ++index) {
          const int64_t y = index / across.count, x = index % across.count;
          run_tile(m, n, head, down.begin(y), down.end(y), across.begin(x), across.end(x), partial);
        }
      }
    });
    if (!grad_channel) return;
    parallel_for(p.batch * positions, [&](int64_t begin, int64_t end) {
      const Scratch<A> total(taps);
      for (int64_t index = begin; index < end; ++index)
        for (int64_t c = 0; c < p.channels; ++c) {
          const int64_t n = index / positions, position = index % positions, head = c / per_head;
          fill_run(total.get(), A(0), taps);
          for (int64_t set = 0; set < sets.count; ++set) {
            const A* partial = partials.get() + ((n * p.heads + head) * sets.count + set) * partial_size +
                               (position * per_head + c % per_head) * taps;
            for (int64_t k = 0; k < taps; ++k) total.get()[k] += partial[k];
          }
          store_run(total.get(), grad_channel + (index * p.channels + c) * taps, 1, taps);
        }
    });
  }
};

}  // namespace ddfup
