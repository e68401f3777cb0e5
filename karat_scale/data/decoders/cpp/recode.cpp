// A JPEG to a smaller JPEG in one call. It stays in the colour planes that JPEGs are made of, which spares four passes:
// upsampling and conversion to RGB, and back; and two of the three planes are mostly resized at half their sides.
//
// Without contraction, so that the resize's weights have the same bits on any instruction set.
// Build with: portable -ljpeg -ffp-contract=off

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "plane.h"
#include "sink.h"
#include "source.h"

namespace {

constexpr int COMPONENTS = 3, MID = 128;

// One thread's recoder with the memory it works in, which grows to the largest image and stays.
class Recoder {
 public:
  JpegSource source;
  JpegSink sink;

  // Decodes at eighths / 8 of the size, and encodes at width x height with 4:2:0. False when the data are doubtful.
  bool shrink(int eighths, int width, int height, int quality) {
    return decode(eighths) && (resize(width, height), encode(width, height, quality));
  }

 private:
  StoredPlane stored[COMPONENTS];
  Plane decoded[COMPONENTS], resized[COMPONENTS], halved;
  PlaneResizer luma, chroma;
  int count = 0;

  bool decode(int eighths) {
    if (!source.start_planes(eighths)) return false;
    count = source.planes();
    uint8_t* to[COMPONENTS];
    size_t strides[COMPONENTS];
    for (int i = 0; i < count; i++) {
      stored[i] = source.plane(i);
      decoded[i].fit(stored[i].room_columns, stored[i].room_rows);
      to[i] = decoded[i].memory.data();
      strides[i] = decoded[i].stride;
    }
    return source.read_planes(to, strides) && source.close();
  }

  void resize(int width, int height) {
    for (int i = 0; i < COMPONENTS; i++) {
      const int part = i == 0 ? 1 : 2, columns = (width + part - 1) / part, rows = (height + part - 1) / part;
      const int all_columns = rounded_up(columns, DCTSIZE), all_rows = rounded_up(rows, DCTSIZE);
      if (i < count) {
        StoredPlane& from = stored[i];
        const double out_width = double(width) / part, out_height = double(height) / part;
        // Pillow resizes colour in full and has it halved by libjpeg; here it is halved first, which is less to resize.
        const bool in_full = part > 1 && from.width >= part * out_width && from.height >= part * out_height;
        if (in_full) {
          halve(decoded[i], from.columns, from.rows, halved);
          from.width /= 2, from.height /= 2, from.columns = (from.columns + 1) / 2, from.rows = (from.rows + 1) / 2;
        }
        (i == 0 ? luma : chroma).resize(in_full ? halved : decoded[i], from.width, from.height, from.columns, from.rows,
                                        out_width, out_height, columns, rows, resized[i]);
        resized[i].extend(columns, rows, all_columns, all_rows);
      } else {
        resized[i].fit(all_columns, all_rows);
        std::fill_n(resized[i].memory.data(), resized[i].stride * size_t(all_rows), uint8_t(MID));
      }
    }
  }

  bool encode(int width, int height, int quality) {
    const uint8_t* planes[COMPONENTS];
    size_t strides[COMPONENTS];
    for (int i = 0; i < COMPONENTS; i++) planes[i] = resized[i].memory.data(), strides[i] = resized[i].stride;
    return sink.write(width, height, quality, planes, strides);
  }
};

} // namespace

extern "C" {

void* karat_recoder_new() { return new (std::nothrow) Recoder; }

void karat_recoder_free(void* recoder) { delete static_cast<Recoder*>(recoder); }

// Reads the header; 1, with width and height set, or 0 when the data are for another library.
int karat_recoder_open(void* recoder, const uint8_t* data, size_t size, int32_t* width, int32_t* height) {
  JpegSource& source = static_cast<Recoder*>(recoder)->source;
  if (!source.open(data, size, true)) return 0;
  *width = source.width();
  *height = source.height();
  return 1;
}

// What was opened last as a JPEG of this size and quality, in memory that the next call may overwrite; its bytes, or 0
// when the data are for another library.
size_t karat_recoder_shrink(void* recoder, int eighths, int width, int height, int quality, const uint8_t** data) {
  Recoder& it = *static_cast<Recoder*>(recoder);
  try {
    if (!it.shrink(eighths, width, height, quality)) return 0;
  } catch (const std::bad_alloc&) {
    return 0;
  }
  *data = it.sink.data();
  return it.sink.size();
}
}
