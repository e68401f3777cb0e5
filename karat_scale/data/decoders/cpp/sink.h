// Planes to a JPEG through libjpeg, with the tables and the layout that Pillow gives the same quality.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <jpeglib.h>

namespace {

class JpegSink {
 public:
  // What was written last.
  const uint8_t* data() const { return memory.data(); }
  size_t size() const { return written; }

  // Luma and two planes of half its width and height, whose rows are strides[i] bytes apart and reach over whole blocks.
  bool write(int width, int height, int quality, const uint8_t* const* planes, const size_t* strides) {
    memory_for(width, height);
    jpeg.err = jpeg_std_error(&errors);
    errors.error_exit = fail;
    errors.output_message = say_nothing;
    jpeg.client_data = this;
    const bool whole = encode(width, height, quality, planes, strides);
    jpeg_destroy_compress(&jpeg);
    if (buffer != memory.data()) std::free(buffer); // it was too small after all, and libjpeg took another
    return whole && buffer == memory.data();
  }

 private:
  static constexpr int COMPONENTS = 3, LUMA_ROWS = 2 * DCTSIZE, MOST_BYTES_A_PIXEL = 4, HEADER_BYTES = 4096;

  jpeg_compress_struct jpeg;
  jpeg_error_mgr errors;
  std::jmp_buf on_error;
  std::vector<uint8_t> memory;
  uint8_t* buffer = nullptr;
  unsigned long written = 0;

  void memory_for(int width, int height) {
    const size_t across = size_t(width + LUMA_ROWS - 1) / LUMA_ROWS, down = size_t(height + LUMA_ROWS - 1) / LUMA_ROWS;
    const size_t most = across * down * LUMA_ROWS * LUMA_ROWS * MOST_BYTES_A_PIXEL + HEADER_BYTES;
    if (memory.size() < most) memory.resize(most);
    buffer = memory.data();
    written = static_cast<unsigned long>(memory.size());
  }

  bool encode(int width, int height, int quality, const uint8_t* const* planes, const size_t* strides) {
    if (setjmp(on_error)) return false;
    jpeg_create_compress(&jpeg);
    jpeg_mem_dest(&jpeg, &buffer, &written);
    jpeg.image_width = JDIMENSION(width);
    jpeg.image_height = JDIMENSION(height);
    jpeg.input_components = COMPONENTS;
    jpeg.in_color_space = JCS_YCbCr;
    jpeg_set_defaults(&jpeg);
    jpeg_set_quality(&jpeg, quality, TRUE);
    jpeg.raw_data_in = TRUE;
    jpeg_start_compress(&jpeg, TRUE);
    JSAMPROW rows[COMPONENTS][LUMA_ROWS];
    JSAMPARRAY planes_of_rows[COMPONENTS] = {rows[0], rows[1], rows[2]};
    while (jpeg.next_scanline < jpeg.image_height) {
      for (int i = 0; i < COMPONENTS; i++) {
        const int count = i == 0 ? LUMA_ROWS : DCTSIZE;
        const size_t first = size_t(jpeg.next_scanline) / LUMA_ROWS * size_t(count);
        for (int y = 0; y < count; y++) rows[i][y] = const_cast<uint8_t*>(planes[i]) + strides[i] * (first + size_t(y));
      }
      jpeg_write_raw_data(&jpeg, planes_of_rows, LUMA_ROWS);
    }
    jpeg_finish_compress(&jpeg);
    return true;
  }

  static void fail(j_common_ptr info) { std::longjmp(static_cast<JpegSink*>(info->client_data)->on_error, 1); }
  static void say_nothing(j_common_ptr) {}
};

} // namespace
