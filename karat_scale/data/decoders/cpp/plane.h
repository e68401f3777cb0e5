// A plane of bytes, and its antialiased resize in integers: down the columns, then along the rows as columns.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "filter.h"
#include "passes.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

inline int rounded_up(int count, int to) { return (count + to - 1) / to * to; }

// Rows of bytes with room to spare, so that work in blocks of up to 32 x 32 stays inside.
struct Plane {
  size_t stride = 0;
  std::vector<uint8_t> memory;

  void fit(int columns, int rows) {
    stride = size_t(rounded_up(columns, DOWN_BLOCK));
    const size_t size = stride * size_t(rounded_up(rows, DOWN_BLOCK));
    if (memory.size() < size) memory.resize(size);
  }

  uint8_t* row(int number) { return memory.data() + stride * size_t(number); }
  const uint8_t* row(int number) const { return memory.data() + stride * size_t(number); }

  // Repeats the last column and row up to the given sizes.
  void extend(int columns, int rows, int wanted_columns, int wanted_rows) {
    for (int y = 0; y < rows; y++) std::memset(row(y) + columns, row(y)[columns - 1], size_t(wanted_columns - columns));
    for (int y = rows; y < wanted_rows; y++) std::memcpy(row(y), row(rows - 1), size_t(wanted_columns));
  }
};

// Means of 2 x 2 pixels; what is beyond an odd number of columns or rows is as the last one.
inline void halve(Plane& in, int columns, int rows, Plane& out) {
  const int half_columns = (columns + 1) / 2, half_rows = (rows + 1) / 2;
  out.fit(half_columns, half_rows);
  for (int y = 0; y < half_rows; y++) {
    uint8_t* upper = in.row(2 * y);
    uint8_t* lower = 2 * y + 1 < rows ? in.row(2 * y + 1) : upper;
    if (columns % 2) upper[columns] = upper[columns - 1], lower[columns] = lower[columns - 1];
    uint8_t* to = out.row(y);
    for (int x = 0; x < half_columns; x++) {
      to[x] = uint8_t((upper[2 * x] + upper[2 * x + 1] + lower[2 * x] + lower[2 * x + 1] + 2) >> 2);
    }
  }
}

constexpr int TURNED = 8; // rows and columns of a block that is transposed at a time

#if defined(__SSE2__)

inline void turn_block(const uint8_t* from, size_t from_stride, uint8_t* to, size_t to_stride) {
  __m128i r[TURNED];
  for (int i = 0; i < TURNED; i++) r[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + from_stride * size_t(i)));
  __m128i pairs[4];
  for (int i = 0; i < 4; i++) pairs[i] = _mm_unpacklo_epi8(r[2 * i], r[2 * i + 1]);
  const __m128i a = _mm_unpacklo_epi16(pairs[0], pairs[1]), b = _mm_unpackhi_epi16(pairs[0], pairs[1]);
  const __m128i c = _mm_unpacklo_epi16(pairs[2], pairs[3]), d = _mm_unpackhi_epi16(pairs[2], pairs[3]);
  const __m128i two[4] = {_mm_unpacklo_epi32(a, c), _mm_unpackhi_epi32(a, c), _mm_unpacklo_epi32(b, d),
                          _mm_unpackhi_epi32(b, d)};
  for (int i = 0; i < 4; i++) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + to_stride * size_t(2 * i)), two[i]);
    _mm_storeh_pd(reinterpret_cast<double*>(to + to_stride * size_t(2 * i + 1)), _mm_castsi128_pd(two[i]));
  }
}

inline void turn_block(const uint16_t* from, size_t from_stride, uint16_t* to, size_t to_stride) {
  __m128i r[TURNED];
  for (int i = 0; i < TURNED; i++) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + from_stride * size_t(i)));
  __m128i s[TURNED], t[TURNED];
  for (int i = 0; i < 4; i++) {
    s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (int half = 0; half < 2; half++) {
    for (int side = 0; side < 2; side++) {
      t[4 * half + 2 * side] = _mm_unpacklo_epi32(s[4 * half + side], s[4 * half + 2 + side]);
      t[4 * half + 2 * side + 1] = _mm_unpackhi_epi32(s[4 * half + side], s[4 * half + 2 + side]);
    }
  }
  for (int i = 0; i < 4; i++) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + to_stride * size_t(2 * i)), _mm_unpacklo_epi64(t[i], t[4 + i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + to_stride * size_t(2 * i + 1)), _mm_unpackhi_epi64(t[i], t[4 + i]));
  }
}

#else

template <typename T>
inline void turn_block(const T* from, size_t from_stride, T* to, size_t to_stride) {
  for (int y = 0; y < TURNED; y++) {
    for (int x = 0; x < TURNED; x++) to[to_stride * size_t(x) + size_t(y)] = from[from_stride * size_t(y) + size_t(x)];
  }
}

#endif

// Columns become rows. Both ends have room for whole blocks; strides count elements.
template <typename T>
inline void turn(const T* from, size_t from_stride, int columns, int rows, T* to, size_t to_stride) {
  for (int x = 0; x < columns; x += TURNED) {
    for (int y = 0; y < rows; y += TURNED) {
      turn_block(from + from_stride * size_t(y) + size_t(x), from_stride, to + to_stride * size_t(x) + size_t(y),
                 to_stride);
    }
  }
}

// The filter along one axis; planned again only if the sizes differ from the image before.
class Axis {
 public:
  Filter filter;

  // Inputs 0 .. length, of which the image reaches over `extent`, to outputs over `reach`.
  void plan(double extent, int length, double reach, int outputs) {
    if (extent == planned_extent && length == planned_length && reach == planned_reach) return;
    filter.plan(Interpolation::bicubic, 0.0, extent / reach * outputs, length, outputs, DOWN_TAPS, DOWN_TAPS, 1);
    planned_extent = extent, planned_length = length, planned_reach = reach;
  }

 private:
  double planned_extent = 0.0, planned_reach = 0.0;
  int planned_length = 0;
};

class PlaneResizer {
 public:
  // A plane of columns x rows, over which the image reaches `width` x `height`, to one of which it reaches over
  // `out_width` x `out_height`, as cubic interpolation with Pillow's weights has it.
  void resize(const Plane& in, double width, double height, int columns, int rows, double out_width, double out_height,
              int out_columns, int out_rows, Plane& out) {
    across.plan(width, columns, out_width, out_columns);
    along.plan(height, rows, out_height, out_rows);
    pair_rows(in, columns, rows);
    narrow.fit(columns, out_rows);
    filtered(pairs, along.filter, out_rows, columns, narrow);
    // Neighbours in a row are two bytes that stay together, so the transposed rows come in pairs.
    fit_pairs(out_rows, columns, across.filter.taps);
    turn(reinterpret_cast<const uint16_t*>(narrow.memory.data()), narrow.stride / 2, (columns + 1) / 2, out_rows,
         reinterpret_cast<uint16_t*>(pairs.memory.data()), pairs.stride / 2);
    turned.fit(out_rows, out_columns);
    filtered(pairs, across.filter, out_columns, out_rows, turned);
    out.fit(out_columns, out_rows);
    turn(turned.memory.data(), turned.stride, out_rows, out_columns, out.memory.data(), out.stride);
  }

 private:
  Axis across, along;
  Plane pairs, narrow, turned;

  // Each pair row holds two rows of `columns`, their bytes alternating. Filters look beyond the last, with weight 0.
  void fit_pairs(int columns, int rows, int taps) {
    pairs.fit(2 * rounded_up(columns, DOWN_BLOCK), (rows + 1) / 2 + taps / DOWN_TAPS + TURNED);
  }

  void pair_rows(const Plane& in, int columns, int rows) {
    fit_pairs(columns, rows, along.filter.taps);
    for (int y = 0; y < rows; y += 2) {
      const uint8_t* upper = in.row(y);
      const uint8_t* lower = y + 1 < rows ? in.row(y + 1) : upper;
      uint8_t* to = pairs.row(y / 2);
      for (int x = 0; x < columns; x++) to[2 * x] = upper[x], to[2 * x + 1] = lower[x];
    }
  }

  static void filtered(const Plane& pairs, const Filter& filter, int outputs, int columns, Plane& out) {
    for (int y = 0; y < outputs; y++) {
      const uint8_t* from = pairs.row(filter.first[size_t(y)] / DOWN_TAPS);
      for (int x = 0; x < columns; x += DOWN_BLOCK) down(from + 2 * x, pairs.stride, filter, y, out.row(y) + x);
    }
  }
};

} // namespace
