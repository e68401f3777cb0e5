// RandAugment's operations on images as planes, uint8 [3, height, width], with Pillow's bits on any instruction set:
// hence no contraction.
//
// A warp is Pillow's Image.transform, in double. Nearly always single precision tells the byte; where it comes near a
// whole number, the pixel is computed again by Pillow's operations, in their order. A shear or a translation moves
// pixels along one axis alone. Interpolation along the other is then at a whole pixel, which is that pixel exactly, and
// is left out. Neighbours in a row (or column) come from neighbours, all at the same fraction between two pixels.
//
// Build with: portable -ffp-contract=off -fno-trapping-math

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef double Exact __attribute__((vector_size(32)));  // R, G, B and one that is not used
typedef float Single __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(16)));

// Twice what single precision may differ by from double: each weight is within 2.5e-7 of it, at values up to 255.
const float NEAR = 2e-3f;
const float MOST = 255.5f;

int floor_of(double value) {
    const int whole = static_cast<int>(value);
    return value < whole ? whole - 1 : whole;
}

uint8_t byte_of(double value) { return static_cast<uint8_t>(value < 0.0 ? 0.0 : value > 255.0 ? 255.0 : value); }

struct Bilinear {
    static const int first = 0, taps = 2;

    template <class Value>
    static Value between(const Value* v, Value t, Value) { return v[0] + (v[1] - v[0]) * t; }

    // The same as a sum of both pixels; the weights are `apart` from each other.
    static void weigh(float t, float* w, int apart) { w[0] = 1.0f - t, w[apart] = t; }
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

    static void weigh(float t, float* w, int apart) {
        const float s = t * t, c = s * t;
        w[0] = s + s - t - c, w[apart] = 1.0f - s - s + c, w[2 * apart] = t + s - c, w[3 * apart] = c - s;
    }
};

// In single precision, with a margin that repeats the border: a place within the image has its neighbours there.
struct Image {
    static const int margin = 2;
    int64_t stride;
    std::vector<Single> pixels;

    Image(const uint8_t* planes, int width, int height)
        : stride(width + 2 * margin), pixels(stride * (height + 2 * margin)) {
        const int64_t plane = static_cast<int64_t>(width) * height;
        Single* to = pixels.data();
        for (int y = -margin; y < height + margin; ++y) {
            const uint8_t* const row = planes + static_cast<int64_t>(width) * std::clamp(y, 0, height - 1);
            for (int x = -margin; x < width + margin; ++x, ++to) {
                const uint8_t* const at = row + std::clamp(x, 0, width - 1);
                *to = Single{static_cast<float>(at[0]), static_cast<float>(at[plane]), static_cast<float>(at[2 * plane])};
            }
        }
    }

    int64_t index(int x, int y) const { return (y + margin) * stride + x + margin; }
};

// Pixels between the neighbours that begin at `first`, at dx and dy between the middle ones, by Pillow's operations.
template <class Filter>
Exact across(const Single* first, double dx) {
    if (dx == 0.0) return __builtin_convertvector(first[-Filter::first], Exact);
    Exact v[Filter::taps];
    for (int k = 0; k < Filter::taps; ++k) v[k] = __builtin_convertvector(first[k], Exact);
    return Filter::between(v, Exact{} + dx, Exact{} + 2.0);
}

template <class Filter>
Exact exactly(const Single* first, int64_t stride, double dx, double dy) {
    if (dy == 0.0) return across<Filter>(first - Filter::first * stride, dx);
    Exact v[Filter::taps];
    for (int i = 0; i < Filter::taps; ++i) v[i] = across<Filter>(first + i * stride, dx);
    return Filter::between(v, Exact{} + dy, Exact{} + 2.0);
}

template <class Filter>
void everywhere(const uint8_t* planes, int width, int height, const double* a, const uint8_t* fill, uint8_t* out) {
    const int taps = Filter::taps;
    const Image image(planes, width, height);
    const int64_t plane = static_cast<int64_t>(width) * height, stride = image.stride;
    std::vector<double> xs(width), ys(width);
    std::vector<int32_t> firsts(width);
    std::vector<float> weights(2 * taps * width);
    for (int y = 0; y < height; ++y, out += width) {
        int begin = width, end = 0;  // of those that come from the image
        for (int x = 0; x < width; ++x) {
            const double xc = x + 0.5, yc = y + 0.5;
            const double xin = a[0] * xc + a[1] * yc + a[2], yin = a[3] * xc + a[4] * yc + a[5];
            xs[x] = xin - 0.5, ys[x] = yin - 0.5;
            if (xin >= 0.0 && xin < width && yin >= 0.0 && yin < height) begin = std::min(begin, x), end = x + 1;
        }
        begin = std::min(begin, end);
        for (int c = 0; c < 3; ++c) {
            std::memset(out + c * plane, fill[c], begin);
            std::memset(out + c * plane + end, fill[c], width - end);
        }
#pragma omp simd
        for (int x = begin; x < end; ++x) {
            const int left = floor_of(xs[x]), top = floor_of(ys[x]);
            firsts[x] = static_cast<int32_t>(image.index(left + Filter::first, top + Filter::first));
            Filter::weigh(static_cast<float>(xs[x] - left), weights.data() + x, width);
            Filter::weigh(static_cast<float>(ys[x] - top), weights.data() + taps * width + x, width);
        }
        for (int x = begin; x < end; ++x) {
            const Single* const first = image.pixels.data() + firsts[x];
            const float* const w = weights.data() + x;
            Single v{};
            for (int i = 0; i < taps; ++i) {
                Single part{};
                for (int k = 0; k < taps; ++k) part += first[i * stride + k] * w[k * width];
                v += part * w[(taps + i) * width];
            }
            const Single low = Single{}, high = low + MOST, above = v > low ? v : low;
            const Single inside = above < high ? above : high;
            const Whole bytes = __builtin_convertvector(inside - NEAR, Whole);
            const Whole changes = bytes ^ __builtin_convertvector(inside + NEAR, Whole);
            for (int c = 0; c < 3; ++c) out[c * plane + x] = static_cast<uint8_t>(bytes[c]);
            if (changes[0] | changes[1] | changes[2]) {
                const double dx = xs[x] - floor_of(xs[x]), dy = ys[x] - floor_of(ys[x]);
                const Exact value = exactly<Filter>(first, stride, dx, dy);
                for (int c = 0; c < 3; ++c) out[c * plane + x] = byte_of(value[c]);
            }
        }
    }
}

// The first of `size` places, which increase, that is not below `least`; the guess is about where it is.
template <class PlaceOf>
int first_at(const PlaceOf& place, int size, double least, double guess) {
    int i = static_cast<int>(guess < 0.0 ? 0.0 : guess > size ? size : guess);
    while (i > 0 && place(i - 1) >= least) --i;
    while (i < size && place(i) < least) ++i;
    return i;
}

// Moves the pixels of each row of a plane along it, by slope * (number of the row + 0.5) + offset.
template <class Filter>
void slide(const uint8_t* in, int width, int height, double slope, double offset, uint8_t fill, uint8_t* out) {
    const int margin = 3, block = 32;
    std::vector<float> padded(width + 2 * margin), sums(width);
    float* const values = padded.data() + margin;
    for (int y = 0; y < height; ++y, in += width, out += width) {
        const double shift = slope * (y + 0.5);
        const auto place = [=](int x) { return (shift + (x + 0.5)) + offset; };
        const int begin = first_at(place, width, 0.0, -shift - offset);
        const int end = first_at(place, width, width, width - shift - offset);
        std::memset(out, fill, begin);
        std::memset(out + end, fill, width - end);
        if (begin == end) continue;
        for (int x = 0; x < width; ++x) values[x] = in[x];
        for (int i = 1; i <= margin; ++i) values[-i] = values[0], values[width - 1 + i] = values[width - 1];
        const int start = floor_of(place(begin) - 0.5) - begin;
        float w[Filter::taps];
        Filter::weigh(static_cast<float>(place(begin) - 0.5 - (start + begin)), w, 1);
        const float* const __restrict first = values + start + Filter::first;
        float* const __restrict sum = sums.data();
        for (int at = begin; at < end; at += block) {
            const int stop = std::min(at + block, end);
            int32_t changes = 0;
#pragma omp simd reduction(| : changes)
            for (int x = at; x < stop; ++x) {
                float v = 0.0f;
                for (int k = 0; k < Filter::taps; ++k) v += w[k] * first[x + k];
                sum[x] = v = v < 0.0f ? 0.0f : v > MOST ? MOST : v;
                out[x] = static_cast<uint8_t>(static_cast<int32_t>(v));
                changes |= static_cast<int32_t>(v - NEAR) ^ static_cast<int32_t>(v + NEAR);
            }
            for (int x = at; changes && x < stop; ++x) {
                if (static_cast<int32_t>(sum[x] - NEAR) == static_cast<int32_t>(sum[x] + NEAR)) continue;
                const double from = place(x) - 0.5;
                const int whole = floor_of(from);
                double v[Filter::taps];
                for (int k = 0; k < Filter::taps; ++k) v[k] = values[whole + Filter::first + k];
                out[x] = byte_of(Filter::between(v, from - whole, 2.0));
            }
        }
    }
}

void transpose(const uint8_t* in, int width, int height, uint8_t* out) {
    const int block = 16;
    for (int top = 0; top < height; top += block)
        for (int x = 0; x < width; ++x)
            for (int y = top; y < std::min(top + block, height); ++y)
                out[static_cast<int64_t>(x) * height + y] = in[static_cast<int64_t>(y) * width + x];
}

template <class Filter>
void warp(const uint8_t* planes, int width, int height, const double* a, const uint8_t* fill, uint8_t* out) {
    const bool keeps_y = a[3] == 0.0 && a[4] == 1.0 && a[5] == 0.0, keeps_x = a[0] == 1.0 && a[1] == 0.0 && a[2] == 0.0;
    const int64_t plane = static_cast<int64_t>(width) * height;
    if (keeps_y && a[0] == 1.0) {
        for (int c = 0; c < 3; ++c) slide<Filter>(planes + c * plane, width, height, a[1], a[2], fill[c], out + c * plane);
    } else if (keeps_x && a[4] == 1.0) {
        std::vector<uint8_t> turned(plane), moved(plane);
        for (int c = 0; c < 3; ++c) {
            transpose(planes + c * plane, width, height, turned.data());
            slide<Filter>(turned.data(), height, width, a[3], a[5], fill[c], moved.data());
            transpose(moved.data(), height, width, out + c * plane);
        }
    } else {
        everywhere<Filter>(planes, width, height, a, fill, out);
    }
}

// Image.blend: `factor` of the second, the rest of the first, clipped.
uint8_t blend(int first, int second, float factor) {
    const float v = static_cast<float>(first) + factor * static_cast<float>(second - first);
    return static_cast<uint8_t>(static_cast<int32_t>(v < 0.0f ? 0.0f : v > 255.0f ? 255.0f : v));
}

int grey_of(int red, int green, int blue) { return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16; }

}  // namespace

// planes, out: uint8 [3, height, width]; all return 0, or 1 where memory ran out.
extern "C" {

// matrix: the six numbers of Image.transform. fill: of what comes from outside.
int karat_warp(const uint8_t* planes, int width, int height, const double* matrix, const uint8_t* fill, int bicubic,
               uint8_t* out) {
    try {
        (bicubic ? warp<Bicubic> : warp<Bilinear>)(planes, width, height, matrix, fill, out);
        return 0;
    } catch (...) {
        return 1;
    }
}

int karat_flip(const uint8_t* planes, int width, int height, uint8_t* out) {
    for (int64_t row = 0; row < 3 * static_cast<int64_t>(height); ++row)
        std::reverse_copy(planes + row * width, planes + (row + 1) * width, out + row * width);
    return 0;
}

// counts: [4, 256], of red, green, blue and grey, which start at 0.
int karat_histogram(const uint8_t* planes, int width, int height, int32_t* counts) {
    const int64_t plane = static_cast<int64_t>(width) * height;
    const uint8_t *red = planes, *green = red + plane, *blue = green + plane;
    for (int64_t i = 0; i < plane; ++i) {
        ++counts[red[i]];
        ++counts[256 + green[i]];
        ++counts[512 + blue[i]];
        ++counts[768 + grey_of(red[i], green[i], blue[i])];
    }
    return 0;
}

// table: [3, 256], the new value of each value.
int karat_look_up(const uint8_t* planes, int width, int height, const uint8_t* table, uint8_t* out) {
    const int64_t plane = static_cast<int64_t>(width) * height;
    for (int c = 0; c < 3; ++c, table += 256)
        for (int64_t i = c * plane; i < (c + 1) * plane; ++i) out[i] = table[planes[i]];
    return 0;
}

// ImageEnhance.Color: between the grey image and the image, or beyond.
int karat_color(const uint8_t* planes, int width, int height, float factor, uint8_t* out) {
    const int64_t plane = static_cast<int64_t>(width) * height;
    const uint8_t *red = planes, *green = red + plane, *blue = green + plane;
#pragma omp simd
    for (int64_t i = 0; i < plane; ++i) {
        const int grey = grey_of(red[i], green[i], blue[i]);
        out[i] = blend(grey, red[i], factor);
        out[plane + i] = blend(grey, green[i], factor);
        out[2 * plane + i] = blend(grey, blue[i], factor);
    }
    return 0;
}

// ImageEnhance.Sharpness: between the smoothed image and the image, or beyond. ImageFilter.SMOOTH counts the centre five
// times and its eight neighbours once, and leaves the border as it is.
int karat_sharpness(const uint8_t* planes, int width, int height, float factor, uint8_t* out) {
    std::memcpy(out, planes, 3 * static_cast<int64_t>(width) * height);
    for (int row = 0; row < 3 * height; ++row, planes += width, out += width) {
        if (row % height == 0 || row % height == height - 1) continue;
        const uint8_t *above = planes - width, *below = planes + width;
#pragma omp simd
        for (int x = 1; x < width - 1; ++x) {
            const int sides = planes[x - 1] + planes[x + 1] + above[x] + below[x];
            const int corners = above[x - 1] + above[x + 1] + below[x - 1] + below[x + 1];
            out[x] = blend((2 * (5 * planes[x] + sides + corners) + 13) / 26, planes[x], factor);
        }
    }
    return 0;
}
}
