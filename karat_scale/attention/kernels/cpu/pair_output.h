// The memory of backward for bfloat16, and its first step: from dO to dH, dV and dW.

#pragma once

#include <algorithm>

#include "pair_products.h"

namespace {

constexpr long KEYS = 16;               // of a tile
constexpr long CHUNK = 128;             // queries, at most
constexpr long GROUP = 128;             // keys whose dA is kept for one product
constexpr long CHUNK_STEP = CHUNK + 16; // keeps columns from sharing cache sets
constexpr long FEATURE_ROW = CHUNK_STEP / 2;

struct PairBackwardScratch {
  Pair *query_columns, *query_pairs, *key, *key_pairs, *key_columns, *value, *value_pairs;
  Pair *grad_output, *grad_output_pairs, *hidden, *hidden_pairs, *hidden_columns;
  Pair *grad_hidden, *grad_hidden_pairs, *grad_hidden_columns, *narrow, *narrow_pairs, *narrow_columns;
  Pair *features, *grad_scores, *grad_score_pairs;
  float *sums, *narrow_sums, *grad_query, *grad_key, *scores, *slopes;
  Tiles tiles;

  PairBackwardScratch(const PairShape& s, Arena& arena) {
    const long wide = s.token_step * s.width_step / 2, units = s.token_step * s.unit_step;
    const long small = 2 * DEPTH * s.width_step / 2; // high and low parts
    key = value = take_pairs(arena, wide);
    key_pairs = value_pairs = take_pairs(arena, wide);
    key_columns = take_pairs(arena, wide);
    grad_output = take_pairs(arena, wide);
    query_columns = take_pairs(arena, wide);
    query_pairs = grad_output_pairs = take_pairs(arena, wide);
    hidden = take_pairs(arena, 2 * s.token_step * PAIRS);
    hidden_pairs = take_pairs(arena, units + PAIRS); // as pair_rows writes DEPTH columns of each row
    hidden_columns = take_pairs(arena, units);
    grad_hidden = take_pairs(arena, s.token_step * DEPTH);
    grad_hidden_pairs = take_pairs(arena, units + PAIRS);
    grad_hidden_columns = take_pairs(arena, units);
    narrow = take_pairs(arena, small);
    narrow_pairs = take_pairs(arena, small);
    narrow_columns = take_pairs(arena, small);
    narrow_sums = arena.take(DEPTH * s.width_step);
    sums = grad_key = arena.take(s.token_step * std::max(s.width_step, s.unit_step));
    grad_query = arena.take(s.width_step * CHUNK_STEP);
    features = take_pairs(arena, s.features() * KEYS * FEATURE_ROW);
    grad_scores = take_pairs(arena, KEYS * FEATURE_ROW);
    grad_score_pairs = take_pairs(arena, GROUP / 2 * CHUNK_STEP);
    scores = arena.take(KEYS * DEPTH);
    slopes = arena.take(s.features() * KEYS * DEPTH);
  }
};

// U or dU, in `narrow_sums`, in two parts as rows of pairs, pairs of rows and columns.
void split_narrow(const PairShape& s, const PairBackwardScratch& w) {
  const long width_pairs = s.width_step / 2;
  split_rows(w.narrow_sums, s.width_step, w.narrow, width_pairs, DEPTH * width_pairs, s.unit_step, s.width_step);
  pair_rows(w.narrow, width_pairs, w.narrow_pairs, s.width_step, 2 * DEPTH, s.width_step);
  transpose(w.narrow, width_pairs, w.narrow_columns, 2 * DEPTH, 2 * DEPTH, width_pairs);
}

// dH, dV and the item's share of dW, from O = H U and U = W^T V. W comes as rows of pairs, then those of W^T.
void pull_back_pairs(const Call& c, const PairShape& s, const PairBackwardScratch& w, const Pair* projector,
                     float* grad_projector, long b, long h) {
  const long width_pairs = s.width_step / 2, token_pairs = s.token_step / 2;
  const long projector_low = s.token_step * PAIRS, narrow_low = PAIRS * s.width_step;
  const Pair* projector_columns = projector + 2 * projector_low;
  read_pairs(item<bfloat16>(c.value, b, h), c.value.token, w.value, width_pairs, s.tokens, s.width);
  pair_rows(w.value, width_pairs, w.value_pairs, s.width_step, s.token_step, s.width_step);
  read_pairs(item<bfloat16>(c.output, b, h), c.output.token, w.grad_output, width_pairs, s.tokens, s.width);
  pair_rows(w.grad_output, width_pairs, w.grad_output_pairs, s.width_step, s.token_step, s.width_step);

  // U = W^T V, dH = dO U^T.
  multiply_parts<false>(Operand::left(projector_columns, token_pairs), s.unit_step * token_pairs,
                        Operand::right(w.value_pairs, s.width_step), 0, Result::rows(w.narrow_sums, s.width_step),
                        s.unit_step, s.width_step, s.token_pairs);
  split_narrow(s, w);
  multiply_parts<false>(Operand::left(w.grad_output, width_pairs), 0, Operand::right(w.narrow_columns, 2 * DEPTH),
                        DEPTH, Result::rows(w.sums, s.unit_step), s.token_step, s.unit_step, s.width_pairs);
  constexpr bool split = PARTS == 2;
  split_rows<split>(w.sums, s.unit_step, w.grad_hidden, PAIRS, s.token_step * PAIRS, s.token_step, s.unit_step);
  pair_rows(w.grad_hidden, PAIRS, w.grad_hidden_pairs, s.unit_step, 2 * s.token_step, s.unit_step);
  split_units<split>(w.sums, w.grad_hidden, s.token_step, s.unit_step);
  transpose(w.grad_hidden, s.unit_step, w.grad_hidden_columns, s.token_step, s.token_step, s.unit_step);

  // dU = H^T dO, dW += V dU^T, dV = W dU.
  clear(w.sums, s.token_step * s.unit_step);
  read_rows(c.hidden + (b * s.heads + h) * s.tokens * s.rank, s.rank, w.sums, s.unit_step, s.tokens, s.rank, 1.0f);
  split_rows(w.sums, s.unit_step, w.hidden, PAIRS, s.token_step * PAIRS, s.token_step, s.unit_step);
  pair_rows(w.hidden, PAIRS, w.hidden_pairs, s.unit_step, 2 * s.token_step, s.unit_step);
  transpose(w.hidden_pairs, s.unit_step, w.hidden_columns, s.token_step, s.token_step, s.unit_step);
  multiply_parts<false>(Operand::left(w.hidden_columns, s.token_step), token_pairs,
                        Operand::right(w.grad_output_pairs, s.width_step), 0,
                        Result::rows(w.narrow_sums, s.width_step), s.unit_step, s.width_step, s.token_pairs);
  split_narrow(s, w);
  multiply_parts<true>(Operand::left(w.value, width_pairs), 0, Operand::right(w.narrow_columns, 2 * DEPTH), DEPTH,
                       Result::rows(grad_projector, s.unit_step), s.tokens, s.unit_step, s.width_pairs);
  multiply_parts<false>(Operand::left(projector, PAIRS), projector_low, Operand::right(w.narrow_pairs, s.width_step),
                        narrow_low, Result::rows(w.sums, s.width_step), s.tokens, s.width_step, s.unit_pairs);
  write_rounded(w.sums, s.width_step, item<bfloat16>(c.grad_value, b, h), c.grad_value.token, s.tokens, s.width);
}

} // namespace
