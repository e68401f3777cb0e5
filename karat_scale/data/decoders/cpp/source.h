// A JPEG through libjpeg: its dimensions, then the rows of a part of it, or its planes as they are stored. What is
// doubtful is refused, not guessed.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

namespace {

// True when nothing but entropy-coded data and restart markers is between `data` and an end-of-image marker.
// Then the rows that are not decoded hold nothing that would make another decoder refuse the file.
inline bool ends_well(const uint8_t* data, size_t size) {
  const uint8_t* const end = data + size;
  while (const void* found = std::memchr(data, 0xFF, size_t(end - data))) {
    data = static_cast<const uint8_t*>(found) + 1;
    if (data == end) return false;
    if (*data == 0xD9) return true;
    const bool coded = *data == 0x00 || *data == 0xFF || (*data >= 0xD0 && *data <= 0xD7);
    if (!coded) return false;
  }
  return false;
}

// A colour component as it is stored. `width` and `height` are how far the image reaches over it, in its own pixels;
// `columns` and `rows` are whole pixels, the last of which may be half outside; decoding writes to `room_..` of them.
struct StoredPlane {
  double width, height;
  int columns, rows, room_columns, room_rows;
};

// Not copied and not moved: libjpeg keeps pointers into it.
class JpegSource {
 public:
  JpegSource() = default;
  JpegSource(const JpegSource&) = delete;
  JpegSource& operator=(const JpegSource&) = delete;
  ~JpegSource() { close(); }

  // Reads the header. The data must stay until `close`. False for what is not an ordinary grey or colour JPEG.
  // Where all rows will be decoded, libjpeg itself finds what is between them.
  bool open(const uint8_t* data, size_t size, bool all_rows = false) {
    close();
    jpeg.err = jpeg_std_error(&errors);
    errors.error_exit = fail;
    errors.emit_message = count;
    errors.output_message = say_nothing;
    jpeg.client_data = this;
    if (setjmp(on_error)) return refuse();
    jpeg_create_decompress(&jpeg);
    is_open = true;
    jpeg_mem_src(&jpeg, const_cast<uint8_t*>(data), size);
    jpeg_read_header(&jpeg, TRUE);
    const J_COLOR_SPACE space = jpeg.jpeg_color_space;
    if (space != JCS_GRAYSCALE && space != JCS_YCbCr && space != JCS_RGB) return refuse();
    const bool may_be_skipped = !all_rows && !jpeg_has_multiple_scans(&jpeg);
    if (may_be_skipped && !ends_well(jpeg.src->next_input_byte, jpeg.src->bytes_in_buffer)) return refuse();
    return errors.num_warnings == 0 || refuse();
  }

  int width() const { return int(jpeg.image_width); }
  int height() const { return int(jpeg.image_height); }

  // Begins to decode columns left .. right from row `top` on, of the image scaled by eighths / 8 in its DCT. Sets
  // `left` to the first column that comes and `columns` to their number.
  bool start(int eighths, int* left, int right, int top, int* columns) {
    if (setjmp(on_error)) return refuse();
    jpeg.out_color_space = JCS_EXT_RGBX;
    jpeg.scale_num = unsigned(eighths);
    jpeg.scale_denom = 8;
    jpeg_start_decompress(&jpeg);
    if (!is_complete()) return refuse();
    // Upsampled colour looks at its neighbours, so columns at the edge of what is decoded differ a little.
    const int full = int(jpeg.output_width);
    JDIMENSION first = JDIMENSION(*left > MARGIN ? *left - MARGIN : 0);
    JDIMENSION count = JDIMENSION(right + MARGIN < full ? right + MARGIN : full) - first;
    jpeg_crop_scanline(&jpeg, &first, &count);
    *left = int(first);
    *columns = int(count);
    if (top > 0 && jpeg_skip_scanlines(&jpeg, JDIMENSION(top)) != JDIMENSION(top)) return refuse();
    return true;
  }

  // Decodes `count` rows, RGBX, `stride` bytes apart.
  bool read(uint8_t* to, size_t stride, int count) {
    if (setjmp(on_error)) return refuse();
    for (int row = 0; row < count;) {
      JSAMPROW rows[MOST_ROWS];
      const int wanted = count - row < MOST_ROWS ? count - row : MOST_ROWS;
      for (int i = 0; i < wanted; i++) rows[i] = to + stride * size_t(row + i);
      const int got = int(jpeg_read_scanlines(&jpeg, rows, JDIMENSION(wanted)));
      if (got == 0) return refuse();
      row += got;
    }
    return true;
  }

  // Begins to decode whole planes, scaled by eighths / 8 in the DCT. False for RGB, which has no luma.
  bool start_planes(int eighths) {
    if (jpeg.jpeg_color_space == JCS_RGB) return refuse();
    if (setjmp(on_error)) return refuse();
    jpeg.out_color_space = jpeg.jpeg_color_space;
    jpeg.raw_data_out = TRUE;
    jpeg.scale_num = unsigned(eighths);
    jpeg.scale_denom = 8;
    jpeg_start_decompress(&jpeg);
    return is_complete() || refuse();
  }

  int planes() const { return jpeg.num_components; }

  // Plane `number` once it is started.
  StoredPlane plane(int number) const {
    const jpeg_component_info& component = jpeg.comp_info[number];
    const double across = double(component.h_samp_factor) * dct_width(component) / (jpeg.max_h_samp_factor * DCTSIZE);
    const double down = double(component.v_samp_factor) * dct_height(component) / (jpeg.max_v_samp_factor * DCTSIZE);
    return {across * width(), down * height(), int(component.downsampled_width), int(component.downsampled_height),
            int(component.width_in_blocks) * dct_width(component),
            int(jpeg.total_iMCU_rows) * component.v_samp_factor * dct_height(component)};
  }

  // Decodes every plane to `to`, the rows `strides` bytes apart; each has room for its `room_columns` and `room_rows`.
  bool read_planes(uint8_t* const* to, const size_t* strides) {
    if (setjmp(on_error)) return refuse();
    JSAMPROW rows[MAX_COMPONENTS][MAX_SAMP_FACTOR * DCTSIZE];
    JSAMPARRAY planes_of_rows[MAX_COMPONENTS];
    for (JDIMENSION group = 0; group < jpeg.total_iMCU_rows; group++) {
      for (int number = 0; number < jpeg.num_components; number++) {
        const jpeg_component_info& component = jpeg.comp_info[number];
        const int count = component.v_samp_factor * dct_height(component);
        for (int i = 0; i < count; i++) rows[number][i] = to[number] + strides[number] * (size_t(group) * count + i);
        planes_of_rows[number] = rows[number];
      }
      const int lines = jpeg.max_v_samp_factor * smallest_dct_height();
      if (jpeg_read_raw_data(&jpeg, planes_of_rows, JDIMENSION(lines)) == 0) return refuse();
    }
    return true;
  }

  // Lets go of the data. False when libjpeg had a doubt about any of it.
  bool close() {
    if (!is_open) return false;
    is_open = false;
    jpeg_destroy_decompress(&jpeg);
    return errors.num_warnings == 0;
  }

 private:
  static constexpr int MARGIN = 2, MOST_ROWS = 8;

  jpeg_decompress_struct jpeg;
  jpeg_error_mgr errors;
  std::jmp_buf on_error;
  bool is_open = false;

#if JPEG_LIB_VERSION >= 70
  static int dct_width(const jpeg_component_info& component) { return component.DCT_h_scaled_size; }
  static int dct_height(const jpeg_component_info& component) { return component.DCT_v_scaled_size; }
  int smallest_dct_height() const { return jpeg.min_DCT_v_scaled_size; }
#else
  static int dct_width(const jpeg_component_info& component) { return component.DCT_scaled_size; }
  static int dct_height(const jpeg_component_info& component) { return component.DCT_scaled_size; }
  int smallest_dct_height() const { return jpeg.min_DCT_scaled_size; }
#endif

  // False for a progressive JPEG that lacks scans: libjpeg smooths it, each version in its own way.
  bool is_complete() const {
    if (!jpeg.progressive_mode) return true;
    for (int component = 0; component < jpeg.num_components; component++) {
      for (int bits : jpeg.coef_bits[component]) {
        if (bits != 0) return false; // bits still to come, or -1 for none at all
      }
    }
    return true;
  }

  bool refuse() {
    close();
    return false;
  }

  static void fail(j_common_ptr info) { std::longjmp(static_cast<JpegSource*>(info->client_data)->on_error, 1); }
  static void count(j_common_ptr info, int level) { info->err->num_warnings += level < 0; }
  static void say_nothing(j_common_ptr) {}
};

} // namespace
