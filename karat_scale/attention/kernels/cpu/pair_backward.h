// Backward for bfloat16: products of pairs; scores, harmonics and sums in float32. Features, slopes and dA are rounded
// as operands of products; H, U, W and their gradients are taken in two parts.
//
// Everything is had transposed, keys by queries, for a chunk of queries after the other: the features are then the
// left operand of the gradient of C as they come, dA that of dK, and its pairs of rows the right one of dQ transposed.

#pragma once

#include <algorithm>

#include "pair_harmonics.h"
#include "pair_output.h"

namespace {

// The slopes of a head as rows of pairs [feature][token][unit_step], for the high and the low parts of dH, times the
// scale that dA is to be multiplied by: phi' = sum_m (m b_m) cos(m x) - (m a_m) sin(m x).
void pack_pairs_for_backward(const Call& c, const PairShape& s, long h, Pair* out) {
  bfloat16* at = &out->first;
  for (long q = 0; q < s.tokens; q++)
    for (long p = 0; p < s.rank; p++)
      for (long m = 0; m < s.grid; m++) {
        const long from = s.coefficient(h, p, q, m);
        const float times = (m + 1) * s.scale;
        bfloat16* cosine = at + (m * s.token_step + q) * 2 * s.unit_step + p;
        bfloat16* sine = cosine + s.grid * s.token_step * 2 * s.unit_step;
        cosine[0] = cosine[s.unit_step] = rounded(times * c.sines[from]);
        sine[0] = sine[s.unit_step] = rounded(-times * c.cosines[from]);
      }
}

// From scores [keys][32] and their slopes [feature][KEYS][32] to features and dA = sum_f (D_f^T dH) f(A), rows of pairs
// of queries, and to dA as pairs of keys. Beyond WHOLE columns, of which 16 are queries, dA is zero and the features of
// the first 16 stand again: dH is zero.
template <bool WHOLE, long GRID>
void fill_pair_gradients(const float* scores, const float* slopes, Pair* features, Pair* grad_scores, Pair* grad_pairs,
                         float half_turn, long keys, long grid) {
  const long count = GRID ? GRID : grid;
  constexpr long SLOPES = KEYS * DEPTH, FEATURE = KEYS * FEATURE_ROW;
  __m512i upper = {};
  for (long i = 0; i < keys; i++) {
    const float* from = scores + i * DEPTH;
    const Harmonics<GRID> first(load(from) * half_turn, grid), second(load(from + WHOLE * LANES) * half_turn, grid);
    Vec grad[2] = {};
    UNROLL for (long m = 1; m <= count; m++) {
      Pair* at = features + (m - 1) * FEATURE + i * FEATURE_ROW;
      store(at, round_to_pairs(first.cosine[m], second.cosine[m]));
      store(at + count * FEATURE, round_to_pairs(first.sine[m], second.sine[m]));
      const float *cosine = slopes + (m - 1) * SLOPES + i * DEPTH, *sine = cosine + count * SLOPES;
      grad[0] += load(cosine) * first.cosine[m];
      grad[0] += load(sine) * first.sine[m];
      if constexpr (WHOLE) {
        grad[1] += load(cosine + LANES) * second.cosine[m];
        grad[1] += load(sine + LANES) * second.sine[m];
      }
    }
    const __m512i row = round_to_pairs(grad[0], grad[1]);
    store(grad_scores + i * FEATURE_ROW, row);
    if (i % 2) pair_up(upper, row, grad_pairs + i / 2 * CHUNK_STEP);
    upper = row;
  }
  if (keys % 2) pair_up(upper, __m512i{}, grad_pairs + keys / 2 * CHUNK_STEP);
}

// Adds to dK and dC what KEYS keys and a chunk of queries bring, and puts their dA into the group of pairs of keys.
void backward_keys(const PairShape& s, const PairBackwardScratch& w, const Pair* slopes, float* grad_coef, long key,
                   long query, long queries, Pair* grad_pairs) {
  const long width_pairs = s.width_step / 2, keys = std::min(KEYS, s.tokens - key);
  const float half_turn = 0x1.45f306p-2f * s.scale; // scores in units of pi
  for (long q = 0; q < queries; q += DEPTH) {
    const long columns = std::min(DEPTH, queries - q);
    multiply<false>(Operand::left(w.key + key * width_pairs, width_pairs),
                    Operand::right(w.query_columns + query + q, s.token_step), Result::rows(w.scores, DEPTH), keys,
                    columns, s.width_pairs);
    multiply<false>({slopes + key * s.unit_step, s.unit_step, s.token_step * s.unit_step, PAIRS},
                    Operand::right(w.grad_hidden_columns + query + q, s.token_step),
                    Result{w.slopes, DEPTH, KEYS * DEPTH}, s.features() * KEYS, columns,
                    PARTS == 2 ? s.unit_step : s.unit_pairs);
    for_grid(s.grid, [&](auto grid) {
      const auto fill = columns > 16 ? fill_pair_gradients<true, grid> : fill_pair_gradients<false, grid>;
      fill(w.scores, w.slopes, w.features + q / 2, w.grad_scores + q / 2, grad_pairs + q, half_turn, keys, s.grid);
    });
  }
  const long pairs = (queries + 1) / 2;
  multiply_parts<true>({w.features, FEATURE_ROW, KEYS * FEATURE_ROW, PAIRS}, 0,
                       Operand::right(w.grad_hidden_pairs + query / 2 * s.unit_step, s.unit_step),
                       PARTS == 2 ? s.token_step / 2 * s.unit_step : 0,
                       Result{grad_coef + key * s.unit_step, s.unit_step, s.token_step * s.unit_step},
                       s.features() * KEYS, s.unit_step, pairs);
  multiply<true>(Operand::left(w.grad_scores, FEATURE_ROW),
                 Operand::right(w.query_pairs + query / 2 * s.width_step, s.width_step),
                 Result::rows(w.grad_key + key * s.width_step, s.width_step), keys, s.width_step, pairs);
}

struct PairBackward {
  using Shape = PairShape;
  using Scratch = PairBackwardScratch;

  static long coefficients(const Shape& s) { return s.features() * s.token_step * s.unit_step; }
  static long projector(const Shape& s) { return s.token_step * (2 * PAIRS + s.unit_step); }
  static long grad_feature(const Shape& s) { return s.token_step * s.unit_step; }
  static long grad_projector(const Shape& s) { return s.token_step * s.unit_step; }
  static long grad_coefficient(const Shape& s, long p, long q) { return q * s.unit_step + p; }

  static void pack(const Call& c, const Shape& s, long h, float* slopes, float* projector) {
    pack_pairs_for_backward(c, s, h, reinterpret_cast<Pair*>(slopes));
    split_projector(c, s, h, reinterpret_cast<Pair*>(projector), DEPTH, 1, s.token_step * DEPTH);
    split_projector_columns(c, s, h, reinterpret_cast<Pair*>(projector) + 2 * s.token_step * PAIRS);
  }

  static void run(const Call& c, const Shape& s, const Scratch& w, const float* slopes, const float* projector,
                  const HeadGradients& sums, long b, long h) {
    pull_back_pairs(c, s, w, reinterpret_cast<const Pair*>(projector), sums.projector, b, h);
    const long width_pairs = s.width_step / 2, token_pairs = s.token_step / 2;
    read_pairs(item<bfloat16>(c.query, b, h), c.query.token, w.grad_output, width_pairs, s.tokens, s.width);
    transpose(w.grad_output, width_pairs, w.query_columns, s.token_step, s.token_step, width_pairs);
    pair_rows(w.grad_output, width_pairs, w.query_pairs, s.width_step, s.token_step, s.width_step);
    read_pairs(item<bfloat16>(c.key, b, h), c.key.token, w.key, width_pairs, s.tokens, s.width);
    pair_rows(w.key, width_pairs, w.key_pairs, s.width_step, s.token_step, s.width_step);
    transpose(w.key_pairs, s.width_step, w.key_columns, token_pairs, token_pairs, s.width_step);
    clear(w.grad_key, s.token_step * s.width_step);

    const long blocks = s.token_step / DEPTH, chunks = (blocks * DEPTH + CHUNK - 1) / CHUNK;
    for (long chunk = 0; chunk < chunks; chunk++) {
      const long first = blocks * chunk / chunks * DEPTH, end = blocks * (chunk + 1) / chunks * DEPTH;
      const long queries = std::min(end, s.tokens) - first;
      clear(w.grad_query, s.width_step * CHUNK_STEP);
      for (long key = 0; key < s.tokens; key += GROUP) {
        const long keys = std::min(GROUP, s.tokens - key), pairs = (keys + 1) / 2;
        for (long k = 0; k < keys; k += KEYS)
          backward_keys(s, w, reinterpret_cast<const Pair*>(slopes), sums.coefficients, key + k, first, queries,
                        w.grad_score_pairs + k / 2 * CHUNK_STEP);
        for (long pair = pairs; pair < round_up(pairs, PAIRS); pair++)
          std::memset(w.grad_score_pairs + pair * CHUNK_STEP, 0, CHUNK * sizeof(Pair));
        multiply<true>(Operand::left(w.key_columns + key / 2, token_pairs),
                       Operand::right(w.grad_score_pairs, CHUNK_STEP), Result::rows(w.grad_query, CHUNK_STEP),
                       s.width_step, queries, pairs);
      }
      write_query_gradient(c, s, w, first, queries, b, h);
    }
    write_rounded(w.grad_key, s.width_step, item<bfloat16>(c.grad_key, b, h), c.grad_key.token, s.tokens, s.width);
  }

 private:
  static void write_query_gradient(const Call& c, const Shape& s, const Scratch& w, long first, long queries, long b,
                                   long h) {
    for (long q = 0; q < queries; q += 16) {
      transpose(w.grad_query + q, CHUNK_STEP, w.narrow_sums, s.width_step, s.width_step, 16);
      write_rounded(w.narrow_sums, s.width_step, item<bfloat16>(c.grad_query, b, h) + (first + q) * c.grad_query.token,
                    c.grad_query.token, std::min(16l, queries - q), s.width);
    }
  }
};

} // namespace
