// Backward in float32: scores and features are computed again, a tile of queries by keys at a time.

#pragma once

#include <algorithm>

#include "harmonics.h"
#include "on_scores.h"
#include "psi.h"
#include "shape.h"

namespace {

constexpr long SLOPE_BLOCK = BLOCK / 2; // rows
constexpr long QUERY_ROWS = 32;         // of a tile

// The slopes of a head [feature][unit][token]: phi' = sum_m (m b_m) cos(m x) - (m a_m) sin(m x).
void pack_for_backward(const Call& c, const Shape& s, long h, float* out) {
  for (long p = 0; p < s.rank; p++)
    for (long q = 0; q < s.tokens; q++)
      for (long m = 0; m < s.grid; m++) {
        const long from = s.coefficient(h, p, q, m);
        out[(m * s.units + p) * s.token_step + q] = (m + 1) * c.sines[from];
        out[((s.grid + m) * s.units + p) * s.token_step + q] = -(m + 1) * c.cosines[from];
      }
}

struct BackwardScratch {
  float *query, *value, *grad_output, *hidden, *narrow, *narrow_columns, *grad_hidden, *grad_query;
  float *key, *key_columns, *grad_key, *grad_value, *features, *grad_scores; // of a tile
  float *value_columns, *mixed, *grad_mixed;                                 // of a tile, with psi or a mask
  float* projector_columns;                                                  // with a mask

  BackwardScratch(const Shape& s, Arena& arena) {
    const long wide = s.token_step * s.width_step, tile = TILE * s.width_step;
    query = arena.take(wide);
    // V is done with before dQ is needed and, without psi, dO before Q.
    grad_query = value = arena.take(wide);
    grad_output = s.has_psi ? arena.take(wide) : query;
    key = arena.take(tile);
    key_columns = arena.take(tile);
    grad_key = arena.take(tile);
    grad_value = s.has_psi ? arena.take(tile) : grad_key;
    hidden = arena.take(s.token_step * s.unit_step);
    narrow = arena.take(s.unit_step * s.width_step);
    narrow_columns = arena.take(s.width_step * s.unit_step);
    grad_hidden = arena.take(s.token_step * s.unit_step);
    features = arena.take(s.features() * QUERY_ROWS * TILE);
    grad_scores = arena.take(QUERY_ROWS * TILE);
    value_columns = s.has_psi ? arena.take(tile) : key_columns;
    mixed = s.has_psi ? arena.take(QUERY_ROWS * TILE) : features;
    grad_mixed = s.has_psi ? arena.take(QUERY_ROWS * TILE) : grad_scores;
    projector_columns = s.has_mask ? arena.take(s.unit_step * s.token_step) : nullptr;
  }
};

// dA = sum_f (dH D_f) f(A), where D_f are the slopes; the sum over f stays in registers.
template <long VECTORS>
INLINE void fill_grad_scores(const Shape& s, const float* grad_hidden, const float* slopes, const float* features,
                             float* grad_scores, long rows) {
  for (long i = 0; i < rows; i += SLOPE_BLOCK) {
    Vec total[SLOPE_BLOCK][VECTORS] = {};
    for (long f = 0; f < s.features(); f++) {
      Vec sum[SLOPE_BLOCK][VECTORS];
      const Left left{grad_hidden + i * s.unit_step, s.unit_step, 1};
      sum_products<SLOPE_BLOCK, VECTORS>(left, slopes + f * s.units * s.token_step, s.token_step, s.rank, sum);
      const float* feature = features + (f * rows + i) * TILE;
      UNROLL for (long j = 0; j < SLOPE_BLOCK; j++) UNROLL for (long v = 0; v < VECTORS; v++)
        total[j][v] += sum[j][v] * load(feature + j * TILE + v * LANES);
    }
    UNROLL for (long j = 0; j < SLOPE_BLOCK; j++) UNROLL for (long v = 0; v < VECTORS; v++)
      store(grad_scores + (i + j) * TILE + v * LANES, total[j][v]);
  }
}

// Writes rows of a tile, of keys from token `first` on.
template <typename T>
void write_tile(const float* tile, const Shape& s, T* out, const Strided& to, long first, long rows) {
  write_rows(tile, s.width_step, out + first * to.token, to.token, std::min(rows, s.tokens - first), s.width);
}

// Reads rows of a tile, of keys from token `first` on; zero beyond the last token.
template <typename T>
void read_tile(const T* in, const Strided& from, const Shape& s, float* tile, long first, long rows) {
  const long there = std::min(rows, s.tokens - first);
  read_rows(in + first * from.token, from.token, tile, s.width_step, there, s.width, 1.0f);
  clear(tile + there * s.width_step, (rows - there) * s.width_step);
}

// The low-rank part of dV, W dU, for `rows` tokens.
inline void fill_grad_value(const Shape& s, const BackwardScratch& w, const float* projector, long first, long rows) {
  clear(w.grad_value, rows * s.width_step);
  multiply_small({projector + first * s.unit_step, s.unit_step, 1}, w.narrow, s.width_step, w.grad_value, s.width_step,
                 rows, s.width_step, s.rank);
}

// Adds to dQ, dC and with psi dV what VECTORS vectors of keys, from token `column` on, bring, and finds their dK.
template <long VECTORS>
void backward_tile(const Call& c, const Shape& s, const BackwardScratch& w, const float* slopes, const HeadGradients& to,
                   long b, long h, long column) {
  const float *psi = psi_of(c, s, h), *bias = item<float>(c.bias, b, h);
  const Flag* mask = item<Flag>(c.mask, b, h);
  const long width_vectors = s.width_step / LANES;
  transpose(w.key, s.width_step, w.key_columns, TILE, VECTORS * LANES, s.width_step);
  clear(w.grad_key, VECTORS * LANES * s.width_step);
  for (long first = 0; first < s.rows; first += QUERY_ROWS) {
    const long rows = std::min(QUERY_ROWS, s.rows - first);
    const float* query = w.query + first * s.width_step;
    const float* grad_hidden = w.grad_hidden + first * s.unit_step;
    fill_scores<VECTORS>(query, s.width_step, w.key_columns, TILE, w.features, rows, s.width);
    if (bias) add_bias<false>(bias, c.bias, s.tokens, first, column, w.features, rows, VECTORS * LANES);
    fill_harmonics<VECTORS>(w.features, rows, s.grid);
    if (mask) cut<false>(mask, c.mask, s.tokens, first, column, w.features, rows, VECTORS * LANES, s.features());
    fill_grad_scores<VECTORS>(s, grad_hidden, slopes + column, w.features, w.grad_scores, rows);
    if (to.bias)
      add_to_grad_bias(w.grad_scores, to.bias, c.grad_bias, s.tokens, first, column, rows, VECTORS * LANES);
    if (psi) {
      const float* grad_output = w.grad_output + first * s.width_step;
      multiply<false, VECTORS>({grad_output, s.width_step, 1}, w.value_columns, TILE, w.grad_mixed, TILE, rows,
                               s.width);
      pull_back_psi<VECTORS>(w.features, psi, w.grad_mixed, w.mixed, w.grad_scores, to.psi, rows, s.grid);
      multiply_wide<true>({w.mixed, 1, TILE}, grad_output, s.width_step, w.grad_value, s.width_step, VECTORS * LANES,
                          width_vectors, rows);
    }
    for (long f = 0; f < s.features(); f++)
      multiply<true, VECTORS>({grad_hidden, 1, s.unit_step}, w.features + f * rows * TILE, TILE,
                              to.coefficients + f * s.units * s.token_step + column, s.token_step, s.units, rows);
    multiply_wide<true>({w.grad_scores, TILE, 1}, w.key, s.width_step, w.grad_query + first * s.width_step,
                        s.width_step, rows, width_vectors, VECTORS * LANES);
    multiply_wide<true>({w.grad_scores, 1, TILE}, query, s.width_step, w.grad_key, s.width_step, VECTORS * LANES,
                        width_vectors, rows);
  }
}

// dV = S^T dO, dH += dS W and dW += dS^T H, from dS = dO V^T, for `columns` keys from token `column` on.
inline void pull_back_masked_tile(const Call& c, const Shape& s, const BackwardScratch& w, const float* projector,
                                  float* grad_projector, long b, long h, long column, long columns) {
  const Flag* mask = item<Flag>(c.mask, b, h);
  transpose(w.value + column * s.width_step, s.width_step, w.value_columns, TILE, columns, s.width_step);
  clear(w.grad_value, columns * s.width_step);
  for (long first = 0; first < s.rows; first += QUERY_ROWS) {
    const long rows = std::min(QUERY_ROWS, s.rows - first);
    const float *grad_output = w.grad_output + first * s.width_step, *hidden = w.hidden + first * s.unit_step;
    for (float* tile : {w.mixed, w.grad_mixed}) clear(tile, rows * TILE);
    multiply_small({hidden, s.unit_step, 1}, w.projector_columns + column, s.token_step, w.mixed, TILE, rows, columns,
                   s.rank);
    multiply_small({grad_output, s.width_step, 1}, w.value_columns, TILE, w.grad_mixed, TILE, rows, columns, s.width);
    for (float* tile : {w.mixed, w.grad_mixed})
      cut<false>(mask, c.mask, s.tokens, first, column, tile, rows, columns, 1);
    multiply_small({w.mixed, 1, TILE}, grad_output, s.width_step, w.grad_value, s.width_step, columns, s.width_step,
                   rows);
    multiply_small({w.grad_mixed, TILE, 1}, projector + column * s.unit_step, s.unit_step,
                   w.grad_hidden + first * s.unit_step, s.unit_step, rows, s.unit_step, columns);
    multiply_small({w.grad_mixed, 1, TILE}, hidden, s.unit_step, grad_projector + column * s.unit_step, s.unit_step,
                   columns, s.unit_step, rows);
  }
}

// dH, dV (but with psi) and the item's share of dW, from O = H U and U = W^T V, or with a mask from tiles of S.
template <typename T>
void pull_back_output(const Call& c, const Shape& s, const BackwardScratch& w, const float* projector,
                      float* grad_projector, long b, long h) {
  const long narrow = s.unit_step * s.width_step;
  const float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
  read_rows(hidden, s.rank, w.hidden, s.unit_step, s.tokens, s.rank, 1.0f);
  read_tile(item<T>(c.value, b, h), c.value, s, w.value, 0, s.columns());
  read_rows(item<T>(c.output, b, h), c.output.token, w.grad_output, s.width_step, s.tokens, s.width, 1.0f);
  clear(w.grad_hidden, s.rows * s.unit_step);
  if (s.has_mask) {
    transpose(projector, s.unit_step, w.projector_columns, s.token_step, s.columns(), s.unit_step);
    return for_tiles(s, [&](auto vectors, long column) {
      pull_back_masked_tile(c, s, w, projector, grad_projector, b, h, column, vectors * LANES);
      write_tile(w.grad_value, s, item<T>(c.grad_value, b, h), c.grad_value, column, vectors * LANES);
    });
  }

  clear(w.narrow_columns, narrow);
  multiply_small({w.value, 1, s.width_step}, projector, s.unit_step, w.narrow_columns, s.unit_step, s.width_step,
                 s.unit_step, s.tokens);
  multiply_small({w.grad_output, s.width_step, 1}, w.narrow_columns, s.unit_step, w.grad_hidden, s.unit_step, s.rows,
                 s.unit_step, s.width);

  clear(w.narrow, narrow);
  multiply_small({w.hidden, 1, s.unit_step}, w.grad_output, s.width_step, w.narrow, s.width_step, s.units,
                 s.width_step, s.tokens);
  transpose(w.narrow, s.width_step, w.narrow_columns, s.unit_step, s.unit_step, s.width_step);
  multiply_small({w.value, s.width_step, 1}, w.narrow_columns, s.unit_step, grad_projector, s.unit_step, s.rows,
                 s.unit_step, s.width);
  for (long first = 0; !s.has_psi && first < s.rows; first += TILE) {
    const long rows = std::min(TILE, s.rows - first);
    fill_grad_value(s, w, projector, first, rows);
    write_tile(w.grad_value, s, item<T>(c.grad_value, b, h), c.grad_value, first, rows);
  }
}

template <typename T>
void backward_item(const Call& c, const Shape& s, const BackwardScratch& w, const float* slopes,
                   const float* projector, const HeadGradients& sums, long b, long h) {
  pull_back_output<T>(c, s, w, projector, sums.projector, b, h);
  read_rows(item<T>(c.query, b, h), c.query.token, w.query, s.width_step, s.tokens, s.width, s.scale);
  clear(w.grad_query, s.rows * s.width_step);
  HeadGradients to = sums;
  to.psi = s.has_psi ? c.grad_psi + (b * s.heads + h) * (s.features() + 1) : nullptr;
  if (s.has_psi) clear(to.psi, s.features() + 1);
  if (c.grad_bias.batch) to.bias = item<float>(c.grad_bias, b, h);
  for_tiles(s, [&](auto vectors, long column) {
    if (s.has_psi) {
      read_tile(item<T>(c.value, b, h), c.value, s, w.key, column, vectors * LANES);
      transpose(w.key, s.width_step, w.value_columns, TILE, vectors * LANES, s.width_step);
      fill_grad_value(s, w, projector, column, vectors * LANES);
    }
    read_tile(item<T>(c.key, b, h), c.key, s, w.key, column, vectors * LANES);
    backward_tile<vectors>(c, s, w, slopes, to, b, h, column);
    write_tile(w.grad_key, s, item<T>(c.grad_key, b, h), c.grad_key, column, vectors * LANES);
    if (s.has_psi)
      write_tile(w.grad_value, s, item<T>(c.grad_value, b, h), c.grad_value, column, vectors * LANES);
  });
  // The query was read with the scale in it, so only dQ still lacks it.
  for (long i = 0; i < s.rows * s.width_step; i += LANES)
    store(w.grad_query + i, load(w.grad_query + i) * s.scale);
  write_rows(w.grad_query, s.width_step, item<T>(c.grad_query, b, h), c.grad_query.token, s.tokens, s.width);
}

template <typename T>
struct Backward {
  using Shape = ::Shape;
  using Scratch = BackwardScratch;

  static long coefficients(const Shape& s) { return s.features() * s.units * s.token_step; }
  static long projector(const Shape& s) { return s.columns() * s.unit_step; }
  static long grad_feature(const Shape& s) { return s.units * s.token_step; }
  static long grad_projector(const Shape& s) { return projector(s); }
  static long grad_coefficient(const Shape& s, long p, long q) { return p * s.token_step + q; }

  static void pack(const Call& c, const Shape& s, long h, float* slopes, float* projector) {
    pack_for_backward(c, s, h, slopes);
    pack_projector(c, s, h, projector);
  }

  static void run(const Call& c, const Shape& s, const Scratch& w, const float* slopes, const float* projector,
                  const HeadGradients& sums, long b, long h) {
    backward_item<T>(c, s, w, slopes, projector, sums, b, h);
  }
};

} // namespace
