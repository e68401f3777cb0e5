// Affine warps of RGB images, with the bits of Pillow's Image.transform: the same operations in double, in the same
// order, on the three channels of a pixel at once. Without contraction, so that
// the pixels have the same bits on any instruction set.
//
// A shear or a translation moves pixels along one axis alone. Interpolation along the other is then at a whole pixel,
// which is that pixel exactly, and is left out. Neighbours in a row (or column) come from neighbours.
//
// Build with: portable -ffp-contract=off

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef double Pixel __attribute__((vector_size(32)));        // R, G, B and one that is not used
typedef int32_t Whole __attribute__((vector_size(16)));

Pixel broadcast(double value) { return Pixel{value, value, value, value}; }

struct Image {
    const Whole* pixels;
    int width, height;

    Pixel at(int x, int y) const {
        return __builtin_convertvector(pixels[static_cast<int64_t>(y) * width + x], Pixel);
    }
};

int clamp(int value, int size) { return value < 0 ? 0 : value < size ? value : size - 1; }

int floor_of(double value) {
    const int whole = static_cast<int>(value);
    return value < whole ? whole - 1 : whole;
}

struct Bilinear {
    static const int first = 0, taps = 2;

    template <class Value>
    static Value between(const Value* v, Value t, Value) { return v[0] + (v[1] - v[0]) * t; }
};

struct Bicubic {
    static const int first = -1, taps = 4;

    template <class Value>
    static Value between(const Value* v, Value t, Value two) {
        const Value p2 = -v[0] + v[2];
        const Value p3 = two * (v[0] - v[1]) + v[2] - v[3];
        const Value p4 = -v[0] + v[1] - v[2] + v[3];
        return v[1] + t * (p2 + t * (p3 + t * p4));
    }
};

template <class Filter>
Pixel row(const Image& image, const int* x, int y, double dx) {
    if (dx == 0.0) return image.at(x[-Filter::first], y);
    Pixel v[Filter::taps];
    for (int i = 0; i < Filter::taps; ++i) v[i] = image.at(x[i], y);
    return Filter::between(v, broadcast(dx), broadcast(2.0));
}

template <class Filter>
Pixel sample(const Image& image, double xin, double yin) {
    xin -= 0.5;
    yin -= 0.5;
    const int left = floor_of(xin), top = floor_of(yin);
    const double dx = xin - left, dy = yin - top;
    int x[Filter::taps];
    for (int i = 0; i < Filter::taps; ++i) x[i] = clamp(left + Filter::first + i, image.width);
    if (dy == 0.0) return row<Filter>(image, x, clamp(top, image.height), dx);
    Pixel v[Filter::taps];
    for (int i = 0; i < Filter::taps; ++i)
        v[i] = row<Filter>(image, x, clamp(top + Filter::first + i, image.height), dx);
    return Filter::between(v, broadcast(dy), broadcast(2.0));
}

template <class Filter>
void everywhere(const Image& image, const double* a, const uint8_t* fill, uint8_t* out) {
    for (int y = 0; y < image.height; ++y) {
        for (int x = 0; x < image.width; ++x, out += 3) {
            const double xc = x + 0.5, yc = y + 0.5;
            const double xin = a[0] * xc + a[1] * yc + a[2], yin = a[3] * xc + a[4] * yc + a[5];
            if (!(xin >= 0.0 && xin < image.width && yin >= 0.0 && yin < image.height)) {
                std::memcpy(out, fill, 3);
                continue;
            }
            const Pixel v = sample<Filter>(image, xin, yin);
            const Pixel low = broadcast(0.0), high = broadcast(255.0);
            const Pixel above = v > low ? v : low;
            const Whole bytes = __builtin_convertvector(above < high ? above : high, Whole);
            for (int c = 0; c < 3; ++c) out[c] = static_cast<uint8_t>(bytes[c]);
        }
    }
}

// The pixels of one line, and how far apart they are in memory.
struct Line {
    int size;
    int64_t stride;
};

// Moves pixels along `line`, by slope * (number of the line + 0.5) + offset, on each of `lines`. Returns false, with
// part of the work done, where rounding keeps neighbours from coming from neighbours.
template <class Filter>
bool slide(const uint8_t* rgb, Line line, Line lines, double slope, double offset, const uint8_t* fill, uint8_t* out) {
    const int margin = Filter::taps / 2;
    std::vector<double> padded(line.size + 2 * margin), between(line.size);
    std::vector<int32_t> moved(line.size);
    for (int number = 0; number < lines.size; ++number) {
        const uint8_t* from = rgb + number * lines.stride;
        uint8_t* to = out + number * lines.stride;
        const double shift = slope * (number + 0.5);
        int begin = line.size, end = 0, start = 0;
        for (int i = 0; i < line.size; ++i) {
            const double place = (shift + (i + 0.5)) + offset;
            if (!(place >= 0.0 && place < line.size)) {
                std::memcpy(to + i * line.stride, fill, 3);
                continue;
            }
            const int whole = floor_of(place - 0.5);
            if (begin == line.size) begin = i, start = whole - i;
            if (whole - i != start) return false;
            end = i + 1;
            between[i] = place - 0.5 - whole;
        }
        for (int channel = 0; channel < 3; ++channel) {
            double* const values = padded.data() + margin;
            for (int i = 0; i < line.size; ++i) values[i] = from[i * line.stride + channel];
            for (int i = 1; i <= margin; ++i) values[-i] = values[0], values[line.size - 1 + i] = values[line.size - 1];
            const double* const __restrict first = values + start + Filter::first;
            const double* const __restrict t = between.data();
            int32_t* const __restrict rounded = moved.data();
#pragma omp simd
            for (int i = begin; i < end; ++i) {
                const double value = Filter::between(first + i, t[i], 2.0);
                rounded[i] = static_cast<int32_t>(value < 0.0 ? 0.0 : value > 255.0 ? 255.0 : value);
            }
            for (int i = begin; i < end; ++i) to[i * line.stride + channel] = static_cast<uint8_t>(rounded[i]);
        }
    }
    return true;
}

template <class Filter>
void warp(const uint8_t* rgb, int width, int height, const double* a, const uint8_t* fill, uint8_t* out) {
    const Line row{width, 3}, column{height, 3 * static_cast<int64_t>(width)};
    const bool keeps_y = a[3] == 0.0 && a[4] == 1.0 && a[5] == 0.0, keeps_x = a[0] == 1.0 && a[1] == 0.0 && a[2] == 0.0;
    if (keeps_y && a[0] == 1.0 && slide<Filter>(rgb, row, column, a[1], a[2], fill, out)) return;
    if (keeps_x && a[4] == 1.0 && slide<Filter>(rgb, column, row, a[3], a[5], fill, out)) return;
    const int64_t count = static_cast<int64_t>(width) * height;
    std::vector<Whole> pixels(count);
    for (int64_t i = 0; i < count; ++i) pixels[i] = Whole{rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 0};
    everywhere<Filter>(Image{pixels.data(), width, height}, a, fill, out);
}

}  // namespace

// rgb, out: uint8 [height, width, 3]. matrix: the six numbers of Image.transform. fill: of what comes from outside.
// Returns 0, or 1 where memory ran out.
extern "C" int karat_warp(const uint8_t* rgb, int width, int height, const double* matrix, const uint8_t* fill,
                          int bicubic, uint8_t* out) {
    try {
        (bicubic ? warp<Bicubic> : warp<Bilinear>)(rgb, width, height, matrix, fill, out);
        return 0;
    } catch (...) {
        return 1;
    }
}
