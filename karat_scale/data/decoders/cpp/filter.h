// The weights of an antialiased resize along one axis, as Pillow has them, in 16-bit fixed point.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

enum class Interpolation { bilinear = 0, bicubic = 1 };

inline double reach(Interpolation kind) { return kind == Interpolation::bilinear ? 1.0 : 2.0; }

inline double height(Interpolation kind, double x) {
  x = std::fabs(x);
  if (x >= reach(kind)) return 0.0;
  if (kind == Interpolation::bilinear) return 1.0 - x;
  constexpr double a = -0.5; // Keys' cubic
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
}

// Output i is the sum over t < taps of weights[i * taps + t] times input first[i] + t, over 2^precision.
struct Filter {
  int taps = 0, precision = 0;
  std::vector<int> first;
  std::vector<int16_t> weights;

  // Resizes inputs low .. high of `length` to `outputs`. Taps come in multiples of `group` and begin at multiples of
  // `align`; the last output is repeated up to a multiple of `block`.
  void plan(Interpolation kind, double low, double high, int length, int outputs, int group, int align, int block) {
    const double step = (high - low) / outputs, stretch = std::max(step, 1.0), support = reach(kind) * stretch;
    const int rounded = (outputs + block - 1) / block * block;
    first.resize(size_t(rounded));
    begins.resize(size_t(outputs));
    ends.resize(size_t(outputs));
    taps = 0;
    for (int i = 0; i < outputs; i++) {
      const double centre = low + (i + 0.5) * step;
      begins[i] = std::min(std::max(0, int(centre - support + 0.5)), length - 1);
      ends[i] = std::max(begins[i] + 1, std::min(length, int(centre + support + 0.5)));
      first[i] = begins[i] / align * align;
      taps = std::max(taps, ends[i] - first[i]);
    }
    taps = (taps + group - 1) / group * group;
    exact.assign(size_t(outputs) * size_t(taps), 0.0);
    for (int i = 0; i < outputs; i++) {
      const double centre = low + (i + 0.5) * step;
      const int count = ends[i] - begins[i];
      double* to = &exact[size_t(i) * size_t(taps) + size_t(begins[i] - first[i])];
      double sum = 0.0;
      for (int t = 0; t < count; t++) sum += to[t] = height(kind, (begins[i] + t - centre + 0.5) / stretch);
      for (int t = 0; t < count; t++) to[t] /= sum;
    }
    quantise(outputs, rounded);
  }

 private:
  // Sums of 8-bit pixels times weights stay below 2^31, and weights below 2^15.
  static constexpr int MOST_BITS = 21;
  static constexpr double MOST_WEIGHT = 32000.0;

  std::vector<int> begins, ends;
  std::vector<double> exact;

  void quantise(int outputs, int rounded) {
    const double largest = *std::max_element(exact.begin(), exact.end());
    for (precision = MOST_BITS; std::ldexp(largest, precision) > MOST_WEIGHT;) precision--;
    const double one = std::ldexp(1.0, precision);
    weights.resize(size_t(rounded) * size_t(taps));
    for (int i = 0; i < outputs; i++) {
      const double* from = &exact[size_t(i) * size_t(taps)];
      int16_t* to = &weights[size_t(i) * size_t(taps)];
      // Rounded sums rather than summed rounds, so that weights add up to one and a flat colour stays what it is.
      double sum = 0.0;
      int before = 0;
      for (int t = 0; t < taps; t++) {
        const int now = int(std::lrint(sum += from[t] * one));
        to[t] = int16_t(now - before);
        before = now;
      }
    }
    for (int i = outputs; i < rounded; i++) {
      first[i] = first[outputs - 1];
      std::copy_n(&weights[size_t(outputs - 1) * size_t(taps)], taps, &weights[size_t(i) * size_t(taps)]);
    }
  }
};

} // namespace
