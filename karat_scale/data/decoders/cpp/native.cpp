// A view of a JPEG in one call: decodes only the rows and columns of the region, and resizes them while decoding.
//
// Without contraction, so that the resize's weights have the same bits on any instruction set.
// Build with: portable -ljpeg -ffp-contract=off

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "filter.h"
#include "passes.h"
#include "source.h"

namespace {

struct View {
  int32_t left, top, right, bottom;               // the region, in source pixels
  double box_left, box_top, box_right, box_bottom; // what is resized, in source pixels
  int32_t width, height;                          // of the output
  int32_t interpolation;
};

// One thread's decoder with the memory it works in, which grows to the largest view and stays.
class Decoder {
 public:
  JpegSource source;

  // Fills `out`, uint8 [3, height, width]. False when the data are doubtful.
  bool read(const View& view, uint8_t* out) {
    if (!is_inside(view)) return false;
    const int left = view.left, top = view.top;
    const int columns = view.right - left, rows = view.bottom - top;
    const auto kind = Interpolation(view.interpolation);
    x_filter.plan(kind, view.box_left - left, view.box_right - left, columns, view.width, ACROSS_TAPS, 1,
                  ACROSS_BLOCK);
    y_filter.plan(kind, view.box_top - top, view.box_bottom - top, rows, view.height, DOWN_TAPS, DOWN_TAPS, 1);
    // The rows of the region that the filter looks at; from an even one, since rows go in pairs.
    const int skipped = y_filter.first[0], last = std::min(rows, y_filter.first[view.height - 1] + y_filter.taps);
    int decoded_left = left, decoded_columns = 0;
    if (!source.start(8, &decoded_left, left + columns, top + skipped, &decoded_columns)) return false;
    return shrink_across(view.width, decoded_columns, left - decoded_left, skipped, last) && source.close() &&
           shrink_down(view, skipped, out);
  }

 private:
  static constexpr int STRIP = 16; // rows decoded at a time: few enough to stay in the nearest cache

  Filter x_filter, y_filter;
  std::vector<uint8_t> strip, pairs;

  static void grow(std::vector<uint8_t>& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
  }

  bool is_inside(const View& view) const {
    return 0 <= view.left && view.left < view.right && view.right <= source.width() &&
           0 <= view.top && view.top < view.bottom && view.bottom <= source.height() &&
           view.left <= view.box_left && view.box_left < view.box_right && view.box_right <= view.right &&
           view.top <= view.box_top && view.box_top < view.box_bottom && view.box_bottom <= view.bottom &&
           view.width > 0 && view.height > 0;
  }

  bool shrink_across(int width, int columns, int offset, int first, int last) {
    const size_t stride = size_t(columns) * PIXEL, pair_bytes = 3 * size_t(plane_bytes(width));
    const int pair_rows = (last - first + 1) / 2;
    // A filter reads whole groups of taps, so a little beyond the row's end, with weight 0.
    grow(strip, stride * STRIP + size_t(x_filter.taps) * PIXEL);
    grow(pairs, pair_bytes * size_t(pair_rows + y_filter.taps / 2));
    for (int row = first; row < last; row += STRIP) {
      const int count = std::min(STRIP, last - row);
      if (!source.read(strip.data(), stride, count)) return false;
      for (int i = 0; i < count; i += 2) {
        const uint8_t* upper = strip.data() + stride * size_t(i) + size_t(offset) * PIXEL;
        const uint8_t* lower = i + 1 < count ? upper + stride : upper;
        across(upper, lower, x_filter, width, pairs.data() + pair_bytes * size_t((row - first + i) / 2));
      }
    }
    return true;
  }

  bool shrink_down(const View& view, int first, uint8_t* out) const {
    const int plane = plane_bytes(view.width);
    const size_t stride = 3 * size_t(plane);
    for (int channel = 0; channel < 3; channel++) {
      for (int y = 0; y < view.height; y++, out += view.width) {
        const uint8_t* from =
            pairs.data() + stride * size_t((y_filter.first[y] - first) / 2) + size_t(channel) * size_t(plane);
        for (int x = 0; x < view.width; x += DOWN_BLOCK) {
          if (x + DOWN_BLOCK <= view.width) {
            down(from + 2 * x, stride, y_filter, y, out + x);
          } else {
            uint8_t rest[DOWN_BLOCK];
            down(from + 2 * x, stride, y_filter, y, rest);
            std::copy_n(rest, view.width - x, out + x);
          }
        }
      }
    }
    return true;
  }
};

} // namespace

extern "C" {

void* karat_decoder_new() { return new (std::nothrow) Decoder; }

void karat_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Reads the header; 1, with width and height set, or 0 when the data are for another decoder.
int karat_decoder_open(void* decoder, const uint8_t* data, size_t size, int32_t* width, int32_t* height) {
  JpegSource& source = static_cast<Decoder*>(decoder)->source;
  if (!source.open(data, size)) return 0;
  *width = source.width();
  *height = source.height();
  return 1;
}

// The view of what was opened last, uint8 [3, height, width]; 1, or 0 when the data are for another decoder.
int karat_decoder_read(void* decoder, const View* view, uint8_t* out) {
  try {
    return static_cast<Decoder*>(decoder)->read(*view, out);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
}
