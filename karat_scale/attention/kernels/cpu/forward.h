// Forward in float32: H = sum_f f(A) C_f^T and O = H (W^T V), a tile of keys by queries at a time. With psi, O = psi(A) V
// comes to that, from the same features. With a mask, O = S V from tiles of S = H W^T.
//
// Tiles of query columns (A transposed) give H^T without a wasted lane at any rank; a tile's features live in the L1
// cache.

#pragma once

#include <algorithm>

#include "harmonics.h"
#include "on_scores.h"
#include "psi.h"
#include "shape.h"

namespace {

constexpr long KEY_ROWS = 16; // of a tile

// C of a head in blocks of KEY_ROWS keys, each [feature][key][unit]: the order in which a tile's features come.
void pack_for_forward(const Call& c, const Shape& s, long h, float* out) {
  for (long first = 0; first < s.rows; first += KEY_ROWS) {
    const long keys = std::min(KEY_ROWS, s.rows - first);
    float* block = out + first * s.features() * s.units;
    for (long p = 0; p < s.rank; p++)
      for (long q = 0; q < std::min(keys, s.tokens - first); q++)
        for (long m = 0; m < s.grid; m++) {
          block[(m * keys + q) * s.units + p] = c.cosines[s.coefficient(h, p, first + q, m)];
          block[((s.grid + m) * keys + q) * s.units + p] = c.sines[s.coefficient(h, p, first + q, m)];
        }
  }
}

struct ForwardScratch {
  float *rows, *key, *query_columns, *hidden_columns, *narrow, *features, *out, *value, *mixed;

  ForwardScratch(const Shape& s, Arena& arena)
      : rows(arena.take(s.token_step * s.width_step)), key(arena.take(s.token_step * s.width_step)),
        query_columns(arena.take(s.width_step * s.token_step)), hidden_columns(arena.take(s.units * s.token_step)),
        narrow(arena.take(s.units * s.width_step)), features(arena.take(s.features() * KEY_ROWS * TILE)), out(rows),
        value(s.has_psi || s.has_mask ? arena.take(s.token_step * s.width_step) : rows),
        mixed(s.has_psi || s.has_mask ? arena.take(KEY_ROWS * TILE) : nullptr) {}
};

// H^T += sum_f C_f f(A^T), for VECTORS vectors of queries from token `column` on. With psi, also O += psi(A) V.
template <long VECTORS>
void forward_tile(const Call& c, const Shape& s, const ForwardScratch& w, const float* coef, long b, long h,
                  long column) {
  const float *psi = psi_of(c, s, h), *bias = item<float>(c.bias, b, h);
  const Flag* mask = item<Flag>(c.mask, b, h);
  const float* query = w.query_columns + column;
  for (long first = 0; first < s.rows; first += KEY_ROWS) {
    const long keys = std::min(KEY_ROWS, s.rows - first), depth = s.features() * keys;
    const float* key_rows = w.key + first * s.width_step;
    fill_scores<VECTORS>(key_rows, s.width_step, query, s.token_step, w.features, keys, s.width);
    if (bias) add_bias<true>(bias, c.bias, s.tokens, first, column, w.features, keys, VECTORS * LANES);
    fill_harmonics<VECTORS>(w.features, keys, s.grid);
    if (mask) cut<true>(mask, c.mask, s.tokens, first, column, w.features, keys, VECTORS * LANES, s.features());
    const Left units{coef + first * s.features() * s.units, 1, s.units};
    multiply<true, VECTORS>(units, w.features, TILE, w.hidden_columns + column, s.token_step, s.units, depth);
    if (!psi) continue;
    fill_psi<VECTORS>(w.features, psi, w.mixed, keys, s.grid);
    multiply_wide<true>({w.mixed, 1, TILE}, w.value + first * s.width_step, s.width_step,
                        w.out + column * s.width_step, s.width_step, VECTORS * LANES, s.width_step / LANES, keys);
  }
}

// O += S V for queries in `columns` columns, when their H is whole.
inline void read_masked_tile(const Call& c, const Shape& s, const ForwardScratch& w, const float* projector, long b,
                             long h, long column, long columns) {
  const Flag* mask = item<Flag>(c.mask, b, h);
  for (long first = 0; first < s.rows; first += KEY_ROWS) {
    const long keys = std::min(KEY_ROWS, s.rows - first);
    clear(w.mixed, keys * TILE);
    multiply_small({projector + first * s.unit_step, s.unit_step, 1}, w.hidden_columns + column, s.token_step, w.mixed,
                   TILE, keys, columns, s.rank);
    cut<true>(mask, c.mask, s.tokens, first, column, w.mixed, keys, columns, 1);
    multiply_small({w.mixed, 1, TILE}, w.value + first * s.width_step, s.width_step, w.out + column * s.width_step,
                   s.width_step, columns, s.width_step, keys);
  }
}

template <typename T>
void forward_item(const Call& c, const Shape& s, const ForwardScratch& w, const float* coef, const float* projector,
                  long b, long h) {
  // U = W^T V.
  read_rows(item<T>(c.value, b, h), c.value.token, w.value, s.width_step, s.tokens, s.width, 1.0f);
  clear(w.narrow, s.units * s.width_step);
  if (!s.has_mask)
    multiply_small({projector, 1, s.unit_step}, w.value, s.width_step, w.narrow, s.width_step, s.units, s.width_step,
                   s.tokens);

  read_rows(item<T>(c.query, b, h), c.query.token, w.rows, s.width_step, s.tokens, s.width, s.scale);
  transpose(w.rows, s.width_step, w.query_columns, s.token_step, s.columns(), s.width_step);
  read_rows(item<T>(c.key, b, h), c.key.token, w.key, s.width_step, s.tokens, s.width, 1.0f);
  clear(w.hidden_columns, s.units * s.token_step);
  // From here on the query is in its columns alone, and its rows are room for O.
  clear(w.out, s.columns() * s.width_step);
  for_tiles(s, [&](auto vectors, long column) { forward_tile<vectors>(c, s, w, coef, b, h, column); });
  if (s.has_mask)
    for_tiles(s, [&](auto vectors, long column) {
      read_masked_tile(c, s, w, projector, b, h, column, vectors * LANES);
    });
  else // O += H U.
    multiply_small({w.hidden_columns, 1, s.token_step}, w.narrow, s.width_step, w.out, s.width_step, s.rows,
                   s.width_step, s.rank);
  write_rows(w.out, s.width_step, item<T>(c.output, b, h), c.output.token, s.tokens, s.width);
  float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
  for (long n = 0; n < s.tokens; n++)
    for (long p = 0; p < s.rank; p++) hidden[n * s.rank + p] = w.hidden_columns[p * s.token_step + n];
}

template <typename T>
struct Forward {
  using Shape = ::Shape;
  using Scratch = ForwardScratch;

  static long coefficients(const Shape& s) { return s.rows * s.features() * s.units; }
  static long projector(const Shape& s) { return s.columns() * s.unit_step; }

  static void pack(const Call& c, const Shape& s, long h, float* coef, float* projector) {
    pack_for_forward(c, s, h, coef);
    pack_projector(c, s, h, projector);
  }

  static void run(const Call& c, const Shape& s, const Scratch& w, const float* coef, const float* projector, long b,
                  long h) {
    forward_item<T>(c, s, w, coef, projector, b, h);
  }
};

} // namespace
