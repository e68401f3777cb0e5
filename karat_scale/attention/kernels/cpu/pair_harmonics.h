// cos(m x) and sin(m x) for products of pairs: float32 by shorter polynomials, as they are rounded to bfloat16 after.

#pragma once

#include "harmonics.h"
#include "pairs.h"

namespace {

// For x in half turns (x = 1 is the angle pi): within 8e-6 of cosine and sine, of which the m-th harmonics are m times
// as far from theirs. The clamp keeps the harmonics of scores that keep no phase in a float bounded; those of infinity
// and NaN are NaN.
INLINE void half_turns(Vec x, Vec& sine, Vec& cosine) {
  constexpr float LIMIT = 0.5f, ROUNDING = 0x1.8p23f;
  const Vec shifted = x + ROUNDING; // its last bit is the parity of the half turns
  const Vec r = clamp(x - (shifted - ROUNDING), LIMIT);
  const Vec z = r * r;
  const Vec s = ((-0.55463448f * z + 2.5418984f) * z - 5.1671427f) * z + 3.1415820f;
  const Vec c = ((-1.2264886f * z + 4.0431641f) * z - 4.9341668f) * z + 1.0f;
  const Bits sign = (Bits)shifted << 31;
  sine = (Vec)((Bits)(s * r) ^ sign);
  cosine = (Vec)((Bits)c ^ sign);
}

template <long GRID>
struct Harmonics {
  Vec cosine[(GRID ? GRID : MAX_GRID) + 1], sine[(GRID ? GRID : MAX_GRID) + 1];

  INLINE Harmonics(Vec half, long grid) {
    cosine[0] = broadcast(1);
    sine[0] = Vec{};
    half_turns(half, sine[1], cosine[1]);
    add_angles(cosine, sine, GRID ? GRID : grid);
  }
};

} // namespace
