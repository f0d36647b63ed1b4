// Layer normalisation of short rows: what a network does to the channels of every pixel where they are last in memory.
#pragma once

#include <algorithm>
#include <cmath>

#include "ddf_cpu_rows.h"

namespace ddfup {

// Normalises rows of `channels` numbers, (row - mean) / sqrt(variance + eps) * weight + bias, as many of them at a time
// as a vector has lanes, so that the sums of all are made by one transposition.
class RowNorm {
  static constexpr int kRows = kLanes<float>;
  using Floats = Vec<float>;
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));

 public:
  RowNorm(const float* in, int64_t rows, int64_t channels, const float* weight, const float* bias, float eps, float* out)
      : in_(in),
        in_end_(in + rows * channels),
        out_(out),
        weight_(weight),
        bias_(bias),
        rows_(rows),
        channels_(channels),
        rest_(static_cast<int>(channels % kRows)),
        eps_(eps) {
    for (int lane = 0; lane < kRows; ++lane) mask_[lane] = lane < rest_ ? -1 : 0;
    if (rest_ > 0) {
      const int64_t whole = channels - rest_;
      std::memcpy(&weight_rest_, weight + whole, rest_ * sizeof(float));
      std::memcpy(&bias_rest_, bias + whole, rest_ * sizeof(float));
    }
  }

  template <typename Parallel>
  void run(const Parallel& parallel) const {
    // Enough work to be worth a thread's start, and little enough for the caches.
    const int64_t each = std::max<int64_t>(kRows, (1 << 14) / channels_ / kRows * kRows);
    parallel((rows_ + each - 1) / each, [&](int64_t first, int64_t last) {
      const int64_t end = std::min(rows_, last * each);
      float* const out_end = out_ + end * channels_;
      for (int64_t row = first * each; row < end; row += kRows)
        block(row, static_cast<int>(std::min<int64_t>(kRows, end - row)), out_end);
    });
  }

 private:
  // The last lanes of a row, zeros beyond it; reads what follows the row where there is something.
  DDFUP_INLINE Floats load_rest(const float* from) const {
    Floats value{};
    if (in_end_ - from >= kRows)
      value = load(from);
    else
      std::memcpy(&value, from, rest_ * sizeof(float));
    return reinterpret_cast<Floats>(reinterpret_cast<Bits>(value) & mask_);
  }

  // Rows are written upwards, so what goes beyond a row is overwritten by the next; not so at the end of the part.
  DDFUP_INLINE void store_rest(float* to, Floats value, const float* end) const {
    if (end - to >= kRows)
      store(to, value);
    else
      std::memcpy(to, &value, rest_ * sizeof(float));
  }

  // Lane r of the result is the sum of the lanes of parts[r].
  DDFUP_INLINE static Floats sums(Floats (&parts)[kRows]) {
    Floats total{};
#ifdef DDFUP_HAS_SHUFFLE
    transpose_square<float>(parts);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) total += parts[i];
#else
    for (int i = 0; i < kRows; ++i) total[i] = lane_sum<float>(parts[i]);
#endif
    return total;
  }

  void block(int64_t row, int count, const float* out_end) const {
    const float* const in = in_ + row * channels_;
    float* const out = out_ + row * channels_;
    const int64_t whole = channels_ - rest_;
    const float share = 1.0f / static_cast<float>(channels_);

    Floats parts[kRows];
    for (int r = 0; r < kRows; ++r) parts[r] = Floats{};
    for (int r = 0; r < count; ++r) {
      const float* const x = in + r * channels_;
      for (int64_t c = 0; c < whole; c += kRows) parts[r] += load(x + c);
      if (rest_ > 0) parts[r] += load_rest(x + whole);
    }
    const Floats mean = sums(parts) * share;

    for (int r = 0; r < kRows; ++r) parts[r] = Floats{};
    for (int r = 0; r < count; ++r) {
      const float* const x = in + r * channels_;
      for (int64_t c = 0; c < whole; c += kRows) {
        const Floats centred = load(x + c) - mean[r];
        parts[r] += centred * centred;
      }
      if (rest_ > 0) {
        const Floats centred = load_rest(x + whole) - mean[r];
        // The lanes beyond the row hold -mean here.
        const Floats kept = reinterpret_cast<Floats>(reinterpret_cast<Bits>(centred) & mask_);
        parts[r] += kept * kept;
      }
    }
    const Floats variance = sums(parts) * share;

    for (int r = 0; r < count; ++r) {
      const float scale = 1.0f / std::sqrt(variance[r] + eps_);
      const float* const x = in + r * channels_;
      float* const y = out + r * channels_;
      for (int64_t c = 0; c < whole; c += kRows)
        store(y + c, (load(x + c) - mean[r]) * scale * load(weight_ + c) + load(bias_ + c));
      if (rest_ > 0) {
        const Floats last = (load_rest(x + whole) - mean[r]) * scale * weight_rest_ + bias_rest_;
        store_rest(y + whole, last, out_end);
      }
    }
  }

  const float* in_;
  const float* in_end_;
  float* out_;
  const float* weight_;
  const float* bias_;
  int64_t rows_, channels_;
  int rest_;
  float eps_;
  Bits mask_;
  Floats weight_rest_{}, bias_rest_{};
};

}  // namespace ddfup
