// Vectors of floats in registers: loads from and stores to every element type, and transposes.

#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr long LANES = 16, REGISTERS = 32;
#elif defined(__aarch64__)
constexpr long LANES = 4, REGISTERS = 32;
#else
constexpr long LANES = 8, REGISTERS = 16;
#endif

using Vec = float __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using HalfBits = uint16_t __attribute__((vector_size(2 * LANES)));
using Loose = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using LooseHalf = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
INLINE Vec broadcast(float x) { return x - Vec{}; }
INLINE HalfBits load_bits(const void* p) { return *static_cast<const LooseHalf*>(p); }
INLINE void store_bits(void* p, HalfBits v) { *static_cast<LooseHalf*>(p) = v; }

INLINE Vec load(const bfloat16* p) { return (Vec)(__builtin_convertvector(load_bits(p), Bits) << 16); }

INLINE void store(bfloat16* p, Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest, ties to even
  store_bits(p, __builtin_convertvector(v == v ? rounded : (Bits{} + 0x7fc0), HalfBits));
}

// To [-limit, limit]; NaN stays NaN. Compilers make a comparison and a blend of each ?:.
#if defined(__AVX512F__)
INLINE Vec clamp(Vec x, float limit) {
  return (Vec)_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), (__m512)x));
}
INLINE Vec load(const float16* p) { return (Vec)_mm512_cvtph_ps((__m256i)load_bits(p)); }
INLINE void store(float16* p, Vec v) { store_bits(p, (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__)
INLINE Vec clamp(Vec x, float limit) {
  return (Vec)vmaxq_f32(vdupq_n_f32(-limit), vminq_f32(vdupq_n_f32(limit), (float32x4_t)x));
}
INLINE Vec load(const float16* p) { return (Vec)vcvt_f32_f16((float16x4_t)load_bits(p)); }
INLINE void store(float16* p, Vec v) { store_bits(p, (HalfBits)vcvt_f16_f32((float32x4_t)v)); }
#else
INLINE Vec clamp(Vec x, float limit) {
  return (Vec)_mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), (__m256)x));
}
INLINE Vec load(const float16* p) { return (Vec)_mm256_cvtph_ps((__m128i)load_bits(p)); }
INLINE void store(float16* p, Vec v) { store_bits(p, (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#endif

INLINE float lanes_sum(Vec v) {
  float sum = 0;
  for (long i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

// Lanes of a, then of b, by constant indices.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(4 * LANES)))){__VA_ARGS__})
#endif

// Exchanges the off-diagonal S x S blocks of two rows of a matrix.
template <int S, int... J>
INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const Vec low = SHUFFLE(a, b, ((J & S) ? int(LANES) + J - S : J)...);
  b = SHUFFLE(a, b, ((J & S) ? int(LANES) + J : J + S)...);
  a = low;
}

template <int S>
INLINE void exchange_all(Vec (&rows)[LANES]) {
  UNROLL for (int i = 0; i < LANES; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>{});
}

template <int S = 1>
INLINE void transpose(Vec (&rows)[LANES]) {
  exchange_all<S>(rows);
  if constexpr (2 * S < LANES) transpose<2 * S>(rows);
}

// out[j][i] = in[i][j], for multiples of LANES.
void transpose(const float* in, long in_row, float* out, long out_row, long rows, long columns) {
  for (long i = 0; i < rows; i += LANES) for (long j = 0; j < columns; j += LANES) {
    Vec block[LANES];
    UNROLL for (long k = 0; k < LANES; k++) block[k] = load(in + (i + k) * in_row + j);
    transpose(block);
    UNROLL for (long k = 0; k < LANES; k++) store(out + (j + k) * out_row + i, block[k]);
  }
}

} // namespace
