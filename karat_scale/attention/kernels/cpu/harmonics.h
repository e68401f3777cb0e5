// The features of a tile of scores: cos(m x) and sin(m x) for m = 1..G, in float32.

#pragma once

#include "products.h"

namespace {

constexpr long MAX_GRID = 64;

// Reduction by pi in two steps (the fused product is exact), then minimax polynomials on [-pi/2, pi/2]: within 2 units
// of the last place of 1. Beyond 2^20 a float's spacing leaves no phase to keep; the clamp keeps the harmonics of such
// scores bounded. Those of infinity are NaN.
INLINE void sine_and_cosine(Vec x, Vec& sine, Vec& cosine) {
  constexpr float LIMIT = 2, ROUNDING = 0x1.8p23f; // the limit is beyond pi/2, however the reduction is rounded
  const Vec shifted = x * 0x1.45f306p-2f + ROUNDING; // x / pi, rounded; its last bit is the parity
  const Vec turns = shifted - ROUNDING;
  Vec r = x - turns * 0x1.921fb6p+1f;
  r = clamp(r + turns * 0x1.777a5cp-24f, LIMIT);
  const Vec z = r * r;
  const Vec s = ((2.5999032e-06f * z - 1.9806547e-04f) * z + 8.3330163550e-03f) * z - 1.6666657059e-01f;
  Vec c = ((-2.6075662320e-07f * z + 2.4761808140e-05f) * z - 1.3888402069e-03f) * z + 4.1666640625e-02f;
  c = (c * z - 0.5f) * z + 1.0f;
  const Bits sign = (Bits)shifted << 31;
  sine = (Vec)((Bits)(s * (z * r) + r) ^ sign);
  cosine = (Vec)((Bits)c ^ sign);
}

// From the first harmonic to the `count`-th by angle addition of logarithmic depth:
// exp(i m x) = exp(i (a - b) x) + 2i sin(b x) exp(i a x) with a + b = m and a - b of 0 or 1.
INLINE void add_angles(Vec* cosine, Vec* sine, long count) {
  UNROLL for (long m = 2; m <= count; m++) {
    const long b = m / 2, a = m - b;
    const Vec twice = sine[b] + sine[b];
    cosine[m] = cosine[a - b] - twice * sine[a];
    sine[m] = sine[a - b] + twice * cosine[a];
  }
}

// Turns the scores in features[0] into cos(m x), m = 1..G, then sin(m x), each [rows][TILE]. GRID = 0: any G.
template <long VECTORS, long GRID>
INLINE void fill_harmonics(float* features, long rows, long grid) {
  const long count = GRID ? GRID : grid, size = rows * TILE;
  for (long i = 0; i < rows; i++) for (long v = 0; v < VECTORS; v++) {
    float* at = features + i * TILE + v * LANES;
    Vec cosine[(GRID ? GRID : MAX_GRID) + 1], sine[(GRID ? GRID : MAX_GRID) + 1];
    cosine[0] = broadcast(1);
    sine[0] = Vec{};
    sine_and_cosine(load(at), sine[1], cosine[1]);
    add_angles(cosine, sine, count);
    UNROLL for (long m = 1; m <= count; m++) {
      store(at + (m - 1) * size, cosine[m]);
      store(at + (count + m - 1) * size, sine[m]);
    }
  }
}

// Calls body(G as a type, or 0 for one not foreseen): with G known the harmonics stay in registers.
template <typename Body>
INLINE void for_grid(long grid, Body body) {
  switch (grid) {
    case 1: return body(std::integral_constant<long, 1>{});
    case 2: return body(std::integral_constant<long, 2>{});
    case 3: return body(std::integral_constant<long, 3>{});
    case 4: return body(std::integral_constant<long, 4>{});
    case 5: return body(std::integral_constant<long, 5>{});
    case 7: return body(std::integral_constant<long, 7>{});
    case 9: return body(std::integral_constant<long, 9>{});
    case 11: return body(std::integral_constant<long, 11>{});
    default: return body(std::integral_constant<long, 0>{});
  }
}

template <long VECTORS>
INLINE void fill_harmonics(float* features, long rows, long grid) {
  for_grid(grid, [&](auto known) { fill_harmonics<VECTORS, known>(features, rows, grid); });
}

} // namespace
