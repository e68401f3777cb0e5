// The weights of an antialiased resize along one axis, as Pillow has them, in 16-bit fixed point.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int PRECISION = 14;
constexpr int ONE = 1 << PRECISION;
constexpr int HALF = ONE / 2;

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

// Output i is the sum over t < taps of weights[i * taps + t] times input first[i] + t. Weights sum to ONE.
struct Filter {
  int taps = 0;
  std::vector<int> first;
  std::vector<int16_t> weights;

  int last(int i) const { return first[i] + taps; } // one past the input that is read, if with weight 0

  // Resizes inputs low .. high of `length` to `outputs`. Taps come in multiples of `group`, starts in multiples of
  // `align`; outputs beyond the last repeat it, up to a multiple of `block`.
  void plan(Interpolation kind, double low, double high, int length, int outputs, int group, int align, int block) {
    const double step = (high - low) / outputs, stretch = std::max(step, 1.0), support = reach(kind) * stretch;
    const int rounded = (outputs + block - 1) / block * block;
    first.resize(rounded);
    stops.resize(outputs);
    taps = 0;
    for (int i = 0; i < outputs; i++) {
      const double centre = low + (i + 0.5) * step;
      const int begin = std::min(std::max(0, int(centre - support + 0.5)), length - 1);
      stops[i] = std::max(begin + 1, std::min(length, int(centre + support + 0.5)));
      first[i] = begin / align * align;
      starts.resize(outputs);
      starts[i] = begin;
      taps = std::max(taps, stops[i] - first[i]);
    }
    taps = (taps + group - 1) / group * group;
    weights.assign(size_t(rounded) * taps, 0);
    for (int i = 0; i < outputs; i++) weigh(kind, low + (i + 0.5) * step, stretch, i);
    for (int i = outputs; i < rounded; i++) {
      first[i] = first[outputs - 1];
      std::copy_n(&weights[size_t(outputs - 1) * taps], taps, &weights[size_t(i) * taps]);
    }
  }

 private:
  std::vector<int> starts, stops;
  std::vector<double> heights;

  void weigh(Interpolation kind, double centre, double stretch, int i) {
    const int begin = starts[i], count = stops[i] - begin;
    heights.resize(count);
    double sum = 0.0;
    for (int t = 0; t < count; t++) sum += heights[t] = height(kind, (begin + t - centre + 0.5) / stretch);
    int16_t* to = &weights[size_t(i) * taps] + (begin - first[i]);
    int rest = ONE, largest = 0;
    for (int t = 0; t < count; t++) {
      to[t] = int16_t(std::lrint(heights[t] / sum * ONE));
      rest -= to[t];
      if (to[t] > to[largest]) largest = t;
    }
    to[largest] = int16_t(to[largest] + rest); // so that a flat colour stays what it is
  }
};

} // namespace
