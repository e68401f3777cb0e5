// Matrices of bfloat16 in pairs: two neighbours along the dimension that a product sums over, side by side.
//
// "Rows of pairs" hold [n][w] as [n][w / 2]; "pairs of rows" hold it as [n / 2][w]. The first is the left operand of
// a product over w; transposed, the right operand of one over w. The second is the right operand of a product over n;
// transposed, the left operand of one over n. Everything is padded with zeros to whole tiles of 16 pairs.

#pragma once

#include "call.h"
#include "memory.h"

namespace {

struct Pair { bfloat16 first, second; };

constexpr long PAIRS = 16, DEPTH = 2 * PAIRS; // of a vector: the depth of a tile

INLINE __m512i load(const Pair* p) { return _mm512_loadu_si512(p); }
INLINE void store(Pair* p, __m512i v) { _mm512_storeu_si512(p, v); }

// 32 numbers, rounded to nearest; the first is the vector that comes first.
INLINE __m512i round_to_pairs(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// Two rows of pairs of 32 columns become pairs of rows of columns 0..15 and 16..31.
INLINE void pair_up(__m512i upper, __m512i lower, Pair* out) {
  const __m512i low_halves = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                              6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high_halves = _mm512_add_epi16(low_halves, _mm512_set1_epi16(16));
  store(out, _mm512_permutex2var_epi16(upper, low_halves, lower));
  store(out + PAIRS, _mm512_permutex2var_epi16(upper, high_halves, lower));
}

INLINE float widened(bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

INLINE bfloat16 rounded(float x) { return {(uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0)}; }

Pair* take_pairs(Arena& arena, long pairs) { return reinterpret_cast<Pair*>(arena.take(pairs)); }

// `tokens` rows of `width` elements become rows of pairs, zero up to a whole vector.
void read_pairs(const bfloat16* in, long in_row, Pair* out, long out_row, long tokens, long width) {
  for (long n = 0; n < tokens; n++)
    for (long e = 0; e < width; e += DEPTH) {
      const __mmask32 there = width - e < DEPTH ? (1u << (width - e)) - 1 : ~0u;
      store(out + n * out_row + e / 2, _mm512_maskz_loadu_epi16(there, in + n * in_row + e));
    }
}

// What bfloat16 holds of a float, and the rest: rounded to bfloat16 in turn, the two have 16 bits between them.
INLINE Vec high_part(Vec v) { return (Vec)((Bits)v & 0xffff0000); }
INLINE Vec low_part(Vec v) { return v - high_part(v); }

// Floats [rows][width], a multiple of 16 wide, become rows of pairs, zero up to a whole vector: the high parts at
// `out`, the low parts `low` pairs further. Unless SPLIT, the first are the floats, rounded, as no product takes the rest.
template <bool SPLIT = true>
void split_rows(const float* in, long in_row, Pair* out, long out_row, long low, long rows, long width) {
  for (long n = 0; n < rows; n++)
    for (long e = 0; e < width; e += DEPTH) {
      const float* from = in + n * in_row + e;
      const Vec first = load(from), second = width - e > LANES ? load(from + LANES) : Vec{};
      Pair* to = out + n * out_row + e / 2;
      store(to, SPLIT ? round_to_pairs(high_part(first), high_part(second)) : round_to_pairs(first, second));
      store(to + low, round_to_pairs(low_part(first), low_part(second)));
    }
}

// Floats [rows][unit_step] become rows of pairs twice as wide: high parts, then low parts; SPLIT as in split_rows.
template <bool SPLIT>
void split_units(const float* in, Pair* out, long rows, long unit_step) {
  if (unit_step == DEPTH) return split_rows<SPLIT>(in, DEPTH, out, DEPTH, PAIRS, rows, DEPTH);
  for (long n = 0; n < rows; n++) {
    const Vec v = load(in + n * LANES);
    store(out + n * PAIRS, round_to_pairs(SPLIT ? high_part(v) : v, low_part(v)));
  }
}

// Rows of pairs [rows][columns / 2] become pairs of rows [rows / 2][columns].
void pair_rows(const Pair* in, long in_row, Pair* out, long out_row, long rows, long columns) {
  for (long n = 0; n < rows; n += 2)
    for (long e = 0; e < columns; e += DEPTH) {
      const Pair* from = in + n * in_row + e / 2;
      pair_up(load(from), load(from + in_row), out + n / 2 * out_row + e);
    }
}

void transpose(const Pair* in, long in_row, Pair* out, long out_row, long rows, long columns) {
  transpose(reinterpret_cast<const float*>(in), in_row, reinterpret_cast<float*>(out), out_row, rows, columns);
}

// Like write_rows, by the instruction that rounds.
void write_rounded(const float* in, long in_row, bfloat16* out, long out_row, long tokens, long width) {
  for (long n = 0; n < tokens; n++)
    for (long e = 0; e < width; e += DEPTH) {
      const __mmask32 there = width - e < DEPTH ? (1u << (width - e)) - 1 : ~0u;
      const float* from = in + n * in_row + e;
      _mm512_mask_storeu_epi16(out + n * out_row + e, there, round_to_pairs(load(from), load(from + LANES)));
    }
}

// How a call is padded for products of pairs.
struct PairShape : Sizes {
  long token_step; // N, padded
  long width_step; // d, padded
  long unit_step;  // r, padded as columns; twice as many are the depth of two parts
  long token_pairs, width_pairs, unit_pairs; // of which products are summed, not padded

  explicit PairShape(const Call& c)
      : Sizes(c), token_step(round_up(tokens, DEPTH)), width_step(round_up(width, DEPTH)),
        unit_step(round_up(rank, LANES)), token_pairs((tokens + 1) / 2), width_pairs((width + 1) / 2),
        unit_pairs((rank + 1) / 2) {}
};

// W of a head in two parts, token n and unit p at n * token + p * unit of `out`, the low ones `low` elements further.
void split_projector(const Call& c, const PairShape& s, long h, Pair* out, long token, long unit, long low) {
  for (long n = 0; n < s.tokens; n++)
    for (long p = 0; p < s.rank; p++) {
      const float x = c.projector[(h * s.tokens + n) * s.rank + p];
      bfloat16* at = &out->first + n * token + p * unit;
      at[0] = rounded(x);
      at[low] = rounded(x - widened(at[0]));
    }
}

// The same as rows of pairs of W^T, [unit][N / 2], the high parts and then the low ones.
void split_projector_columns(const Call& c, const PairShape& s, long h, Pair* out) {
  split_projector(c, s, h, out, 1, s.token_step, s.unit_step * s.token_step);
}

} // namespace
