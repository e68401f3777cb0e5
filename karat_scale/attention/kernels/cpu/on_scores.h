// What a call has for every pair of tokens, a bias and a mask, at tiles of scores.

#pragma once

#include "shape.h"

namespace {

// All bits of a lane are set where a pair takes part.
struct Flag { uint8_t byte; };
using Flags = uint8_t __attribute__((vector_size(LANES)));
using LooseFlags = uint8_t __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE Vec load(const Flag* p) {
  const Flags bytes = *reinterpret_cast<const LooseFlags*>(p);
  return (Vec)(__builtin_convertvector(bytes, Bits) != 0);
}

// The part of an item's head; null without a tensor.
template <typename T>
T* item(const OnScores& x, long b, long h) {
  return x.data ? static_cast<T*>(x.data) + b * x.batch + h * x.head : nullptr;
}

// LANES queries, a vector of keys each, from one pair of tokens on; zero beyond the last tokens.
template <typename T>
INLINE void read_block(const T* head, const OnScores& x, long tokens, long query, long key, Vec (&rows)[LANES]) {
  const long keys = std::min(LANES, tokens - key), queries = std::min(LANES, tokens - query);
  for (long i = 0; i < LANES; i++) {
    const T* from = head + (query + i) * x.query + key * x.key;
    T rest[LANES] = {};
    if (i < queries && (keys < LANES || x.key != 1))
      for (long j = 0; j < keys; j++) rest[j] = from[j * x.key];
    rows[i] = i < queries && keys == LANES && x.key == 1 ? load(from) : load(rest);
  }
}

// Calls body(row, vector's place in the row, what x has there) for a tile of `rows` by `columns`. Its rows are queries
// from token `row` on and its columns keys from token `column` on, or the other way round with BY_KEY.
template <bool BY_KEY, typename T, typename Body>
INLINE void for_pairs(const T* head, const OnScores& x, long tokens, long row, long column, long rows, long columns,
                      Body body) {
  for (long v = 0; v < columns; v += LANES) for (long i = 0; i < rows; i += LANES) {
    Vec block[LANES];
    if (BY_KEY) read_block(head, x, tokens, column + v, row + i, block), transpose(block);
    else read_block(head, x, tokens, row + i, column + v, block);
    for (long k = 0; k < std::min(LANES, rows - i); k++) body(i + k, v, block[k]);
  }
}

template <bool BY_KEY>
__attribute__((noinline)) void add_bias(const float* bias, const OnScores& x, long tokens, long row, long column,
                                        float* scores, long rows, long columns) {
  for_pairs<BY_KEY>(bias, x, tokens, row, column, rows, columns, [&](long i, long v, Vec term) {
    float* at = scores + i * TILE + v;
    store(at, load(at) + term);
  });
}

// Zeros for masked pairs in `count` tiles of `rows` rows each, whatever is there.
template <bool BY_KEY>
__attribute__((noinline)) void cut(const Flag* mask, const OnScores& x, long tokens, long row, long column,
                                   float* tiles, long rows, long columns, long count) {
  for_pairs<BY_KEY>(mask, x, tokens, row, column, rows, columns, [&](long i, long v, Vec keep) {
    for (long tile = 0; tile < count; tile++) {
      float* at = tiles + (tile * rows + i) * TILE + v;
      store(at, (Vec)((Bits)load(at) & (Bits)keep));
    }
  });
}

// Adds the gradients of a tile of scores, queries by keys, to that of the bias.
inline void add_to_grad_bias(const float* grad_scores, float* grad_bias, const OnScores& x, long tokens, long row,
                             long column, long rows, long columns) {
  for (long i = 0; i < std::min(rows, tokens - row); i++)
    for (long v = 0; v < columns; v += LANES) {
      const float* from = grad_scores + i * TILE + v;
      float* to = grad_bias + (row + i) * x.query + (column + v) * x.key;
      if (!x.key) to[0] += lanes_sum(load(from));
      else for (long j = 0; j < std::min(LANES, tokens - column - v); j++) to[j] += from[j];
    }
}

} // namespace
