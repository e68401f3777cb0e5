// Forward for bfloat16: products of pairs; scores, harmonics and sums in float32. Features and coefficients are
// rounded; H, U and W are taken in two parts, as their products are small and their rounding would be felt most.

#pragma once

#include <algorithm>

#include "pair_harmonics.h"
#include "pair_products.h"

namespace {

// A block of a tile's features, 32 queries by 32 keys, and a step that keeps them from sharing cache sets.
constexpr long FEATURE_STEP = 33 * PAIRS;
constexpr long KEY_BLOCKS = 2; // of a tile of 32 queries

struct PairForwardScratch {
  Pair *rows, *key_columns, *query, *value, *narrow_rows, *narrow_pairs, *features, *hidden_pairs;
  float *narrow, *scores, *hidden, *out;
  Tiles tiles;

  PairForwardScratch(const PairShape& s, Arena& arena) {
    const long wide = s.token_step * s.width_step / 2;
    rows = query = take_pairs(arena, wide);
    key_columns = value = take_pairs(arena, wide);
    narrow = arena.take(DEPTH * s.width_step);
    narrow_rows = take_pairs(arena, 2 * DEPTH * s.width_step / 2);
    narrow_pairs = take_pairs(arena, 2 * DEPTH * s.width_step / 2);
    features = take_pairs(arena, s.features() * KEY_BLOCKS * FEATURE_STEP);
    scores = arena.take(DEPTH * DEPTH);
    hidden = arena.take(DEPTH * s.unit_step);
    hidden_pairs = take_pairs(arena, 2 * DEPTH * PAIRS);
    out = arena.take(DEPTH * s.width_step);
  }
};

// The features of 32 x 32 scores as rows of pairs. Beyond WHOLE columns, of which 16 are keys, the features of the
// first 16 stand again: their coefficients are zero.
template <bool WHOLE, long GRID>
void fill_pair_features(const float* scores, Pair* features, float half_turn, long rows, long grid) {
  const long count = GRID ? GRID : grid;
  for (long i = 0; i < rows; i++) {
    const float* from = scores + i * DEPTH;
    const Harmonics<GRID> first(load(from) * half_turn, grid), second(load(from + WHOLE * LANES) * half_turn, grid);
    UNROLL for (long m = 1; m <= count; m++) {
      Pair* at = features + (m - 1) * FEATURE_STEP + i * PAIRS;
      store(at, round_to_pairs(first.cosine[m], second.cosine[m]));
      store(at + count * FEATURE_STEP, round_to_pairs(first.sine[m], second.sine[m]));
    }
  }
}

// C of a head as pairs of keys, [block of 32 keys][feature][pair][unit]: the order in which a tile's features come.
void pack_pairs_for_forward(const Call& c, const PairShape& s, long h, Pair* out) {
  bfloat16* at = &out->first;
  for (long q = 0; q < s.tokens; q++)
    for (long p = 0; p < s.rank; p++)
      for (long m = 0; m < s.grid; m++) {
        const long from = s.coefficient(h, p, q, m), block = q / DEPTH * s.features() * PAIRS, pair = q % DEPTH / 2;
        at[((block + m * PAIRS + pair) * s.unit_step + p) * 2 + q % 2] = rounded(c.cosines[from]);
        at[((block + (s.grid + m) * PAIRS + pair) * s.unit_step + p) * 2 + q % 2] = rounded(c.sines[from]);
      }
}

// H of 32 queries or fewer, from token `first` on.
void sum_hidden(const PairShape& s, const PairForwardScratch& w, const Pair* coef, long first, long rows) {
  const float half_turn = s.scale * 0x1.45f306p-2f; // scores in units of pi
  clear(w.hidden, DEPTH * s.unit_step);
  for (long k = 0; k < s.tokens; k += KEY_BLOCKS * DEPTH) {
    const long blocks = std::min(KEY_BLOCKS, (s.tokens - k + DEPTH - 1) / DEPTH);
    for (long block = 0; block < blocks; block++) {
      const long key = k + block * DEPTH, keys = std::min(DEPTH, s.tokens - key);
      multiply<false>(Operand::left(w.query + first * s.width_step / 2, s.width_step / 2),
                      Operand::right(w.key_columns + key, s.token_step), Result::rows(w.scores, DEPTH), rows, keys,
                      s.width_pairs);
      Pair* features = w.features + block * s.features() * FEATURE_STEP;
      for_grid(s.grid, [&](auto grid) {
        if (keys > 16) fill_pair_features<true, grid>(w.scores, features, half_turn, rows, s.grid);
        else fill_pair_features<false, grid>(w.scores, features, half_turn, rows, s.grid);
      });
    }
    const long in_block = blocks == 1 ? std::min(PAIRS, s.token_pairs - k / 2) : PAIRS;
    multiply<true>({w.features, PAIRS, 16 * PAIRS, FEATURE_STEP},
                   Operand::right(coef + k / DEPTH * s.features() * PAIRS * s.unit_step, s.unit_step),
                   Result::rows(w.hidden, s.unit_step), rows, s.unit_step, blocks * s.features() * in_block, in_block);
  }
}

struct PairForward {
  using Shape = PairShape;
  using Scratch = PairForwardScratch;

  static long coefficients(const Shape& s) { return s.token_step / 2 * s.features() * s.unit_step; }
  static long projector(const Shape& s) { return s.unit_step * s.token_step; }

  static void pack(const Call& c, const Shape& s, long h, float* coef, float* projector) {
    pack_pairs_for_forward(c, s, h, reinterpret_cast<Pair*>(coef));
    split_projector_columns(c, s, h, reinterpret_cast<Pair*>(projector));
  }

  static void run(const Call& c, const Shape& s, const Scratch& w, const float* coef, const float* projector, long b,
                  long h) {
    const long width_pairs = s.width_step / 2;
    // U = W^T V.
    read_pairs(item<bfloat16>(c.value, b, h), c.value.token, w.rows, width_pairs, s.tokens, s.width);
    pair_rows(w.rows, width_pairs, w.value, s.width_step, s.token_step, s.width_step);
    multiply_parts<false>(Operand::left(reinterpret_cast<const Pair*>(projector), s.token_step / 2),
                          s.unit_step * s.token_step / 2, Operand::right(w.value, s.width_step), 0,
                          Result::rows(w.narrow, s.width_step), s.unit_step, s.width_step, s.token_pairs);
    split_rows(w.narrow, s.width_step, w.narrow_rows, width_pairs, DEPTH * width_pairs, s.unit_step, s.width_step);
    pair_rows(w.narrow_rows, width_pairs, w.narrow_pairs, s.width_step, 2 * DEPTH, s.width_step);

    read_pairs(item<bfloat16>(c.key, b, h), c.key.token, w.rows, width_pairs, s.tokens, s.width);
    transpose(w.rows, width_pairs, w.key_columns, s.token_step, s.token_step, width_pairs);
    read_pairs(item<bfloat16>(c.query, b, h), c.query.token, w.query, width_pairs, s.tokens, s.width);
    float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
    for (long first = 0; first < s.tokens; first += DEPTH) {
      const long rows = std::min(DEPTH, s.tokens - first);
      sum_hidden(s, w, reinterpret_cast<const Pair*>(coef), first, rows);
      for (long n = 0; n < rows; n++)
        std::memcpy(hidden + (first + n) * s.rank, w.hidden + n * s.unit_step, s.rank * sizeof(float));
      // O = H U.
      split_rows(w.hidden, s.unit_step, w.hidden_pairs, PAIRS, DEPTH * PAIRS, rows, s.unit_step);
      multiply_parts<false>(Operand::left(w.hidden_pairs, PAIRS), DEPTH * PAIRS,
                            Operand::right(w.narrow_pairs, s.width_step), PAIRS * s.width_step,
                            Result::rows(w.out, s.width_step), rows, s.width_step, s.unit_pairs);
      write_rounded(w.out, s.width_step, item<bfloat16>(c.output, b, h) + first * c.output.token, c.output.token, rows,
                    s.width);
    }
  }
};

} // namespace
