// Row kernels of the CPU backward: vectors along x for one channel, and the choice among them.
#pragma once

#include "ddf.h"
#include "ddf_cpu_rows.h"

namespace ddfup {

constexpr int64_t kBackwardColumns = 320;
constexpr int kBackwardPitch = 336;

// Gradients of both filters along one grid row of one channel and sub-position.
template <typename A>
struct FilterGradRow {
  const A* grad;
  const A* const* windows;  // one pointer per tap
  const A* spatial;         // [K * K][pitch]
  const A* channel;         // K * K numbers
  A* grad_spatial;          // [K * K][pitch], added to
  Vec<A>* grad_channel;     // K * K partial sums, added to
  int64_t taps, pitch, count;
};

// U tap rows of V taps at a time keep their sums in registers.
template <typename A, int K, bool kAdd, bool kChannel, bool kSpatial>
void filter_grad_row(const FilterGradRow<A>& row) {
  constexpr int P = kBackwardPitch, U = K <= 3 ? K : 1;
  for (int first = 0; first < K; first += U) {
    const A* __restrict__ grad = row.grad;
    const A* __restrict__ window = row.windows[first * K];
    const A* __restrict__ spatial = row.spatial + first * K * P;
    A* __restrict__ grad_spatial = row.grad_spatial + first * K * P;
    A channel[U * K];
    Vec<A> sums[U * K];
    for (int k = 0; k < U * K; ++k) {
      channel[k] = row.channel[first * K + k];
      if constexpr (kChannel) sums[k] = row.grad_channel[first * K + k];
    }
    for (int64_t x = 0; x < row.count; x += kLanes<A>) {
      const Vec<A> g = load(grad + x);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
        for (int v = 0; v < K; ++v) {
          const int k = u * K + v;
          const Vec<A> product = g * load(window + x + u * P + v);
          if constexpr (kChannel) {
            if constexpr (kAdd)
              sums[k] += product;
            else
              sums[k] += product * load(spatial + x + k * P);
          }
          if constexpr (kSpatial) {
            A* to = grad_spatial + x + k * P;
            if constexpr (kAdd)
              store(to, load(to) + product);
            else
              store(to, load(to) + product * channel[k]);
          }
        }
      }
    }
    if constexpr (kChannel)
      for (int k = 0; k < U * K; ++k) row.grad_channel[first * K + k] = sums[k];
  }
}

template <typename A, bool kAdd, bool kChannel, bool kSpatial>
void filter_grad_row_generic(const FilterGradRow<A>& row) {
  for (int64_t k = 0; k < row.taps; ++k) {
    const A* __restrict__ window = row.windows[k];
    const A* __restrict__ spatial = row.spatial + k * row.pitch;
    A* __restrict__ grad_spatial = row.grad_spatial + k * row.pitch;
    const A channel = row.channel[k];
    Vec<A> sum = {};
    for (int64_t x = 0; x < row.count; x += kLanes<A>) {
      const Vec<A> product = load(row.grad + x) * load(window + x);
      if constexpr (kChannel) sum += kAdd ? product : product * load(spatial + x);
      if constexpr (kSpatial) store(grad_spatial + x, load(grad_spatial + x) + (kAdd ? product : product * channel));
    }
    if constexpr (kChannel) row.grad_channel[k] += sum;
  }
}

// Gradient of one row of features, gathered from every tap that saw it: sum of grad * mix, added to `out`.
template <typename A>
struct FeatureGradRow {
  const A* grad;          // unit kernel: seen by the first tap
  const A* spatial;       // unit kernel: filter of the first tap there
  int64_t spatial_row;    // unit kernel: distance of grid rows in `spatial`
  const A* const* grads;  // generic kernel: one pointer per tap
  const A* const* spatials;
  const A* channel;  // K * K numbers; generic kernel: of the listed taps
  A* out;
  int64_t taps, count;
};

template <typename A, int K, bool kAdd>
void feature_grad_row(const FeatureGradRow<A>& row) {
  constexpr int P = kBackwardPitch;
  A channel[K * K];
  for (int k = 0; k < K * K; ++k) channel[k] = row.channel[k];
  const A* __restrict__ grad = row.grad;
  A* __restrict__ out = row.out;
  const A* __restrict__ spatial[K];
  for (int u = 0; u < K; ++u) spatial[u] = row.spatial - u * row.spatial_row;
  for (int64_t x = 0; x < row.count; x += kLanes<A>) {
    Vec<A> sum = load(out + x);
#pragma GCC unroll 8
    for (int u = 0; u < K; ++u) {
#pragma GCC unroll 8
      for (int v = 0; v < K; ++v) {
        const Vec<A> g = load(grad + x - u * P - v);
        const Vec<A> weight = load(spatial[u] + x + (u * K + v) * P - v);
        if constexpr (kAdd)
          sum += (weight + channel[u * K + v]) * g;
        else
          sum += (g * channel[u * K + v]) * weight;
      }
    }
    store(out + x, sum);
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

template <typename A, bool kAdd, bool kChannel, bool kSpatial>
BackwardRows<A> backward_rows(const Problem& p) {
  if (p.stride == 1 && p.dilation == 1) {
    switch (p.kernel_size) {
      case 1:
        return {filter_grad_row<A, 1, kAdd, kChannel, kSpatial>, feature_grad_row<A, 1, kAdd>, true};
      case 3:
        return {filter_grad_row<A, 3, kAdd, kChannel, kSpatial>, feature_grad_row<A, 3, kAdd>, true};
      case 5:
        return {filter_grad_row<A, 5, kAdd, kChannel, kSpatial>, feature_grad_row<A, 5, kAdd>, true};
      case 7:
        return {filter_grad_row<A, 7, kAdd, kChannel, kSpatial>, feature_grad_row<A, 7, kAdd>, true};
      default:
        break;
    }
  }
  return {filter_grad_row_generic<A, kAdd, kChannel, kSpatial>, feature_grad_row_generic<A, kAdd>, false};
}

template <typename A, bool kAdd>
BackwardRows<A> backward_rows(const Problem& p, bool channel, bool spatial) {
  if (channel && spatial) return backward_rows<A, kAdd, true, true>(p);
  return channel ? backward_rows<A, kAdd, true, false>(p) : backward_rows<A, kAdd, false, true>(p);
}

}  // namespace ddfup
