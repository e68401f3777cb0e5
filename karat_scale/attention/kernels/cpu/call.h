// What Python hands over (mirrored in cpu.py), and the reading and writing of its rows.

#pragma once

#include <cmath>
#include <cstring>

#include "vectors.h"

// [B, h, N, d] tensors with strides in elements, the last of them 1.
struct Strided {
  void* data;
  int64_t batch, head, token;
};

// A tensor that broadcasts to [B, h, N, N], with strides in elements that are 0 where it does; null data without one.
struct OnScores {
  void* data;
  int64_t batch, head, query, key;
};

// Parameters and H are contiguous float32: cosines, sines [h, r, N, G], projector [h, N, r], hidden [B, h, N, r].
// `psi` is null, or [h, 2 G + 1]: a head's function of each score, as its constant, cosines and sines. Its gradient is that
// of each item, [B, h, 2 G + 1]. `bias` is float32 and is added to the scores; its gradient is wanted where `grad_bias` has
// data, zeros of [B or 1, h, N or 1, N or 1]. `mask` is boolean. Only one of `psi` and these two is given.
struct Call {
  int64_t batch, heads, tokens, width, rank, grid, dtype, threads;
  Strided query, key, value, output;                     // of backward, output holds dO
  Strided grad_query, grad_key, grad_value;              // of backward only, as are the gradients below
  float *cosines, *sines, *projector, *hidden;
  float *grad_cosines, *grad_sines, *grad_projector;
  float *psi, *grad_psi;
  OnScores bias, mask, grad_bias;
};

namespace {

struct Sizes {
  long batch, heads, tokens, width, rank, grid;
  float scale;

  explicit Sizes(const Call& c)
      : batch(c.batch), heads(c.heads), tokens(c.tokens), width(c.width), rank(c.rank), grid(c.grid),
        scale(1 / std::sqrt((float)width)) {}

  long features() const { return 2 * grid; }
  long coefficient(long h, long p, long q, long m) const { return ((h * rank + p) * tokens + q) * grid + m; }
};

// Where backward adds what it finds of a head's gradients; null where there is none.
struct HeadGradients { float *coefficients, *projector, *bias, *psi; };

template <typename T>
T* item(const Strided& x, long b, long h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

// `tokens` rows of `width` elements T become rows of floats times `scale`, zero up to a whole vector.
template <typename T>
void read_rows(const T* in, long in_row, float* out, long out_row, long tokens, long width, float scale) {
  const long whole = width / LANES * LANES;
  for (long n = 0; n < tokens; n++) {
    const T* from = in + n * in_row;
    float* to = out + n * out_row;
    for (long e = 0; e < whole; e += LANES) store(to + e, load(from + e) * scale);
    if (whole < width) {
      T rest[LANES] = {};
      std::memcpy(rest, from + whole, (width - whole) * sizeof(T));
      store(to + whole, load(rest) * scale);
    }
  }
}

template <typename T>
void write_rows(const float* in, long in_row, T* out, long out_row, long tokens, long width) {
  const long whole = width / LANES * LANES;
  for (long n = 0; n < tokens; n++) {
    const float* from = in + n * in_row;
    T* to = out + n * out_row;
    for (long e = 0; e < whole; e += LANES) store(to + e, load(from + e));
    if (whole < width) {
      T rest[LANES];
      store(rest, load(from + whole));
      std::memcpy(to + whole, rest, (width - whole) * sizeof(T));
    }
  }
}

} // namespace
