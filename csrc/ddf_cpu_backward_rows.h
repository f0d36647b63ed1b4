// Row kernels of the CPU backward: vectors along x, and the choice among them.
#pragma once

#include "ddf.h"
#include "ddf_cpu_rows.h"

namespace ddfup {

constexpr int64_t kBackwardColumns = 320;
// From row to row of a tile: a tile's columns, room on both sides, and no multiple of many cache lines.
constexpr int kBackwardPitch = 400;
// Numbers before a tile's first column in its packed rows: the halo, in whole vectors.
constexpr int64_t kLead = 32;

// Gradients of both filters along a piece of a grid row of one sub-position. Unit kernels take several channels at a
// time, which lie `..._channel` apart, generic ones one.
template <typename A>
struct FilterGradRow {
  const A* grad;
  const A* window;          // unit kernel: of the first grid point
  const A* const* windows;  // generic kernel: one pointer per tap
  const A* spatial;         // [K * K][pitch]
  const A* channel;         // K * K numbers
  A* grad_spatial;          // [K * K][pitch], added to
  Vec<A>* grad_channel;     // K * K partial sums, added to
  int64_t taps, pitch, count;
  int64_t channels, grad_step, window_step, channel_step, sums_step;
};

// U tap rows of K taps at a time keep the sums of Q channels in registers.
template <typename A, int K, bool kAdd, int U, int Q>
void filter_grad_piece(const FilterGradRow<A>& row, int64_t c, int first) {
  constexpr int P = kBackwardPitch, L = kLanes<A>, kTaps = U * K;
  const A *grad[Q], *window[Q], *channel[Q];
  Vec<A> sums[Q][kTaps];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    grad[q] = row.grad + (c + q) * row.grad_step;
    window[q] = row.window + (c + q) * row.window_step + first * P;
    channel[q] = row.channel + (c + q) * row.channel_step + first * K;
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) sums[q][k] = row.grad_channel[(c + q) * row.sums_step + first * K + k];
  }
  const A* const spatial = row.spatial + first * K * P;
  A* __restrict__ const grad_spatial = row.grad_spatial + first * K * P;
  const int64_t count = row.count;
  for (int64_t x = 0; x < count; x += L) {
    Vec<A> g[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) g[q] = load(grad[q] + x);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      Vec<A> here[Q], next[Q];
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        here[q] = load(window[q] + x + u * P);
        next[q] = load(window[q] + x + u * P + L);
      }
      each_tap<K>([&](auto tap) DDFUP_INLINE_LAMBDA {
        constexpr int V = decltype(tap)::value;
        const int k = u * K + V;
        Vec<A> to = load(grad_spatial + x + k * P);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          const Vec<A> product = g[q] * shifted<V, A>(window[q] + x + u * P, here[q], next[q]);
          if constexpr (kAdd) {
            sums[q][k] += product;
            to += product;
          } else {
            sums[q][k] += product * load(spatial + x + k * P);
            to += product * channel[q][k];
          }
        }
        store(grad_spatial + x + k * P, to);
      });
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) row.grad_channel[(c + q) * row.sums_step + first * K + k] = sums[q][k];
}

template <typename A, int K, bool kAdd>
void filter_grad_row(const FilterGradRow<A>& row) {
  constexpr int U = K <= 3 ? K : 1, Q = 2;
  int64_t c = 0;
  for (; c + Q <= row.channels; c += Q)
    for (int first = 0; first < K; first += U) filter_grad_piece<A, K, kAdd, U, Q>(row, c, first);
  for (; c < row.channels; ++c)
    for (int first = 0; first < K; first += U) filter_grad_piece<A, K, kAdd, U, 1>(row, c, first);
}

template <typename A, bool kAdd>
void filter_grad_row_generic(const FilterGradRow<A>& row) {
  for (int64_t k = 0; k < row.taps; ++k) {
    const A* __restrict__ window = row.windows[k];
    const A* __restrict__ spatial = row.spatial + k * row.pitch;
    A* __restrict__ grad_spatial = row.grad_spatial + k * row.pitch;
    const A channel = row.channel[k];
    Vec<A> sum = {};
    for (int64_t x = 0; x < row.count; x += kLanes<A>) {
      const Vec<A> product = load(row.grad + x) * load(window + x);
      sum += kAdd ? product : product * load(spatial + x);
      store(grad_spatial + x, load(grad_spatial + x) + (kAdd ? product : product * channel));
    }
    row.grad_channel[k] += sum;
  }
}

// Gradient of a piece of a row of features, gathered from every tap that saw it: sum of grad * mix, added to `out`.
template <typename A>
struct FeatureGradRow {
  const A* grad;          // unit kernel: the grid point at the first feature, in the lowest row that saw it
  const A* spatial;       // unit kernel: filter of the first tap there
  int64_t spatial_row;    // unit kernel: distance of grid rows in `spatial`
  const A* const* grads;  // generic kernel: one pointer per tap
  const A* const* spatials;
  const A* channel;  // K * K numbers; generic kernel: of the listed taps
  A* out;
  int64_t taps, count;
};

// What each column v of taps gives for a vector of grid points: the sums over the rows u of taps.
template <typename A, int K, bool kAdd>
DDFUP_INLINE void feature_grad_columns(const A* __restrict__ grad, const A* const (&spatial)[K],
                                       const A* __restrict__ channel, int64_t x, Vec<A> (&columns)[K]) {
  constexpr int P = kBackwardPitch;
#pragma GCC unroll 8
  for (int v = 0; v < K; ++v) columns[v] = Vec<A>{};
#pragma GCC unroll 8
  for (int u = 0; u < K; ++u) {
    const Vec<A> g = load(grad + x - u * P);
#pragma GCC unroll 8
    for (int v = 0; v < K; ++v) {
      const Vec<A> weight = load(spatial[u] + x + (u * K + v) * P);
      if constexpr (kAdd)
        columns[v] += (weight + channel[u * K + v]) * g;
      else
        columns[v] += (g * channel[u * K + v]) * weight;
    }
  }
}

// Feature x is seen by column v of taps at the grid point x + K / 2 - v. So columns are summed where they are, and the
// sums shifted, which takes a shuffle per column instead of loads across cache lines per tap.
template <typename A, int K, bool kAdd>
void feature_grad_row(const FeatureGradRow<A>& row) {
  constexpr int L = kLanes<A>, M = K / 2;
  const A* const grad = row.grad;
  const A* const channel = row.channel;
  const A* spatial[K];
  for (int u = 0; u < K; ++u) spatial[u] = row.spatial - u * row.spatial_row;
  A* __restrict__ const out = row.out;
  const int64_t count = row.count;
  Vec<A> before[K], here[K], after[K];
  feature_grad_columns<A, K, kAdd>(grad, spatial, channel, -L, before);
  feature_grad_columns<A, K, kAdd>(grad, spatial, channel, 0, here);
  for (int64_t x = 0; x < count; x += L) {
    feature_grad_columns<A, K, kAdd>(grad, spatial, channel, x + L, after);
    Vec<A> sum = load(out + x);
    each_tap<K>([&](auto tap) DDFUP_INLINE_LAMBDA {
      constexpr int V = decltype(tap)::value;
      if constexpr (V <= M)
        sum += joined_at<M - V, A>(here[V], after[V]);
      else
        sum += joined_at<L + M - V, A>(before[V], here[V]);
    });
    store(out + x, sum);
#pragma GCC unroll 8
    for (int v = 0; v < K; ++v) {
      before[v] = here[v];
      here[v] = after[v];
    }
  }
}

template <typename A, bool kAdd>
void feature_grad_row_generic(const FeatureGradRow<A>& row) {
  A* __restrict__ out = row.out;
  for (int64_t x = 0; x < row.count; x += kLanes<A>) {
    Vec<A> sum = load(out + x);
    for (int64_t k = 0; k < row.taps; ++k) {
      if constexpr (kAdd)
        sum += (load(row.spatials[k] + x) + row.channel[k]) * load(row.grads[k] + x);
      else
        sum += (load(row.grads[k] + x) * row.channel[k]) * load(row.spatials[k] + x);
    }
    store(out + x, sum);
  }
}

template <typename A>
struct BackwardRows {
  void (*filters)(const FilterGradRow<A>&) = nullptr;
  void (*features)(const FeatureGradRow<A>&) = nullptr;
  bool unit = false;
};

template <typename A, bool kAdd>
BackwardRows<A> backward_rows(const Problem& p) {
  // Not worth their compilation for float64.
  if constexpr (std::is_same_v<A, float>)
    if (p.stride == 1 && p.dilation == 1) switch (p.kernel_size) {
        case 1:
          return {filter_grad_row<A, 1, kAdd>, feature_grad_row<A, 1, kAdd>, true};
        case 3:
          return {filter_grad_row<A, 3, kAdd>, feature_grad_row<A, 3, kAdd>, true};
        case 5:
          return {filter_grad_row<A, 5, kAdd>, feature_grad_row<A, 5, kAdd>, true};
        case 7:
          return {filter_grad_row<A, 7, kAdd>, feature_grad_row<A, 7, kAdd>, true};
        default:
          break;
      }
  return {filter_grad_row_generic<A, kAdd>, feature_grad_row_generic<A, kAdd>, false};
}

}  // namespace ddfup
