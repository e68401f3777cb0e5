// The two passes of the resize. Integers throughout, so every instruction set gives the same pixels.
//
// across: two decoded rows, RGBX, to two rows of the output's width. Both lie in one pair row: three planes, in which
// the bytes of the two rows alternate. down: pair rows to an output row.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "filter.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int PIXEL = 4;         // bytes of RGBX
constexpr int ACROSS_TAPS = 4;   // taps come in fours
constexpr int ACROSS_BLOCK = 4;  // and outputs in fours
constexpr int DOWN_TAPS = 2;     // a pair row holds two rows
constexpr int DOWN_BLOCK = 32;   // outputs of one plane at a time

inline int plane_bytes(int width) { return 2 * ((width + DOWN_BLOCK - 1) / DOWN_BLOCK * DOWN_BLOCK); }

#if defined(__AVX2__)

inline __m256i four_pixels(const uint8_t* p) { // to 16 bits, neighbours side by side: R0 R1 G0 G1 .. | R2 R3 G2 G3 ..
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i order = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,
                                         8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
  return _mm256_shuffle_epi8(both, order);
}

inline __m256i four_weights(const int16_t* w) { // W0 W1 W0 W1 .. | W2 W3 W2 W3 ..
  int64_t four;
  std::memcpy(&four, w, 8);
  const __m256i order = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_cvtsi64_si128(four)), order);
}

inline void across(const uint8_t* upper, const uint8_t* lower, const Filter& filter, int width, uint8_t* pair) {
  const int plane = plane_bytes(width), taps = filter.taps;
  const __m256i half = _mm256_set1_epi32(1 << (filter.precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(filter.precision);
  const __m256i by_plane = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int x = 0; x < width; x += ACROSS_BLOCK) {
    __m256i sums[ACROSS_BLOCK];
    for (int i = 0; i < ACROSS_BLOCK; i++) {
      const int16_t* w = &filter.weights[size_t(x + i) * size_t(taps)];
      const size_t from = size_t(filter.first[x + i]) * PIXEL;
      __m256i u = _mm256_setzero_si256(), l = u;
      for (int t = 0; t < taps; t += ACROSS_TAPS) {
        const __m256i four = four_weights(w + t);
        u = _mm256_add_epi32(u, _mm256_madd_epi16(four_pixels(upper + from + t * PIXEL), four));
        l = _mm256_add_epi32(l, _mm256_madd_epi16(four_pixels(lower + from + t * PIXEL), four));
      }
      const __m256i even = _mm256_permute2x128_si256(u, l, 0x20), odd = _mm256_permute2x128_si256(u, l, 0x31);
      sums[i] = _mm256_sra_epi32(_mm256_add_epi32(_mm256_add_epi32(even, odd), half), shift);
    }
    const __m256i left = _mm256_packs_epi32(sums[0], sums[1]), right = _mm256_packs_epi32(sums[2], sums[3]);
    const __m256i planes = _mm256_shuffle_epi8(_mm256_packus_epi16(left, right), by_plane);
    const __m128i u = _mm256_castsi256_si128(planes), l = _mm256_extracti128_si256(planes, 1);
    const __m128i red_green = _mm_unpacklo_epi8(u, l), blue = _mm_unpackhi_epi8(u, l);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pair + 2 * x), red_green);
    _mm_storeh_pd(reinterpret_cast<double*>(pair + plane + 2 * x), _mm_castsi128_pd(red_green));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(pair + 2 * plane + 2 * x), blue);
  }
}

// 32 outputs of one plane, in row y of the output.
#if defined(__AVX512BW__)

inline void down(const uint8_t* pairs, size_t stride, const Filter& filter, int y, uint8_t* to) {
  const int taps = filter.taps;
  const int16_t* weights = &filter.weights[size_t(y) * size_t(taps)];
  __m512i sums[2];
  for (__m512i& sum : sums) sum = _mm512_set1_epi32(1 << (filter.precision - 1));
  for (int t = 0; t < taps; t += DOWN_TAPS, pairs += stride) {
    int32_t two;
    std::memcpy(&two, weights + t, 4);
    for (int i = 0; i < 2; i++) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs + 32 * i));
      sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(_mm512_cvtepu8_epi16(bytes), _mm512_set1_epi32(two)));
    }
  }
  for (int i = 0; i < 2; i++) {
    const __m512i sum = _mm512_sra_epi32(sums[i], _mm_cvtsi32_si128(filter.precision));
    const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sum, _mm512_setzero_si512()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), bytes);
  }
}

#else

inline void down(const uint8_t* pairs, size_t stride, const Filter& filter, int y, uint8_t* to) {
  const int taps = filter.taps;
  const int16_t* weights = &filter.weights[size_t(y) * size_t(taps)];
  __m256i sums[4];
  for (__m256i& sum : sums) sum = _mm256_set1_epi32(1 << (filter.precision - 1));
  for (int t = 0; t < taps; t += DOWN_TAPS, pairs += stride) {
    int32_t two;
    std::memcpy(&two, weights + t, 4);
    for (int i = 0; i < 4; i++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs + 16 * i));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi32(two)));
    }
  }
  for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, _mm_cvtsi32_si128(filter.precision));
  const __m256i packed =
      _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
  const __m256i in_order = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), in_order);
}

#endif

#else

inline uint8_t to_byte(int32_t sum, int precision) {
  return uint8_t(std::min(255, std::max(0, (sum + (1 << (precision - 1))) >> precision)));
}

inline void across(const uint8_t* upper, const uint8_t* lower, const Filter& filter, int width, uint8_t* pair) {
  const int plane = plane_bytes(width), taps = filter.taps;
  for (int x = 0; x < width; x++) {
    const int16_t* w = &filter.weights[size_t(x) * size_t(taps)];
    const size_t from = size_t(filter.first[x]) * PIXEL;
    int32_t sums[2][PIXEL] = {};
    for (int t = 0; t < taps; t++) {
      for (int c = 0; c < PIXEL; c++) {
        sums[0][c] += w[t] * upper[from + t * PIXEL + c];
        sums[1][c] += w[t] * lower[from + t * PIXEL + c];
      }
    }
    for (int c = 0; c < 3; c++) {
      pair[c * plane + 2 * x] = to_byte(sums[0][c], filter.precision);
      pair[c * plane + 2 * x + 1] = to_byte(sums[1][c], filter.precision);
    }
  }
}

inline void down(const uint8_t* pairs, size_t stride, const Filter& filter, int y, uint8_t* to) {
  const int taps = filter.taps;
  const int16_t* weights = &filter.weights[size_t(y) * size_t(taps)];
  int32_t sums[DOWN_BLOCK] = {};
  for (int t = 0; t < taps; t += DOWN_TAPS, pairs += stride) {
    const int32_t upper = weights[t], lower = weights[t + 1];
    for (int i = 0; i < DOWN_BLOCK; i++) sums[i] += upper * pairs[2 * i] + lower * pairs[2 * i + 1];
  }
  for (int i = 0; i < DOWN_BLOCK; i++) to[i] = to_byte(sums[i], filter.precision);
}

#endif

} // namespace
