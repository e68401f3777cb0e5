// Backward in float32: scores and features are computed again, a tile of queries by keys at a time.

#pragma once

#include <algorithm>

#include "harmonics.h"
#include "psi.h"
#include "shape.h"

namespace {

#if defined(__AVX512F__)
constexpr long SLOPE_BLOCK = 4;
#else
constexpr long SLOPE_BLOCK = 2;
#endif
constexpr long QUERY_ROWS = 32; // of a tile

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
  float *query, *key, *value, *grad_output, *key_columns, *hidden, *narrow, *narrow_columns, *grad_hidden;
  float *grad_query, *grad_key, *grad_value, *features, *grad_scores;
  float *value_columns, *mixed, *grad_mixed; // with psi

  BackwardScratch(const Shape& s, Arena& arena) {
    const long wide = s.token_step * s.width_step;
    query = arena.take(wide);
    key = arena.take(wide);
    grad_query = arena.take(wide);
    // Without psi, dO, V and dV are done with before Q, K and dQ are needed.
    grad_output = s.has_psi ? arena.take(wide) : query;
    value = key;
    grad_value = s.has_psi ? arena.take(wide) : grad_query;
    value_columns = s.has_psi ? arena.take(wide) : nullptr;
    mixed = s.has_psi ? arena.take(QUERY_ROWS * TILE) : nullptr;
    grad_mixed = s.has_psi ? arena.take(QUERY_ROWS * TILE) : nullptr;
    grad_key = arena.take(wide);
    key_columns = arena.take(wide);
    hidden = arena.take(s.token_step * s.unit_step);
    narrow = arena.take(s.unit_step * s.width_step);
    narrow_columns = arena.take(s.width_step * s.unit_step);
    grad_hidden = arena.take(s.token_step * s.unit_step);
    features = arena.take(s.features() * QUERY_ROWS * TILE);
    grad_scores = arena.take(QUERY_ROWS * TILE);
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

// Adds to dQ, dK and dC what VECTORS vectors of keys, from token `column` on, bring.
template <long VECTORS>
void backward_tile(const Shape& s, const BackwardScratch& w, const float* slopes, const float* psi, float* grad_coef,
                   float* grad_psi, long column) {
  const float* key_columns = w.key_columns + column;
  const float* key_rows = w.key + column * s.width_step;
  float* grad_key = w.grad_key + column * s.width_step;
  const long width_vectors = s.width_step / LANES;
  for (long first = 0; first < s.rows; first += QUERY_ROWS) {
    const long rows = std::min(QUERY_ROWS, s.rows - first);
    const float* query = w.query + first * s.width_step;
    const float* grad_hidden = w.grad_hidden + first * s.unit_step;
    fill_scores<VECTORS>(query, s.width_step, key_columns, s.token_step, w.features, rows, s.width);
    fill_harmonics<VECTORS>(w.features, rows, s.grid);
    fill_grad_scores<VECTORS>(s, grad_hidden, slopes + column, w.features, w.grad_scores, rows);
    if (psi) {
      const float* grad_output = w.grad_output + first * s.width_step;
      multiply<false, VECTORS>({grad_output, s.width_step, 1}, w.value_columns + column, s.token_step, w.grad_mixed,
                               TILE, rows, s.width);
      pull_back_psi<VECTORS>(w.features, psi, w.grad_mixed, w.mixed, w.grad_scores, grad_psi, rows, s.grid);
      multiply_wide<true>({w.mixed, 1, TILE}, grad_output, s.width_step, w.grad_value + column * s.width_step,
                          s.width_step, VECTORS * LANES, width_vectors, rows);
    }
    for (long f = 0; f < s.features(); f++)
      multiply<true, VECTORS>({grad_hidden, 1, s.unit_step}, w.features + f * rows * TILE, TILE,
                              grad_coef + f * s.units * s.token_step + column, s.token_step, s.units, rows);
    multiply_wide<true>({w.grad_scores, TILE, 1}, key_rows, s.width_step, w.grad_query + first * s.width_step,
                        s.width_step, rows, width_vectors, VECTORS * LANES);
    multiply_wide<true>({w.grad_scores, 1, TILE}, query, s.width_step, grad_key, s.width_step, VECTORS * LANES,
                        width_vectors, rows);
  }
}

template <typename T>
void write_grad_value(const Call& c, const Shape& s, const BackwardScratch& w, long b, long h) {
  write_rows(w.grad_value, s.width_step, item<T>(c.grad_value, b, h), c.grad_value.token, s.tokens, s.width);
}

// dH, dV and the item's share of dW, from O = H U and U = W^T V.
template <typename T>
void pull_back_output(const Call& c, const Shape& s, const BackwardScratch& w, const float* projector,
                      float* grad_projector, long b, long h) {
  const long narrow = s.unit_step * s.width_step;
  read_rows(item<T>(c.value, b, h), c.value.token, w.value, s.width_step, s.tokens, s.width, 1.0f);
  read_rows(item<T>(c.output, b, h), c.output.token, w.grad_output, s.width_step, s.tokens, s.width, 1.0f);

  clear(w.narrow_columns, narrow);
  multiply_small({w.value, 1, s.width_step}, projector, s.unit_step, w.narrow_columns, s.unit_step, s.width_step,
                 s.unit_step, s.tokens);
  clear(w.grad_hidden, s.rows * s.unit_step);
  multiply_small({w.grad_output, s.width_step, 1}, w.narrow_columns, s.unit_step, w.grad_hidden, s.unit_step, s.rows,
                 s.unit_step, s.width);

  const float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
  read_rows(hidden, s.rank, w.hidden, s.unit_step, s.tokens, s.rank, 1.0f);
  clear(w.narrow, narrow);
  multiply_small({w.hidden, 1, s.unit_step}, w.grad_output, s.width_step, w.narrow, s.width_step, s.units,
                 s.width_step, s.tokens);
  transpose(w.narrow, s.width_step, w.narrow_columns, s.unit_step, s.unit_step, s.width_step);
  multiply_small({w.value, s.width_step, 1}, w.narrow_columns, s.unit_step, grad_projector, s.unit_step, s.rows,
                 s.unit_step, s.width);
  clear(w.grad_value, s.vectors * LANES * s.width_step);
  multiply_small({projector, s.unit_step, 1}, w.narrow, s.width_step, w.grad_value, s.width_step, s.rows,
                 s.width_step, s.rank);
  if (s.has_psi)
    transpose(w.value, s.width_step, w.value_columns, s.token_step, s.vectors * LANES, s.width_step);
  else
    write_grad_value<T>(c, s, w, b, h);
}

template <typename T>
void backward_item(const Call& c, const Shape& s, const BackwardScratch& w, const float* slopes,
                   const float* projector, float* grad_coef, float* grad_projector, long b, long h) {
  pull_back_output<T>(c, s, w, projector, grad_projector, b, h);
  read_rows(item<T>(c.query, b, h), c.query.token, w.query, s.width_step, s.tokens, s.width, s.scale);
  read_rows(item<T>(c.key, b, h), c.key.token, w.key, s.width_step, s.tokens, s.width, 1.0f);
  transpose(w.key, s.width_step, w.key_columns, s.token_step, s.vectors * LANES, s.width_step);
  clear(w.grad_query, s.rows * s.width_step);
  clear(w.grad_key, s.vectors * LANES * s.width_step);
  const float* psi = psi_of(c, s, h);
  float* grad_psi = psi ? c.grad_psi + (b * s.heads + h) * (s.features() + 1) : nullptr;
  if (psi) clear(grad_psi, s.features() + 1);
  for_tiles(s, [&](auto vectors, long column) {
    backward_tile<vectors>(s, w, slopes, psi, grad_coef, grad_psi, column);
  });
  if (psi) write_grad_value<T>(c, s, w, b, h);
  // The query was read with the scale in it, so only dQ still lacks it.
  for (long i = 0; i < s.rows * s.width_step; i += LANES)
    store(w.grad_query + i, load(w.grad_query + i) * s.scale);
  write_rows(w.grad_query, s.width_step, item<T>(c.grad_query, b, h), c.grad_query.token, s.tokens, s.width);
  write_rows(w.grad_key, s.width_step, item<T>(c.grad_key, b, h), c.grad_key.token, s.tokens, s.width);
}

template <typename T>
struct Backward {
  using Shape = ::Shape;
  using Scratch = BackwardScratch;

  static long coefficients(const Shape& s) { return s.features() * s.units * s.token_step; }
  static long projector(const Shape& s) { return s.rows * s.unit_step; }
  static long grad_feature(const Shape& s) { return s.units * s.token_step; }
  static long grad_projector(const Shape& s) { return projector(s); }
  static long grad_coefficient(const Shape& s, long p, long q) { return p * s.token_step + q; }

  static void pack(const Call& c, const Shape& s, long h, float* slopes, float* projector) {
    pack_for_backward(c, s, h, slopes);
    pack_projector(c, s, h, projector);
  }

  static void run(const Call& c, const Shape& s, const Scratch& w, const float* slopes, const float* projector,
                  float* grad_coef, float* grad_projector, long b, long h) {
    backward_item<T>(c, s, w, slopes, projector, grad_coef, grad_projector, b, h);
  }
};

} // namespace
