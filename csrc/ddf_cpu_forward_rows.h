// Row kernels of the CPU forward: vectors along x for one channel, and the choice among them.
#pragma once

#include "ddf.h"
#include "ddf_cpu_rows.h"

namespace ddfup {

constexpr int64_t kForwardColumns = 512;
// From row to row of a tile: known to the compiler, and no power of two, which would crowd a few cache sets.
constexpr int kForwardPitch = 528;

// A piece of a grid row, for one channel.
template <typename A>
struct FilterRow {
  const A* features;        // unit kernels: window of the first grid point, on a multiple of a vector
  const A* const* windows;  // generic kernel: one pointer per tap
  const A* spatial;         // [J][K * K][pitch]
  const A* channel[2];      // [J]: K * K numbers
  A* out;                   // the J sub-positions side by side
  int64_t taps, pitch, count;
  bool past_caches;  // whether to stream `out`, which then lies on a multiple of a vector
};

// Where the vectors of one call begin.
template <typename A>
struct Taps {
  const A* __restrict__ features;
  const A* __restrict__ spatial;
  const A* __restrict__ channel[2];
};

// Adds one tap to the sums of J sub-positions and X vectors.
template <typename A, int K, bool kAdd, int J, int X, int U, int V>
DDFUP_INLINE void filter_tap(const Taps<A>& taps, const Vec<A> (&lead)[X + 1], Vec<A> (&sum)[J][X]) {
  constexpr int P = kForwardPitch, L = kLanes<A>, k = U * K + V;
  Vec<A> feature[X];
#pragma GCC unroll 4
  for (int i = 0; i < X; ++i) feature[i] = shifted<V, A>(taps.features + U * P + i * L, lead[i], lead[i + 1]);
#pragma GCC unroll 2
  for (int j = 0; j < J; ++j) {
    const A channel = taps.channel[j][k];
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) {
      const Vec<A> weight = load(taps.spatial + (j * K * K + k) * P + i * L);
      if constexpr (kAdd)
        sum[j][i] += (weight + channel) * feature[i];
      else
        sum[j][i] += (feature[i] * channel) * weight;
    }
  }
}

template <typename A, int K, bool kAdd, int J, int X, int U, int... V>
DDFUP_INLINE void filter_tap_row(const Taps<A>& taps, Vec<A> (&sum)[J][X], std::integer_sequence<int, V...>) {
  Vec<A> lead[X + 1];
#pragma GCC unroll 4
  for (int i = 0; i <= X; ++i) lead[i] = load(taps.features + U * kForwardPitch + i * kLanes<A>);
  (filter_tap<A, K, kAdd, J, X, U, V>(taps, lead, sum), ...);
}

template <typename A>
DDFUP_INLINE void put(A* to, Vec<A> value, bool past_caches) {
  past_caches ? stream(to, value) : store(to, value);
}

// X vectors of grid points.
template <typename A, int K, bool kAdd, int J, int X, int... U>
DDFUP_INLINE void filter_vectors(const Taps<A>& taps, A* __restrict__ out, bool past_caches,
                                 std::integer_sequence<int, U...>) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[J][X] = {};
  (filter_tap_row<A, K, kAdd, J, X, U>(taps, sum, std::make_integer_sequence<int, K>()), ...);
#pragma GCC unroll 4
  for (int i = 0; i < X; ++i) {
    if constexpr (J == 1) {
      put<A>(out + i * L, sum[0][i], past_caches);
    } else {
#if defined(DDFUP_HAS_SHUFFLE)
      constexpr auto lanes = std::make_index_sequence<L>();
      put<A>(out + 2 * i * L, interleave_low<A>(sum[0][i], sum[1][i], lanes), past_caches);
      put<A>(out + (2 * i + 1) * L, interleave_high<A>(sum[0][i], sum[1][i], lanes), past_caches);
#else
      for (int lane = 0; lane < L; ++lane)
        for (int j = 0; j < J; ++j) out[(i * L + lane) * J + j] = sum[j][i][lane];
#endif
    }
  }
}

template <typename A, int K, bool kAdd, int J, int X>
__attribute__((noinline)) void filter_piece(const FilterRow<A>& row, int64_t begin, int64_t end) {
  const A* const features = row.features;
  const A* const spatial = row.spatial;
  A* const out = row.out;
  const bool past_caches = row.past_caches;
  const A *channel0 = row.channel[0], *channel1 = row.channel[1];
  for (int64_t x = begin; x < end; x += X * kLanes<A>) {
    const Taps<A> taps{features + x, spatial + x, {channel0, channel1}};
    filter_vectors<A, K, kAdd, J, X>(taps, out + J * x, past_caches, std::make_integer_sequence<int, K>());
  }
}

// Stride and dilation 1: all distances are compile-time constants. J neighbouring sub-positions share the features, two
// vectors the channel filter.
template <typename A, int K, bool kAdd, int J>
void filter_row(const FilterRow<A>& row) {
  const int64_t pairs = row.count - row.count % (2 * kLanes<A>);
  if (pairs > 0) filter_piece<A, K, kAdd, J, 2>(row, 0, pairs);
  if (pairs < row.count) filter_piece<A, K, kAdd, J, 1>(row, pairs, row.count);
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

template <typename A>
using FilterRowKernel = void (*)(const FilterRow<A>&);

template <typename A, bool kAdd, int J>
FilterRowKernel<A> unit_filter_row(int64_t kernel_size) {
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
FilterRowKernel<A> filter_row_for(const Problem& p) {
  // Not worth their compilation for float64.
  if constexpr (std::is_same_v<A, float>)
    if (p.stride == 1 && p.dilation == 1)
      return p.scale % 2 == 0 ? unit_filter_row<A, kAdd, 2>(p.kernel_size) : unit_filter_row<A, kAdd, 1>(p.kernel_size);
  return nullptr;
}

}  // namespace ddfup
