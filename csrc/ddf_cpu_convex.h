// Filters that are positive and sum to one: a 1 x 1 convolution and the softmax over the taps of every filter, in one
// pass over the pixels. Separately, what the convolution makes, 144 bytes a pixel for windows of 3 x 3, goes to memory
// and back twice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ddf_cpu_rows.h"

namespace ddfup {

// e^x for x <= 0, with a relative error of 2e-7; what is below -87 counts as -87. NaN stays NaN.
DDFUP_INLINE Vec<float> exp_not_above_zero(Vec<float> x) {
  using Floats = Vec<float>;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  // x = n log(2) + r with |r| <= log(2) / 2. Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const Floats shift = Floats{} + 12582912.0f;
  const Floats shifted = x * 1.44269504f + shift;
  const Floats n = shifted - shift;
  // log(2) in two parts, of which the product of the first with n is exact.
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // The series of e^r to r^6, its remainder spread over the interval (Cephes, expf).
  Floats series = r * 1.9875691500e-4f + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  series = series * (r * r) + r + 1.0f;
  const Bits power = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(shift) + 127;
  return series * reinterpret_cast<Floats>(power << 23);
}

class ConvexFilters {
  using Floats = Vec<float>;
  static constexpr int L = kLanes<float>, kVectors = 4;
  // Pixels of a block, whose features and logits stay in the first-level cache.
  static constexpr int kPixels = kVectors * L;
  // Pixels of a piece of work for a thread.
  static constexpr int64_t kPiece = 1024;

 public:
  // Of images of `pixels` rows of `channels` features: per filter and tap a plane of `pixels` numbers. `weight` is
  // (filters * taps, channels), `bias` (filters * taps).
  ConvexFilters(const float* in, int64_t images, int64_t pixels, int channels, const float* weight, const float* bias,
                int filters, int taps, float* out)
      : in_(in),
        weight_(weight),
        bias_(bias),
        out_(out),
        images_(images),
        pixels_(pixels),
        channels_(channels),
        filters_(filters),
        taps_(taps) {}

  template <typename Parallel>
  void run(const Parallel& parallel) const {
    const int64_t pieces = (pixels_ + kPiece - 1) / kPiece;
    parallel(images_ * pieces, [&](int64_t first, int64_t last) {
      std::vector<float> features(channels_ * kPixels), logits(taps_ * kPixels);
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = i / pieces, begin = i % pieces * kPiece, end = std::min(pixels_, begin + kPiece);
        for (int64_t pixel = begin; pixel < end; pixel += kPixels)
          block(image, pixel, static_cast<int>(std::min<int64_t>(kPixels, end - pixel)), features.data(),
                logits.data());
      }
    });
  }

 private:
  void block(int64_t image, int64_t pixel, int count, float* features, float* logits) const {
    const float* const in = in_ + (image * pixels_ + pixel) * channels_;
    for (int i = 0; i < kPixels; ++i)
      for (int c = 0; c < channels_; ++c)
        // Beyond the last pixel zeros, whose softmax is not stored.
        features[c * kPixels + i] = i < count ? in[i * channels_ + c] : 0.0f;
    for (int filter = 0; filter < filters_; ++filter) {
      int tap = 0;
      for (; tap + 3 <= taps_; tap += 3) project<3>(features, filter * taps_ + tap, logits + tap * kPixels);
      for (; tap < taps_; ++tap) project<1>(features, filter * taps_ + tap, logits + tap * kPixels);
      float* const out = out_ + (image * filters_ + filter) * taps_ * pixels_ + pixel;
      for (int v = 0; v * L < count; ++v) softmax(logits + v * L, out + v * L, std::min(L, count - v * L));
    }
  }

  // The logits of T taps for all pixels of a block.
  template <int T>
  DDFUP_INLINE void project(const float* features, int row, float* logits) const {
    Floats sums[T][kVectors];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < kVectors; ++v) sums[t][v] = Floats{} + bias_[row + t];
    for (int c = 0; c < channels_; ++c) {
      Floats x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[v] = load(features + c * kPixels + v * L);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[t][v] += x[v] * weight_[(row + t) * channels_ + c];
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < kVectors; ++v) store(logits + t * kPixels + v * L, sums[t][v]);
  }

  // Of a vector of pixels; `count` of them are stored.
  void softmax(float* logits, float* out, int count) const {
    Floats most = load(logits);
    for (int t = 1; t < taps_; ++t) {
      const Floats x = load(logits + t * kPixels);
      most = x > most ? x : most;
    }
    Floats sum{};
    for (int t = 0; t < taps_; ++t) {
      const Floats part = exp_not_above_zero(load(logits + t * kPixels) - most);
      store(logits + t * kPixels, part);
      sum += part;
    }
    const Floats scale = 1.0f / sum;
    for (int t = 0; t < taps_; ++t) {
      const Floats share = load(logits + t * kPixels) * scale;
      if (count == L)
        store(out + t * pixels_, share);
      else
        std::memcpy(out + t * pixels_, &share, count * sizeof(float));
    }
  }

  const float *in_, *weight_, *bias_;
  float* out_;
  int64_t images_, pixels_;
  int channels_, filters_, taps_;
};

}  // namespace ddfup
