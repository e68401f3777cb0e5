// Register-blocked products of float32 matrices: nearly all the work of the float32 kernel.
//
// Padding: rows and columns beyond N, r and d are zero in every operand, so they add zero wherever they are summed.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr long BLOCK = REGISTERS / 4;      // rows
constexpr long MAX_VECTORS = 3;            // of a register block; BLOCK x MAX_VECTORS sums fill the registers
constexpr long TILE = MAX_VECTORS * LANES; // columns of a tile
constexpr long SCORE_PART = 32;            // of the width, summed at once

// The left operand of a product: element (i, k) is data[i * row + k * step], and one of the strides is mostly 1.
struct Left {
  const float* data;
  long row, step;
};

// sum[i][v] = sum_k left(i, k) right[k][v], for ROWS rows and VECTORS vectors of columns, in registers.
template <long ROWS, long VECTORS>
INLINE void sum_products(Left left, const float* right, long right_step, long depth, Vec (&sum)[ROWS][VECTORS]) {
  UNROLL for (long i = 0; i < ROWS; i++) UNROLL for (long v = 0; v < VECTORS; v++) sum[i][v] = Vec{};
  for (long k = 0; k < depth; k++) {
    Vec columns[VECTORS];
    UNROLL for (long v = 0; v < VECTORS; v++) columns[v] = load(right + k * right_step + v * LANES);
    UNROLL for (long i = 0; i < ROWS; i++) {
      const Vec x = broadcast(left.data[i * left.row + k * left.step]);
      UNROLL for (long v = 0; v < VECTORS; v++) sum[i][v] += x * columns[v];
    }
  }
}

template <bool ADD, long ROWS, long VECTORS>
INLINE void multiply_block(Left left, const float* right, long right_step, float* out, long out_row, long depth) {
  Vec sum[ROWS][VECTORS];
  sum_products<ROWS, VECTORS>(left, right, right_step, depth, sum);
  UNROLL for (long i = 0; i < ROWS; i++) UNROLL for (long v = 0; v < VECTORS; v++) {
    float* target = out + i * out_row + v * LANES;
    store(target, ADD ? load(target) + sum[i][v] : sum[i][v]);
  }
}

// out (+)= left right for `rows` (a multiple of 4) rows and VECTORS vectors of columns. Sums over `depth` start at
// zero, so that the rounding error of long sums grows with the number of calls, not with the number of terms.
template <bool ADD, long VECTORS>
INLINE void multiply(Left left, const float* right, long right_step, float* out, long out_row, long rows, long depth) {
  long i = 0;
  for (; i + BLOCK <= rows; i += BLOCK) {
    const Left block{left.data + i * left.row, left.row, left.step};
    multiply_block<ADD, BLOCK, VECTORS>(block, right, right_step, out + i * out_row, out_row, depth);
  }
  if (BLOCK > 4 && i < rows) {
    const Left block{left.data + i * left.row, left.row, left.step};
    multiply_block<ADD, 4, VECTORS>(block, right, right_step, out + i * out_row, out_row, depth);
  }
}

// The same for any number of columns, in nearly equal parts.
template <bool ADD>
INLINE void multiply_wide(Left left, const float* right, long right_step, float* out, long out_row, long rows,
                          long vectors, long depth) {
  const long parts = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
  for (long part = 0; part < parts; part++) {
    const long first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
    const float* r = right + first * LANES;
    float* o = out + first * LANES;
    if (count == 3) multiply<ADD, 3>(left, r, right_step, o, out_row, rows, depth);
    else if (count == 2) multiply<ADD, 2>(left, r, right_step, o, out_row, rows, depth);
    else multiply<ADD, 1>(left, r, right_step, o, out_row, rows, depth);
  }
}

// A tile's scores, in parts of the width: their rounding error is multiplied by every harmonic.
template <long VECTORS>
INLINE void fill_scores(const float* rows, long row_step, const float* columns, long column_step, float* out,
                        long count, long width) {
  multiply<false, VECTORS>({rows, row_step, 1}, columns, column_step, out, TILE, count, std::min(width, SCORE_PART));
  for (long e = SCORE_PART; e < width; e += SCORE_PART)
    multiply<true, VECTORS>({rows + e, row_step, 1}, columns + e * column_step, column_step, out, TILE, count,
                            std::min(width - e, SCORE_PART));
}

// For the small products of a head, where code size matters more than speed.
__attribute__((noinline)) void multiply_small(Left left, const float* right, long right_step, float* out, long out_row,
                                              long rows, long columns, long depth) {
  multiply_wide<true>(left, right, right_step, out, out_row, rows, columns / LANES, depth);
}

} // namespace
