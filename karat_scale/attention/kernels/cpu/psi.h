// A head's own function of each score, psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x), from a tile's features.

#pragma once

#include "harmonics.h"
#include "shape.h"

namespace {

// The 2 G + 1 numbers of a head: c, a, b; null without psi.
inline const float* psi_of(const Call& c, const Shape& s, long h) {
  return c.psi ? c.psi + h * (s.features() + 1) : nullptr;
}

// psi of `rows` x VECTORS vectors of scores, from their features [feature][row][TILE].
template <long VECTORS>
void fill_psi(const float* features, const float* psi, float* out, long rows, long grid) {
  const long size = rows * TILE;
  for (long i = 0; i < rows; i++) UNROLL for (long v = 0; v < VECTORS; v++) {
    const float* at = features + i * TILE + v * LANES;
    Vec sum = broadcast(psi[0]);
    for (long f = 0; f < 2 * grid; f++) sum += psi[1 + f] * load(at + f * size);
    store(out + i * TILE + v * LANES, sum);
  }
}

// Given dS = dO V^T of a tile: psi into `mixed`, dA += dS psi'(A), and what the tile adds to the gradient of psi.
template <long VECTORS>
void pull_back_psi(const float* features, const float* psi, const float* grad_mixed, float* mixed, float* grad_scores,
                   float* grad_psi, long rows, long grid) {
  const long size = rows * TILE;
  Vec total[2 * MAX_GRID + 1] = {};
  for (long i = 0; i < rows; i++) UNROLL for (long v = 0; v < VECTORS; v++) {
    const long place = i * TILE + v * LANES;
    const Vec upstream = load(grad_mixed + place);
    Vec value = broadcast(psi[0]), slope = {};
    total[0] += upstream;
    for (long m = 0; m < grid; m++) {
      const Vec cosine = load(features + m * size + place), sine = load(features + (grid + m) * size + place);
      const float a = psi[1 + m], b = psi[1 + grid + m], order = m + 1;
      value += a * cosine + b * sine;
      slope += order * b * cosine - order * a * sine;
      total[1 + m] += upstream * cosine;
      total[1 + grid + m] += upstream * sine;
    }
    store(mixed + place, value);
    store(grad_scores + place, load(grad_scores + place) + upstream * slope);
  }
  for (long f = 0; f < 2 * grid + 1; f++) grad_psi[f] += lanes_sum(total[f]);
}

} // namespace
