// Rows of numbers for the CPU kernels: vectors of the machine's width, conversion of half types, copies with a step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ddfup {

#if defined(__GNUC__) && !defined(__clang__)
#define DDFUP_IVDEP _Pragma("GCC ivdep")
#elif defined(__clang__)
#define DDFUP_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define DDFUP_IVDEP
#endif
#define DDFUP_INLINE inline __attribute__((always_inline))
#define DDFUP_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A SIMD register as the GCC and Clang vector extension: arithmetic works lane by lane, scalars broadcast.
template <typename A>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorOf<A>::Type;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
DDFUP_INLINE Vec<A> load(const A* from) {
  Vec<A> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename A>
DDFUP_INLINE void store(A* to, Vec<A> value) {
  std::memcpy(to, &value, sizeof(value));
}

// Stores a vector, on a multiple of its size, past the caches: lines that are written whole need not be read first.
template <typename A>
DDFUP_INLINE void stream(A* to, Vec<A> value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#else
  store(to, value);
#endif
}

// To be called by a thread that has streamed, before another may read.
DDFUP_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename A>
DDFUP_INLINE bool can_stream(const A* to) {
  return reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
}

template <typename A>
DDFUP_INLINE A lane_sum(Vec<A> value) {
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += value[lane];
  return sum;
}

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define DDFUP_HAS_SHUFFLE 1
template <typename A, size_t... I>
DDFUP_INLINE Vec<A> interleave_low(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? kLanes<A> + I / 2 : I / 2)...);
}
template <typename A, size_t... I>
DDFUP_INLINE Vec<A> interleave_high(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  constexpr size_t half = sizeof...(I) / 2;
  return __builtin_shufflevector(a, b, (I % 2 ? kLanes<A> + half + I / 2 : half + I / 2)...);
}

// Transposes a square of numbers in registers: log2(lanes) perfect shuffles of its rows.
template <typename A>
DDFUP_INLINE void transpose_square(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int L = kLanes<A>;
  constexpr auto lanes = std::make_index_sequence<L>();
#pragma GCC unroll 4
  for (int done = 1; done < L; done *= 2) {
    Vec<A> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave_low<A>(rows[i], rows[i + L / 2], lanes);
      next[2 * i + 1] = interleave_high<A>(rows[i], rows[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}
#endif

#if defined(DDFUP_HAS_SHUFFLE)
template <int V, typename A, size_t... I>
DDFUP_INLINE Vec<A> shuffled(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (V + I)...);
}
#endif

// The vector that begins at lane V of two neighbouring ones.
template <int V, typename A>
DDFUP_INLINE Vec<A> joined_at(Vec<A> here, [[maybe_unused]] Vec<A> next) {
  static_assert(V >= 0 && V <= kLanes<A>);
  if constexpr (V == 0) {
    return here;
  } else if constexpr (V == kLanes<A>) {
    return next;
  } else {
#if defined(DDFUP_HAS_SHUFFLE)
    return shuffled<V, A>(here, next, std::make_index_sequence<kLanes<A>>());
#else
    A both[2 * kLanes<A>];
    store(both, here);
    store(both + kLanes<A>, next);
    return load(both + V);
#endif
  }
}

// The vector V numbers on from `from`, where the vectors `here` and, next to it, `next` are. A load there would cross
// cache lines, which takes as long as two.
template <int V, typename A>
DDFUP_INLINE Vec<A> shifted([[maybe_unused]] const A* from, Vec<A> here, [[maybe_unused]] Vec<A> next) {
#if defined(DDFUP_HAS_SHUFFLE)
  if constexpr (V < kLanes<A>)
    return joined_at<V, A>(here, next);
  else
#endif
    return load(from + V);
}

// Calls with std::integral_constant<int, 0>, ..., <int, N - 1>.
template <typename Run, int... I>
DDFUP_INLINE void each_tap(const Run& run, std::integer_sequence<int, I...>) {
  (run(std::integral_constant<int, I>()), ...);
}
template <int N, typename Run>
DDFUP_INLINE void each_tap(const Run& run) {
  each_tap(run, std::make_integer_sequence<int, N>());
}

// Storage of the half types; sums are never made in them.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type sums are made in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

DDFUP_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

DDFUP_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DDFUP_INLINE float widen(float value) { return value; }
DDFUP_INLINE double widen(double value) { return value; }
DDFUP_INLINE float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
DDFUP_INLINE float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return from_bits(sign | (rest + 0x70000000));  // infinity and NaN
  // The product moves the exponent from half's bias to float's, and makes subnormal numbers normal.
  return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));
}

DDFUP_INLINE void narrow(float value, float& to) { to = value; }
DDFUP_INLINE void narrow(double value, double& to) { to = value; }
DDFUP_INLINE void narrow(float value, BFloat16& to) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
DDFUP_INLINE void narrow(float value, Float16& to) {
  const uint32_t bits = to_bits(value);
  const uint32_t size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (size >= 0x477ff000) {
    half = 0x7c00;  // from 65520 up everything rounds to infinity
  } else if (size < 0x38800000) {
    half = to_bits(from_bits(size) + 0.5f) - 0x3f000000;  // subnormal: the adder rounds to the last bit of a half
  } else {
    half = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

// Copies short runs without the cost of a library call; the last vector overlaps the one before.
template <typename A>
DDFUP_INLINE void copy_run(const A* __restrict__ from, A* __restrict__ to, int64_t count) {
  constexpr int64_t L = kLanes<A>;
  if (count < L) {
    for (int64_t x = 0; x < count; ++x) to[x] = from[x];
    return;
  }
  for (int64_t x = 0; x + L <= count; x += L) store(to + x, load(from + x));
  store(to + count - L, load(from + count - L));
}

#if defined(__AVX512F__)
DDFUP_INLINE __m512 widen_vector(__m256i halves, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
DDFUP_INLINE __m512 widen_vector(__m256i halves, Float16) { return _mm512_cvtph_ps(halves); }

DDFUP_INLINE __m256i narrow_vector(__m512 value, BFloat16) {
  const __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}
DDFUP_INLINE __m256i narrow_vector(__m512 value, Float16) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

// Wide numbers from `count` stored ones that lie `step` apart.
template <typename T, typename A>
DDFUP_INLINE void load_run(const T* __restrict__ from, int64_t step, A* __restrict__ to, int64_t count) {
  int64_t done = 0;
  if (step == 1) {
    if constexpr (std::is_same_v<T, A>) {
      copy_run(from, to, count);
      return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
      for (; done + 16 <= count; done += 16) {
        __m256i packed;
        std::memcpy(&packed, from + done, sizeof(packed));
        _mm512_storeu_ps(to + done, widen_vector(packed, T{}));
      }
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<T, Float16>) {
      for (; done + 8 <= count; done += 8) {
        __m128i packed;
        std::memcpy(&packed, from + done, sizeof(packed));
        _mm256_storeu_ps(to + done, _mm256_cvtph_ps(packed));
      }
    }
#endif
    DDFUP_IVDEP
    for (int64_t x = done; x < count; ++x) to[x] = widen(from[x]);
  } else if (step == 2) {
    DDFUP_IVDEP
    for (int64_t x = 0; x < count; ++x) to[x] = widen(from[2 * x]);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = widen(from[step * x]);
  }
}

// Stored numbers, `step` apart, from `count` wide ones.
template <typename T, typename A>
DDFUP_INLINE void store_run(const A* __restrict__ from, T* __restrict__ to, int64_t step, int64_t count) {
  int64_t done = 0;
  if (step == 1) {
    if constexpr (std::is_same_v<T, A>) {
      copy_run(from, to, count);
      return;
    }
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
      for (; done + 16 <= count; done += 16) {
        const __m256i packed = narrow_vector(_mm512_loadu_ps(from + done), T{});
        std::memcpy(to + done, &packed, sizeof(packed));
      }
    }
#elif defined(__F16C__)
    if constexpr (std::is_same_v<T, Float16>) {
      for (; done + 8 <= count; done += 8) {
        const __m128i packed =
            _mm256_cvtps_ph(_mm256_loadu_ps(from + done), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(to + done, &packed, sizeof(packed));
      }
    }
#endif
    DDFUP_IVDEP
    for (int64_t x = done; x < count; ++x) narrow(from[x], to[x]);
  } else {
    for (int64_t x = 0; x < count; ++x) narrow(from[x], to[x * step]);
  }
}

// The same for consecutive numbers, past the caches.
template <typename T, typename A>
DDFUP_INLINE void stream_run(const A* from, T* to, int64_t count) {
  constexpr int64_t kPiece = 256, L = kVectorBytes / static_cast<int64_t>(sizeof(T));
  T stored[kPiece];
  for (int64_t done = 0; done < count; done += kPiece) {
    const int64_t piece = std::min(kPiece, count - done);
    const T* numbers = stored;
    if constexpr (std::is_same_v<T, A>)
      numbers = from + done;
    else
      store_run(from + done, stored, 1, piece);
    T* const target = to + done;
    int64_t x = 0;
    for (; x < piece && !can_stream(target + x); ++x) target[x] = numbers[x];
    for (; x + L <= piece; x += L) {
      typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes)));
      Bytes bytes;
      std::memcpy(&bytes, numbers + x, sizeof(bytes));
      stream(reinterpret_cast<uint8_t*>(target + x), bytes);
    }
    for (; x < piece; ++x) target[x] = numbers[x];
  }
}

template <typename A>
DDFUP_INLINE void fill_run(A* to, A value, int64_t count) {
  for (int64_t x = 0; x < count; ++x) to[x] = value;
}

}  // namespace ddfup
