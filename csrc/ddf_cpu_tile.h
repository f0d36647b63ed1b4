// Tiles of the CPU kernels: how the grid is cut, and how padded rows of a tile are filled from tensors of any strides.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "ddf.h"
#include "ddf_cpu_rows.h"

namespace ddfup {

template <typename T>
constexpr int64_t kSize = sizeof(T);
constexpr int64_t kAlign = 16;  // elements; tile widths are multiples, so that vectors only overhang the last tile
constexpr int64_t kChannelGroup = 16;  // channels-last tensors are read and written this many channels at a time

DDFUP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DDFUP_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
DDFUP_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

DDFUP_INLINE bool channels_last(const Strides& strides) { return strides.c == 1 && strides.x != 1; }

// Memory of the spatial filters of a grid point, for one head.
template <typename A>
DDFUP_INLINE int64_t filter_bytes(const Problem& p) {
  return p.scale * p.scale * p.kernel_size * p.kernel_size * kSize<A>;
}

// Uninitialised scratch memory on a cache line.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(::operator new(sizeof(A) * static_cast<size_t>(count + 64), std::align_val_t(64)))) {}
  A* get() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(A* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Delete> data_;
};

// How one axis of the grid is cut into nearly equal pieces, the same for any number of threads.
struct Cuts {
  int64_t length, step, count;
  Cuts(int64_t total, int64_t largest, int64_t multiple) : length(total) {
    step = round_up(ceil_div(total, ceil_div(total, largest)), multiple);
    count = ceil_div(total, step);
  }
  int64_t begin(int64_t piece) const { return piece * step; }
  int64_t end(int64_t piece) const { return std::min(length, (piece + 1) * step); }
};

// The most rows of a tile for which there are still so many tiles; at least 4, or filling the halo costs too much.
DDFUP_INLINE int64_t rows_for(const Problem& p, const Cuts& across, int64_t tiles) {
  return std::max<int64_t>(4, p.grid_height * across.count * p.batch * p.heads / tiles);
}

// The padded rows of features that a tile of `rows` x `columns` grid points sees. A row is split by column phase, so
// that with any stride every tap reads consecutive numbers.
struct FeatureTile {
  int64_t kernel_size, stride, dilation, margin;
  int64_t pitch;          // from one phase of a row to the next
  int64_t slots;          // rows kept
  bool one_slot_per_tap;  // for wide dilations, where keeping all rows in between would waste memory

  FeatureTile(const Problem& p, int64_t rows, int64_t row_pitch)
      : kernel_size(p.kernel_size),
        stride(p.stride),
        dilation(p.dilation),
        margin(p.kernel_size / 2 * p.dilation),
        pitch(row_pitch) {
    const int64_t dense = (rows - 1) * stride + (kernel_size - 1) * dilation + 1;
    one_slot_per_tap = rows * kernel_size < dense;
    slots = one_slot_per_tap ? rows * kernel_size : dense;
  }
  int64_t size() const { return slots * stride * pitch; }
  int64_t row(int64_t r, int64_t u) const {
    return (one_slot_per_tap ? r * kernel_size + u : r * stride + u * dilation) * stride * pitch;
  }
  int64_t column(int64_t v) const { return v * dilation % stride * pitch + v * dilation / stride; }
};

// Reads `count` pixels `step` apart of `channels` channels; channel c goes to row c of the destination.
template <typename T, typename A>
void load_pixels(const T* from, int64_t step, int64_t channel_step, int64_t count, int64_t channels, A* to,
                 int64_t to_step) {
  if (channels == 1 || channel_step != 1) {
    for (int64_t c = 0; c < channels; ++c) load_run(from + c * channel_step, step, to + c * to_step, count);
    return;
  }
  int64_t x = 0;
#if defined(DDFUP_HAS_SHUFFLE)
  constexpr int L = kLanes<A>;
  for (; channels % L == 0 && x + L <= count; x += L)
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        A pixel[L];
        load_run(from + (x + i) * step + c, 1, pixel, L);
        square[i] = load(pixel);
      }
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (c + i) * to_step + x, square[i]);
    }
#endif
  for (; x < count; ++x)
    for (int64_t c = 0; c < channels; ++c) to[c * to_step + x] = widen(from[x * step + c]);
}

// The reverse of load_pixels.
template <typename T, typename A>
void store_pixels(const A* from, int64_t from_step, int64_t channels, int64_t count, T* to, int64_t step,
                  int64_t channel_step) {
  if (channels == 1 || channel_step != 1) {
    for (int64_t c = 0; c < channels; ++c) store_run(from + c * from_step, to + c * channel_step, step, count);
    return;
  }
  int64_t x = 0;
#if defined(DDFUP_HAS_SHUFFLE)
  constexpr int L = kLanes<A>;
  for (; channels % L == 0 && x + L <= count; x += L)
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(from + (c + i) * from_step + x);
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        A pixel[L];
        store(pixel, square[i]);
        store_run(pixel, to + (x + i) * step + c, 1, L);
      }
    }
#endif
  for (; x < count; ++x)
    for (int64_t c = 0; c < channels; ++c) narrow(from[c * from_step + x], to[x * step + c]);
}

// Whether a tensor of so many numbers is too large to be found in a cache by whoever reads it next: it is written past
// the caches, without reading its lines first.
template <typename T>
DDFUP_INLINE bool is_large(int64_t count) {
  return count * kSize<T> >= 16 << 20;
}

// Stores consecutive numbers.
template <typename T, typename A>
DDFUP_INLINE void write_run(const A* from, T* to, int64_t count, bool past_caches) {
  if (past_caches)
    stream_run(from, to, count);
  else
    store_run(from, to, 1, count);
}

// So many planes before they are read, those of the spatial filters are asked for: hardware does not follow so many
// streams.
constexpr int64_t kAhead = 2;

// Asks for the rows of a plane that will be needed soon; hardware follows such short runs too late. This, and whatever
// does nothing but call it, must be inline: GCC takes a function that only prefetches for one without effect, and drops
// the call.
template <typename T>
DDFUP_INLINE void prefetch_rows(const T* plane, const Strides& strides, int64_t y0, int64_t y1, int64_t x0,
                                int64_t x1) {
  constexpr int64_t line = 64 / kSize<T>;
  for (int64_t y = y0; y < y1; ++y)
    for (int64_t x = x0; x < x1; x += line) __builtin_prefetch(plane + y * strides.y + x, 0, 2);
}

// Fills the tile of `channels` channels that belongs to the grid points from (y0, x0) on.
template <typename T, typename A>
void fill_features(const Problem& p, const FeatureTile& tile, const T* from, const Strides& strides, int64_t channels,
                   int64_t y0, int64_t rows, int64_t x0, int64_t columns, A* to) {
  const int64_t length = round_up(columns, kAlign) + (tile.kernel_size - 1) * tile.dilation / tile.stride;
  const bool replicate = p.padding == Padding::kReplicate;
  for (int64_t slot = 0; slot < tile.slots; ++slot) {
    int64_t y;
    if (tile.one_slot_per_tap) {
      y = (y0 + slot / tile.kernel_size) * tile.stride + slot % tile.kernel_size * tile.dilation - tile.margin;
      if (slot / tile.kernel_size >= rows) break;
    } else {
      y = y0 * tile.stride + slot - tile.margin;
      if (slot > (rows - 1) * tile.stride + (tile.kernel_size - 1) * tile.dilation) break;
    }
    const bool outside = y < 0 || y >= p.height;
    const T* line = from + std::clamp<int64_t>(y, 0, p.height - 1) * strides.y;
    for (int64_t phase = 0; phase < tile.stride; ++phase) {
      A* row = to + (slot * tile.stride + phase) * tile.pitch;
      const int64_t first = x0 * tile.stride + phase - tile.margin;  // image column of the row's first number
      const int64_t inside = std::clamp<int64_t>(ceil_div(std::max<int64_t>(-first, 0), tile.stride), 0, length);
      const int64_t beyond =
          first >= p.width ? inside : std::clamp<int64_t>(ceil_div(p.width - first, tile.stride), inside, length);
      if (outside && !replicate) {
        for (int64_t c = 0; c < channels; ++c) fill_run(row + c * tile.size(), A(0), length);
        continue;
      }
      if (beyond > inside)
        load_pixels(line + (first + inside * tile.stride) * strides.x, tile.stride * strides.x, strides.c,
                    beyond - inside, channels, row + inside, tile.size());
      for (int64_t c = 0; c < channels; ++c) {
        const T* pixels = line + c * strides.c;
        A* numbers = row + c * tile.size();
        const A left = replicate ? A(widen(pixels[0])) : A(0);
        const A right = replicate ? A(widen(pixels[(p.width - 1) * strides.x])) : A(0);
        fill_run(numbers, left, inside);
        fill_run(numbers + beyond, right, length - beyond);
      }
    }
  }
}

}  // namespace ddfup
