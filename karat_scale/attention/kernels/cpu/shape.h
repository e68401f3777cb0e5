// How the float32 kernel pads a call, and the tiles it takes it in.

#pragma once

#include "call.h"
#include "memory.h"
#include "products.h"

namespace {

// Tokens as columns and as rows are padded to multiples of these; never to more rows than whole vectors of columns.
constexpr long UNIT = 16, ROW_UNIT = std::min(8l, LANES);

struct Shape : Sizes {
  long vectors;       // of a row of tokens
  long rows;          // tokens, padded as rows of a product
  long token_step;    // tokens, padded as columns; an odd number of cache lines, so that columns use all cache sets
  long width_step;    // d, padded
  long units;         // r, padded as rows of a product
  long unit_step;     // r, padded as columns
  bool has_psi, has_mask;

  explicit Shape(const Call& c)
      : Sizes(c), vectors((tokens + LANES - 1) / LANES), rows(round_up(tokens, ROW_UNIT)),
        token_step((round_up(tokens, UNIT) / UNIT | 1) * UNIT), width_step(round_up(width, LANES)),
        units(round_up(rank, 4)), unit_step(round_up(rank, LANES)), has_psi(c.psi), has_mask(c.mask.data) {}

  long columns() const { return vectors * LANES; } // tokens, padded to whole vectors
};

// Calls body(the number of vectors, as a type; the first column) for tiles of nearly equal width over all tokens.
template <typename Body>
void for_tiles(const Shape& s, Body body) {
  const long tiles = (s.vectors + MAX_VECTORS - 1) / MAX_VECTORS;
  for (long tile = 0; tile < tiles; tile++) {
    const long first = s.vectors * tile / tiles, count = s.vectors * (tile + 1) / tiles - first;
    if (count == 3) body(std::integral_constant<long, 3>{}, first * LANES);
    else if (count == 2) body(std::integral_constant<long, 2>{}, first * LANES);
    else body(std::integral_constant<long, 1>{}, first * LANES);
  }
}

// W of a head [N][r] -> [columns][unit_step].
void pack_projector(const Call& c, const Shape& s, long h, float* out) {
  read_rows(c.projector + h * s.tokens * s.rank, s.rank, out, s.unit_step, s.tokens, s.rank, 1.0f);
}

} // namespace
