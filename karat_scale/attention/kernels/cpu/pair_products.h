// Products of matrices of bfloat16 pairs, summed in float32: by AMX tiles, or by AVX-512's products of pairs.

#pragma once

#include <algorithm>

#include "pairs.h"

namespace {

// Row i of tile t at depth block k is the vector at data + t * tile + k * block + i * row; a tile has 16 rows.
struct Operand {
  const Pair* data;
  long row, tile, block;

  static Operand left(const Pair* data, long row) { return {data, row, 16 * row, PAIRS}; }
  static Operand right(const Pair* data, long row) { return {data, row, PAIRS, 16 * row}; }
  Operand moved(long pairs) const { return {data + pairs, row, tile, block}; }
  const Pair* at(long t, long k) const { return data + t * tile + k * block; }
};

// Where 16 x 16 sums go: row i of tile (t, u) is at data + t * tile + u * 16 + i * row.
struct Result {
  float* data;
  long row, tile;

  static Result rows(float* data, long row) { return {data, row, 16 * row}; }
};

#if defined(__AMX_BF16__)

constexpr long PARTS = 2; // of dH for the gradients of scores and coefficients: tiles are cheap

// The tile registers of a thread, all 16 rows of 64 bytes, from construction to destruction.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {};
    shape.palette = 1;
    for (int t = 0; t < 8; t++) shape.bytes[t] = 64, shape.rows[t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }
};

// The compilers' own functions take only literal register numbers, and GCC's do not order loads after stores.
template <int T>
INLINE void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
INLINE void load_tile(const void* data, long stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(data), "r"(stride * 4) : "memory");
}
template <int T>
INLINE void store_tile(void* data, long stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(data), "r"(stride * 4) : "memory");
}
template <int SUM, int LEFT, int RIGHT>
INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

// ROWS x COLUMNS tiles of sums, each 1 or 2: registers 0..3 hold sums, 4 and 5 left tiles, 6 and 7 right ones. Tiles
// are taken whole: pairs beyond the last are zero in one operand.
template <bool ADD, int ROWS, int COLUMNS>
INLINE void multiply_block(Operand left, Operand right, Result out, long, long pairs, long in_block) {
  constexpr bool lower = ROWS == 2, further = COLUMNS == 2;
  float *upper_out = out.data, *lower_out = out.data + out.tile;
  if constexpr (ADD) {
    load_tile<0>(upper_out, out.row);
    if constexpr (further) load_tile<1>(upper_out + 16, out.row);
    if constexpr (lower) load_tile<2>(lower_out, out.row);
    if constexpr (lower && further) load_tile<3>(lower_out + 16, out.row);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (long k = 0; k * in_block < pairs; k++) {
    load_tile<4>(left.at(0, k), left.row);
    load_tile<6>(right.at(0, k), right.row);
    multiply_tiles<0, 4, 6>();
    if constexpr (further) load_tile<7>(right.at(1, k), right.row), multiply_tiles<1, 4, 7>();
    if constexpr (lower) load_tile<5>(left.at(1, k), left.row), multiply_tiles<2, 5, 6>();
    if constexpr (lower && further) multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(upper_out, out.row);
  if constexpr (further) store_tile<1>(upper_out + 16, out.row);
  if constexpr (lower) store_tile<2>(lower_out, out.row);
  if constexpr (lower && further) store_tile<3>(lower_out + 16, out.row);
}

#else

constexpr long PARTS = 1;

struct Tiles {}; // there are none to set up

// ROWS x COLUMNS tiles of sums, each 1 or 2, of which 16 vectors at a time are in registers.
template <bool ADD, int ROWS, int COLUMNS>
INLINE void multiply_block(Operand left, Operand right, Result out, long rows, long pairs, long in_block) {
  constexpr long AT_ONCE = 16 / COLUMNS;
  for (long begin = 0; begin < std::min(16l * ROWS, rows); begin += AT_ONCE) {
    const long t = begin / 16, i = begin % 16;
    float* sums = out.data + t * out.tile + i * out.row;
    Vec sum[AT_ONCE][COLUMNS] = {};
    if constexpr (ADD)
      UNROLL for (long n = 0; n < AT_ONCE; n++)
        UNROLL for (long u = 0; u < COLUMNS; u++) sum[n][u] = load(sums + n * out.row + 16 * u);
    for (long k = 0; k * in_block < pairs; k++) {
      const Pair *from = left.at(t, k) + i * left.row, *first = right.at(0, k);
      const long count = std::min(in_block, pairs - k * in_block);
      for (long pair = 0; pair < count; pair++) {
        __m512i column[COLUMNS];
        UNROLL for (long u = 0; u < COLUMNS; u++) column[u] = load(first + u * right.tile + pair * right.row);
        UNROLL for (long n = 0; n < AT_ONCE; n++) {
          int both;
          std::memcpy(&both, from + n * left.row + pair, sizeof(both));
          const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
          UNROLL for (long u = 0; u < COLUMNS; u++)
            sum[n][u] = (Vec)_mm512_dpbf16_ps((__m512)sum[n][u], row, (__m512bh)column[u]);
        }
      }
    }
    UNROLL for (long n = 0; n < AT_ONCE; n++)
      UNROLL for (long u = 0; u < COLUMNS; u++) store(sums + n * out.row + 16 * u, sum[n][u]);
  }
}

#endif

// out (+)= left right: `rows` x `columns` sums over `pairs` in depth, the first `in_block` of each block of 16. Columns
// are written to whole tiles, rows to half ones at least.
template <bool ADD>
INLINE void multiply(Operand left, Operand right, Result out, long rows, long columns, long pairs,
                     long in_block = PAIRS) {
  for (long u = 0; 16 * u < columns; u += 2)
    for (long t = 0; 16 * t < rows; t += 2) {
      const Operand l{left.at(t, 0), left.row, left.tile, left.block};
      const Operand r{right.at(u, 0), right.row, right.tile, right.block};
      const Result o{out.data + t * out.tile + u * 16, out.row, out.tile};
      const long rest = rows - 16 * t;
      const bool lower = rest > 16, further = 16 * (u + 1) < columns;
      if (lower && further) multiply_block<ADD, 2, 2>(l, r, o, rest, pairs, in_block);
      else if (lower) multiply_block<ADD, 2, 1>(l, r, o, rest, pairs, in_block);
      else if (further) multiply_block<ADD, 1, 2>(l, r, o, rest, pairs, in_block);
      else multiply_block<ADD, 1, 1>(l, r, o, rest, pairs, in_block);
    }
}

// The same for operands in two parts: the low ones lie that many pairs after the high ones, or at 0 where there are
// none. The product of two low parts is too small to count.
template <bool ADD>
void multiply_parts(Operand left, long left_low, Operand right, long right_low, Result out, long rows, long columns,
                    long pairs) {
  multiply<ADD>(left, right, out, rows, columns, pairs);
  if (left_low) multiply<true>(left.moved(left_low), right, out, rows, columns, pairs);
  if (right_low) multiply<true>(left, right.moved(right_low), out, rows, columns, pairs);
}

} // namespace
