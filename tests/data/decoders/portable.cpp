// The native libraries as one program that answers requests from standard input, to run them on another architecture.

#include <cstdint>
#include <cstdio>
#include <vector>

extern "C" {
void* karat_decoder_new();
int karat_decoder_open(void*, const uint8_t*, size_t, int32_t*, int32_t*);
int karat_decoder_read(void*, const void* view, uint8_t*);
void* karat_recoder_new();
int karat_recoder_open(void*, const uint8_t*, size_t, int32_t*, int32_t*);
size_t karat_recoder_shrink(void*, int, int, int, int, const uint8_t**);
int karat_warp(const uint8_t*, int, int, const double*, const uint8_t*, int, uint8_t*);
}

namespace {

template <typename T>
bool get(T* values, size_t count) {
  return fread(values, sizeof(T), count, stdin) == count;
}

std::vector<uint8_t> get_bytes() {
  uint64_t size = 0;
  get(&size, 1);
  std::vector<uint8_t> bytes(size);
  get(bytes.data(), size);
  return bytes;
}

void put(const uint8_t* bytes, uint64_t size) {
  fwrite(&size, sizeof size, 1, stdout);
  fwrite(bytes, 1, size, stdout);
}

void decode(void* decoder) {
  const std::vector<uint8_t> jpeg = get_bytes(), view = get_bytes();
  int32_t size[2], width, height;  // of the view, and of the image
  get(size, 2);
  std::vector<uint8_t> pixels(3 * size_t(size[0]) * size_t(size[1]));
  const bool good = karat_decoder_open(decoder, jpeg.data(), jpeg.size(), &width, &height) &&
                    karat_decoder_read(decoder, view.data(), pixels.data());
  put(pixels.data(), good ? pixels.size() : 0);
}

void shrink(void* recoder) {
  const std::vector<uint8_t> jpeg = get_bytes();
  int32_t asked[4], width, height;  // eighths, width, height and quality
  get(asked, 4);
  const uint8_t* out = nullptr;
  size_t size = 0;
  if (karat_recoder_open(recoder, jpeg.data(), jpeg.size(), &width, &height))
    size = karat_recoder_shrink(recoder, asked[0], asked[1], asked[2], asked[3], &out);
  put(out, size);
}

void warp() {
  const std::vector<uint8_t> planes = get_bytes(), fill = get_bytes();
  double matrix[6];
  int32_t asked[3];  // width, height, and whether bicubic
  get(matrix, 6);
  get(asked, 3);
  std::vector<uint8_t> out(planes.size());
  const bool good = !karat_warp(planes.data(), asked[0], asked[1], matrix, fill.data(), asked[2], out.data());
  put(out.data(), good ? out.size() : 0);
}

} // namespace

int main() {
  void *decoder = karat_decoder_new(), *recoder = karat_recoder_new();
  for (char kind; get(&kind, 1);) {
    if (kind == 'd') decode(decoder);
    if (kind == 's') shrink(recoder);
    if (kind == 'w') warp();
  }
}
