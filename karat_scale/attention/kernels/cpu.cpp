// Fourier-KArAt attention for x86-64 CPUs: H = sum_f f(A) C_f^T and O = H (W^T V), in float32 whatever goes in and out.
//
// All heavy work is one register-blocked matrix product, `multiply`. Forward, tiles of query columns (A transposed:
// keys by queries) give H^T without a wasted lane at any rank; backward, tiles of key columns do the same for dA and
// the gradient of C. A tile's features live in the L1 cache; scores and features are computed again in backward.
// The gradients of C and W are summed over a fixed split of the batch, so the number of threads changes no bit.
//
// Padding: rows and columns beyond N, r and d are zero in every operand, so they add zero wherever they are summed.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr long LANES = 16, BLOCK = 8, SLOPE_BLOCK = 4;
#else
constexpr long LANES = 8, BLOCK = 4, SLOPE_BLOCK = 2;
#endif
constexpr long MAX_VECTORS = 3;                // of a register block; BLOCK x MAX_VECTORS sums fill the registers
constexpr long TILE = MAX_VECTORS * LANES;     // columns of a tile
constexpr long KEY_ROWS = 16, QUERY_ROWS = 32; // rows of a tile, forward and backward
constexpr long UNIT = 16, ROW_UNIT = 8;        // tokens as columns and as rows are padded to multiples of these
constexpr long SCORE_PART = 32;                // of the width, summed at once
constexpr long MAX_GRID = 64;
constexpr long SUMMANDS = 32;                  // parts the gradient of a head's parameters is summed from, over heads

using Vec = float __attribute__((vector_size(4 * LANES)));
using Bits = uint32_t __attribute__((vector_size(4 * LANES)));
using HalfBits = uint16_t __attribute__((vector_size(2 * LANES)));
using Loose = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using LooseHalf = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
INLINE Vec broadcast(float x) { return x - Vec{}; }
INLINE HalfBits load_bits(const void* p) { return *static_cast<const LooseHalf*>(p); }
INLINE void store_bits(void* p, HalfBits v) { *static_cast<LooseHalf*>(p) = v; }

INLINE Vec load(const bfloat16* p) { return (Vec)(__builtin_convertvector(load_bits(p), Bits) << 16); }

INLINE void store(bfloat16* p, Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest, ties to even
  store_bits(p, __builtin_convertvector(v == v ? rounded : (Bits{} + 0x7fc0), HalfBits));
}

#if defined(__AVX512F__)
INLINE Vec load(const float16* p) { return (Vec)_mm512_cvtph_ps((__m256i)load_bits(p)); }
INLINE void store(float16* p, Vec v) { store_bits(p, (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE Vec load(const float16* p) { return (Vec)_mm256_cvtph_ps((__m128i)load_bits(p)); }
INLINE void store(float16* p, Vec v) { store_bits(p, (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#endif

long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

// ---------------------------------------------------------------------------------------------- matrix products

// The left operand of a product: element (i, k) is data[i * row + k * step], and one of the strides is mostly 1.
struct Left {
  const float* data;
  long row, step;
};

// sum[i][v] = sum_k left(i, k) right[k][v], for ROWS rows and VECTORS vectors of columns, in registers.
template <long ROWS, long VECTORS>
INLINE void sum_products(Left left, const float* right, long right_step, long depth, Vec (&sum)[ROWS][VECTORS]) {
  UNROLL for (long i = 0; i < ROWS; i++) UNROLL for (long v = 0; v < VECTORS; v++) sum[i][v] = Vec{};
  for (long k = 0; k < depth; k++) {
    Vec columns[VECTORS];
    UNROLL for (long v = 0; v < VECTORS; v++) columns[v] = load(right + k * right_step + v * LANES);
    UNROLL for (long i = 0; i < ROWS; i++) {
      const Vec x = broadcast(left.data[i * left.row + k * left.step]);
      UNROLL for (long v = 0; v < VECTORS; v++) sum[i][v] += x * columns[v];
    }
  }
}

template <bool ADD, long ROWS, long VECTORS>
INLINE void multiply_block(Left left, const float* right, long right_step, float* out, long out_row, long depth) {
  Vec sum[ROWS][VECTORS];
  sum_products<ROWS, VECTORS>(left, right, right_step, depth, sum);
  UNROLL for (long i = 0; i < ROWS; i++) UNROLL for (long v = 0; v < VECTORS; v++) {
    float* target = out + i * out_row + v * LANES;
    store(target, ADD ? load(target) + sum[i][v] : sum[i][v]);
  }
}

// out (+)= left right for `rows` (a multiple of 4) rows and VECTORS vectors of columns. Sums over `depth` start at
// zero, so that the rounding error of long sums grows with the number of calls, not with the number of terms.
template <bool ADD, long VECTORS>
INLINE void multiply(Left left, const float* right, long right_step, float* out, long out_row, long rows, long depth) {
  long i = 0;
  for (; i + BLOCK <= rows; i += BLOCK) {
    const Left block{left.data + i * left.row, left.row, left.step};
    multiply_block<ADD, BLOCK, VECTORS>(block, right, right_step, out + i * out_row, out_row, depth);
  }
  if (BLOCK > 4 && i < rows) {
    const Left block{left.data + i * left.row, left.row, left.step};
    multiply_block<ADD, 4, VECTORS>(block, right, right_step, out + i * out_row, out_row, depth);
  }
}

// The same for any number of columns, in nearly equal parts.
template <bool ADD>
INLINE void multiply_wide(Left left, const float* right, long right_step, float* out, long out_row, long rows,
                          long vectors, long depth) {
  const long parts = (vectors + MAX_VECTORS - 1) / MAX_VECTORS;
  for (long part = 0; part < parts; part++) {
    const long first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
    const float* r = right + first * LANES;
    float* o = out + first * LANES;
    if (count == 3) multiply<ADD, 3>(left, r, right_step, o, out_row, rows, depth);
    else if (count == 2) multiply<ADD, 2>(left, r, right_step, o, out_row, rows, depth);
    else multiply<ADD, 1>(left, r, right_step, o, out_row, rows, depth);
  }
}

// A tile's scores, in parts of the width: their rounding error is multiplied by every harmonic.
template <long VECTORS>
INLINE void fill_scores(const float* rows, long row_step, const float* columns, long column_step, float* out,
                        long count, long width) {
  multiply<false, VECTORS>({rows, row_step, 1}, columns, column_step, out, TILE, count, std::min(width, SCORE_PART));
  for (long e = SCORE_PART; e < width; e += SCORE_PART)
    multiply<true, VECTORS>({rows + e, row_step, 1}, columns + e * column_step, column_step, out, TILE, count,
                            std::min(width - e, SCORE_PART));
}

// For the small products of a head, where code size matters more than speed.
__attribute__((noinline)) void multiply_small(Left left, const float* right, long right_step, float* out, long out_row,
                                              long rows, long columns, long depth) {
  multiply_wide<true>(left, right, right_step, out, out_row, rows, columns / LANES, depth);
}

// ---------------------------------------------------------------------------------------------------- harmonics

// Reduction by pi in two steps (the fused product is exact), then minimax polynomials on [-pi/2, pi/2]: within 2 units
// of the last place of 1. Beyond 2^20 a float's spacing leaves no phase to keep; the clamp keeps such scores bounded.
INLINE void sine_and_cosine(Vec x, Vec& sine, Vec& cosine) {
  constexpr float LIMIT = 1 << 20, ROUNDING = 0x1.8p23f;
  x = x > LIMIT ? broadcast(LIMIT) : x;
  x = x < -LIMIT ? broadcast(-LIMIT) : x;
  const Vec shifted = x * 0x1.45f306p-2f + ROUNDING; // x / pi, rounded; its last bit is the parity
  const Vec turns = shifted - ROUNDING;
  Vec r = x - turns * 0x1.921fb6p+1f;
  r = r + turns * 0x1.777a5cp-24f;
  const Vec z = r * r;
  const Vec s = ((2.5999032e-06f * z - 1.9806547e-04f) * z + 8.3330163550e-03f) * z - 1.6666657059e-01f;
  Vec c = ((-2.6075662320e-07f * z + 2.4761808140e-05f) * z - 1.3888402069e-03f) * z + 4.1666640625e-02f;
  c = (c * z - 0.5f) * z + 1.0f;
  const Bits sign = (Bits)shifted << 31;
  sine = (Vec)((Bits)(s * (z * r) + r) ^ sign);
  cosine = (Vec)((Bits)c ^ sign);
}

// Turns the scores in features[0] into cos(m x), m = 1..G, then sin(m x), each [rows][TILE], by shallow angle addition:
// exp(i m x) = exp(i (a - b) x) + 2i sin(b x) exp(i a x) with a + b = m and a - b of 0 or 1. GRID = 0: any G.
template <long VECTORS, long GRID>
INLINE void fill_harmonics(float* features, long rows, long grid) {
  const long count = GRID ? GRID : grid, size = rows * TILE;
  for (long i = 0; i < rows; i++) for (long v = 0; v < VECTORS; v++) {
    float* at = features + i * TILE + v * LANES;
    Vec cosine[(GRID ? GRID : MAX_GRID) + 1], sine[(GRID ? GRID : MAX_GRID) + 1];
    cosine[0] = broadcast(1);
    sine[0] = Vec{};
    sine_and_cosine(load(at), sine[1], cosine[1]);
    UNROLL for (long m = 2; m <= count; m++) {
      const long b = m / 2, a = m - b;
      const Vec twice = sine[b] + sine[b];
      cosine[m] = cosine[a - b] - twice * sine[a];
      sine[m] = sine[a - b] + twice * cosine[a];
    }
    UNROLL for (long m = 1; m <= count; m++) {
      store(at + (m - 1) * size, cosine[m]);
      store(at + (count + m - 1) * size, sine[m]);
    }
  }
}

template <long VECTORS>
INLINE void fill_harmonics(float* features, long rows, long grid) {
  switch (grid) {
    case 1: return fill_harmonics<VECTORS, 1>(features, rows, grid);
    case 2: return fill_harmonics<VECTORS, 2>(features, rows, grid);
    case 3: return fill_harmonics<VECTORS, 3>(features, rows, grid);
    case 4: return fill_harmonics<VECTORS, 4>(features, rows, grid);
    case 5: return fill_harmonics<VECTORS, 5>(features, rows, grid);
    default: return fill_harmonics<VECTORS, 0>(features, rows, grid);
  }
}

// -------------------------------------------------------------------------------------------- packing and layout

// Lanes of a, then of b, by constant indices.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(4 * LANES)))){__VA_ARGS__})
#endif

// Exchanges the off-diagonal S x S blocks of two rows of a matrix.
template <int S, int... J>
INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const Vec low = SHUFFLE(a, b, ((J & S) ? int(LANES) + J - S : J)...);
  b = SHUFFLE(a, b, ((J & S) ? int(LANES) + J : J + S)...);
  a = low;
}

template <int S>
INLINE void exchange_all(Vec (&rows)[LANES]) {
  UNROLL for (int i = 0; i < LANES; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>{});
}

INLINE void transpose(Vec (&rows)[LANES]) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  if constexpr (LANES == 16) exchange_all<8>(rows);
}

// out[j][i] = in[i][j], for multiples of LANES.
void transpose(const float* in, long in_row, float* out, long out_row, long rows, long columns) {
  for (long i = 0; i < rows; i += LANES) for (long j = 0; j < columns; j += LANES) {
    Vec block[LANES];
    UNROLL for (long k = 0; k < LANES; k++) block[k] = load(in + (i + k) * in_row + j);
    transpose(block);
    UNROLL for (long k = 0; k < LANES; k++) store(out + (j + k) * out_row + i, block[k]);
  }
}

// `tokens` rows of `width` elements T become rows of floats times `scale`, zero up to a whole vector.
template <typename T>
void read_rows(const T* in, long in_row, float* out, long out_row, long tokens, long width, float scale) {
  const long whole = width / LANES * LANES;
  for (long n = 0; n < tokens; n++) {
    const T* from = in + n * in_row;
    float* to = out + n * out_row;
    for (long e = 0; e < whole; e += LANES) store(to + e, load(from + e) * scale);
    if (whole < width) {
      T rest[LANES] = {};
      std::memcpy(rest, from + whole, (width - whole) * sizeof(T));
      store(to + whole, load(rest) * scale);
    }
  }
}

template <typename T>
void write_rows(const float* in, long in_row, T* out, long out_row, long tokens, long width) {
  const long whole = width / LANES * LANES;
  for (long n = 0; n < tokens; n++) {
    const float* from = in + n * in_row;
    T* to = out + n * out_row;
    for (long e = 0; e < whole; e += LANES) store(to + e, load(from + e));
    if (whole < width) {
      T rest[LANES];
      store(rest, load(from + whole));
      std::memcpy(to + whole, rest, (width - whole) * sizeof(T));
    }
  }
}

} // namespace

// What Python hands over (mirrored in cpu.py): [B, h, N, d] tensors with strides in elements, the last of them 1.
struct Strided {
  void* data;
  int64_t batch, head, token;
};

// Parameters and H are contiguous float32: cosines, sines [h, r, N, G], projector [h, N, r], hidden [B, h, N, r].
struct Call {
  int64_t batch, heads, tokens, width, rank, grid, dtype, threads;
  Strided query, key, value, output;                     // of backward, output holds dO
  Strided grad_query, grad_key, grad_value;              // of backward only, as are the gradients below
  float *cosines, *sines, *projector, *hidden;
  float *grad_cosines, *grad_sines, *grad_projector;
};

namespace {

struct Shape {
  long batch, heads, tokens, width, rank, grid;
  long vectors;       // of a row of tokens
  long rows;          // tokens, padded as rows of a product
  long token_step;    // tokens, padded as columns; an odd number of cache lines, so that columns use all cache sets
  long width_step;    // d, padded
  long units;         // r, padded as rows of a product
  long unit_step;     // r, padded as columns
  float scale;

  explicit Shape(const Call& c)
      : batch(c.batch), heads(c.heads), tokens(c.tokens), width(c.width), rank(c.rank), grid(c.grid),
        vectors((tokens + LANES - 1) / LANES), rows(round_up(tokens, ROW_UNIT)),
        token_step((round_up(tokens, UNIT) / UNIT | 1) * UNIT), width_step(round_up(width, LANES)),
        units(round_up(rank, 4)), unit_step(round_up(rank, LANES)), scale(1 / std::sqrt((float)width)) {}

  long features() const { return 2 * grid; }
  long coefficients() const { return features() * units * token_step; } // of a head
  long coefficient(long h, long p, long q, long m) const { return ((h * rank + p) * tokens + q) * grid + m; }
};

// Zeroed memory, handed out in pieces. Taken once with no memory behind it, it tells how much is needed.
class Arena {
 public:
  explicit Arena(float* base = nullptr) : base_(base) {}
  float* take(long floats) {
    float* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return piece;
  }
  long used() const { return used_; }

 private:
  float* base_;
  long used_ = 0;
};

// Memory that a thread keeps from call to call: fresh pages from the system cost more than zeroing old ones.
class Memory {
 public:
  ~Memory() { std::free(data_); }

  // `floats` zeros, or null where memory ran out. They are the caller's until the next call.
  float* zeros(long floats) {
    if (floats > size_) {
      release();
      data_ = static_cast<float*>(std::aligned_alloc(64, round_up(floats, 16) * 4));
      if (!data_) return nullptr;
      size_ = floats;
    }
    std::memset(data_, 0, floats * 4);
    return data_;
  }

  void release_if_large() {
    if (size_ > KEPT) release();
  }

 private:
  static constexpr long KEPT = 1 << 23; // 32 MiB
  float* data_ = nullptr;
  long size_ = 0;

  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
};

thread_local Memory memory;

// Calls body(the number of vectors, as a type; the first column) for tiles of nearly equal width over all tokens.
template <typename Body>
void for_tiles(const Shape& s, Body body) {
  const long tiles = (s.vectors + MAX_VECTORS - 1) / MAX_VECTORS;
  for (long tile = 0; tile < tiles; tile++) {
    const long first = s.vectors * tile / tiles, count = s.vectors * (tile + 1) / tiles - first;
    if (count == 3) body(std::integral_constant<long, 3>{}, first * LANES);
    else if (count == 2) body(std::integral_constant<long, 2>{}, first * LANES);
    else body(std::integral_constant<long, 1>{}, first * LANES);
  }
}

template <typename T>
T* item(const Strided& x, long b, long h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

void clear(float* data, long floats) { std::memset(data, 0, floats * 4); }

// W of a head [N][r] -> [rows][unit_step].
void pack_projector(const Call& c, const Shape& s, long h, float* out) {
  read_rows(c.projector + h * s.tokens * s.rank, s.rank, out, s.unit_step, s.tokens, s.rank, 1.0f);
}

// ------------------------------------------------------------------------------------------------------- forward

// C of a head in blocks of KEY_ROWS keys, each [feature][key][unit]: the order in which a tile's features come.
void pack_for_forward(const Call& c, const Shape& s, long h, float* out) {
  for (long first = 0; first < s.rows; first += KEY_ROWS) {
    const long keys = std::min(KEY_ROWS, s.rows - first);
    float* block = out + first * s.features() * s.units;
    for (long p = 0; p < s.rank; p++)
      for (long q = 0; q < std::min(keys, s.tokens - first); q++)
        for (long m = 0; m < s.grid; m++) {
          block[(m * keys + q) * s.units + p] = c.cosines[s.coefficient(h, p, first + q, m)];
          block[((s.grid + m) * keys + q) * s.units + p] = c.sines[s.coefficient(h, p, first + q, m)];
        }
  }
}

struct ForwardScratch {
  float *rows, *key, *query_columns, *hidden_columns, *narrow, *features, *out;

  ForwardScratch(const Shape& s, Arena& arena)
      : rows(arena.take(s.token_step * s.width_step)), key(arena.take(s.token_step * s.width_step)),
        query_columns(arena.take(s.width_step * s.token_step)), hidden_columns(arena.take(s.units * s.token_step)),
        narrow(arena.take(s.units * s.width_step)), features(arena.take(s.features() * KEY_ROWS * TILE)), out(rows) {}
};

// H^T += sum_f C_f f(A^T), for VECTORS vectors of queries.
template <long VECTORS>
void forward_tile(const Shape& s, const float* key, const float* query, const float* coef, float* hidden,
                  float* features) {
  for (long first = 0; first < s.rows; first += KEY_ROWS) {
    const long keys = std::min(KEY_ROWS, s.rows - first), depth = s.features() * keys;
    const float* key_rows = key + first * s.width_step;
    fill_scores<VECTORS>(key_rows, s.width_step, query, s.token_step, features, keys, s.width);
    fill_harmonics<VECTORS>(features, keys, s.grid);
    const Left units{coef + first * s.features() * s.units, 1, s.units};
    multiply<true, VECTORS>(units, features, TILE, hidden, s.token_step, s.units, depth);
  }
}

template <typename T>
void forward_item(const Call& c, const Shape& s, const ForwardScratch& w, const float* coef, const float* projector,
                  long b, long h) {
  // U = W^T V.
  read_rows(item<T>(c.value, b, h), c.value.token, w.rows, s.width_step, s.tokens, s.width, 1.0f);
  clear(w.narrow, s.units * s.width_step);
  multiply_small({projector, 1, s.unit_step}, w.rows, s.width_step, w.narrow, s.width_step, s.units, s.width_step,
                 s.tokens);

  read_rows(item<T>(c.query, b, h), c.query.token, w.rows, s.width_step, s.tokens, s.width, s.scale);
  transpose(w.rows, s.width_step, w.query_columns, s.token_step, s.vectors * LANES, s.width_step);
  read_rows(item<T>(c.key, b, h), c.key.token, w.key, s.width_step, s.tokens, s.width, 1.0f);
  clear(w.hidden_columns, s.units * s.token_step);
  for_tiles(s, [&](auto vectors, long column) {
    forward_tile<vectors>(s, w.key, w.query_columns + column, coef, w.hidden_columns + column, w.features);
  });
  // O = H U.
  clear(w.out, s.rows * s.width_step);
  multiply_small({w.hidden_columns, 1, s.token_step}, w.narrow, s.width_step, w.out, s.width_step, s.rows,
                 s.width_step, s.rank);
  write_rows(w.out, s.width_step, item<T>(c.output, b, h), c.output.token, s.tokens, s.width);
  float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
  for (long n = 0; n < s.tokens; n++)
    for (long p = 0; p < s.rank; p++) hidden[n * s.rank + p] = w.hidden_columns[p * s.token_step + n];
}

template <typename T>
int forward(const Call& c) {
  const Shape s(c);
  Arena needed;
  ForwardScratch(s, needed);
  const long coefficients = round_up(s.rows * s.features() * s.units, 16), projector = s.rows * s.unit_step;
  float* packed = memory.zeros(s.heads * (coefficients + projector) + c.threads * needed.used());
  if (!packed) return 1;
  float* projectors = packed + s.heads * coefficients;
  float* scratch = projectors + s.heads * projector;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (long h = 0; h < s.heads; h++) {
      pack_for_forward(c, s, h, packed + h * coefficients);
      pack_projector(c, s, h, projectors + h * projector);
    }
    Arena arena(scratch + omp_get_thread_num() * needed.used());
    const ForwardScratch mine(s, arena);
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * s.batch; t++) {
      const long h = t / s.batch, b = t % s.batch;
      forward_item<T>(c, s, mine, packed + h * coefficients, projectors + h * projector, b, h);
    }
  }
  memory.release_if_large();
  return 0;
}

// ------------------------------------------------------------------------------------------------------ backward

// The slopes of a head [feature][unit][token]: phi' = sum_m (m b_m) cos(m x) - (m a_m) sin(m x).
void pack_for_backward(const Call& c, const Shape& s, long h, float* out) {
  for (long p = 0; p < s.rank; p++)
    for (long q = 0; q < s.tokens; q++)
      for (long m = 0; m < s.grid; m++) {
        const long from = s.coefficient(h, p, q, m);
        out[(m * s.units + p) * s.token_step + q] = (m + 1) * c.sines[from];
        out[((s.grid + m) * s.units + p) * s.token_step + q] = -(m + 1) * c.cosines[from];
      }
}

struct BackwardScratch {
  float *query, *key, *value, *grad_output, *key_columns, *hidden, *narrow, *narrow_columns, *grad_hidden;
  float *grad_query, *grad_key, *grad_value, *features, *grad_scores;

  BackwardScratch(const Shape& s, Arena& arena) {
    const long wide = s.token_step * s.width_step;
    query = grad_output = arena.take(wide);
    key = value = arena.take(wide);
    grad_query = grad_value = arena.take(wide);
    grad_key = arena.take(wide);
    key_columns = arena.take(wide);
    hidden = arena.take(s.token_step * s.unit_step);
    narrow = arena.take(s.unit_step * s.width_step);
    narrow_columns = arena.take(s.width_step * s.unit_step);
    grad_hidden = arena.take(s.token_step * s.unit_step);
    features = arena.take(s.features() * QUERY_ROWS * TILE);
    grad_scores = arena.take(QUERY_ROWS * TILE);
  }
};

// dA = sum_f (dH D_f) f(A), where D_f are the slopes; the sum over f stays in registers.
template <long VECTORS>
INLINE void fill_grad_scores(const Shape& s, const float* grad_hidden, const float* slopes, const float* features,
                             float* grad_scores, long rows) {
  for (long i = 0; i < rows; i += SLOPE_BLOCK) {
    Vec total[SLOPE_BLOCK][VECTORS] = {};
    for (long f = 0; f < s.features(); f++) {
      Vec sum[SLOPE_BLOCK][VECTORS];
      const Left left{grad_hidden + i * s.unit_step, s.unit_step, 1};
      sum_products<SLOPE_BLOCK, VECTORS>(left, slopes + f * s.units * s.token_step, s.token_step, s.rank, sum);
      const float* feature = features + (f * rows + i) * TILE;
      UNROLL for (long j = 0; j < SLOPE_BLOCK; j++) UNROLL for (long v = 0; v < VECTORS; v++)
        total[j][v] += sum[j][v] * load(feature + j * TILE + v * LANES);
    }
    UNROLL for (long j = 0; j < SLOPE_BLOCK; j++) UNROLL for (long v = 0; v < VECTORS; v++)
      store(grad_scores + (i + j) * TILE + v * LANES, total[j][v]);
  }
}

// Adds to dQ, dK and dC what VECTORS vectors of keys, from token `column` on, bring.
template <long VECTORS>
void backward_tile(const Shape& s, const BackwardScratch& w, const float* slopes, float* grad_coef, long column) {
  const float* key_columns = w.key_columns + column;
  const float* key_rows = w.key + column * s.width_step;
  float* grad_key = w.grad_key + column * s.width_step;
  const long width_vectors = s.width_step / LANES;
  for (long first = 0; first < s.rows; first += QUERY_ROWS) {
    const long rows = std::min(QUERY_ROWS, s.rows - first);
    const float* query = w.query + first * s.width_step;
    const float* grad_hidden = w.grad_hidden + first * s.unit_step;
    fill_scores<VECTORS>(query, s.width_step, key_columns, s.token_step, w.features, rows, s.width);
    fill_harmonics<VECTORS>(w.features, rows, s.grid);
    fill_grad_scores<VECTORS>(s, grad_hidden, slopes + column, w.features, w.grad_scores, rows);
    for (long f = 0; f < s.features(); f++)
      multiply<true, VECTORS>({grad_hidden, 1, s.unit_step}, w.features + f * rows * TILE, TILE,
                              grad_coef + f * s.units * s.token_step + column, s.token_step, s.units, rows);
    multiply_wide<true>({w.grad_scores, TILE, 1}, key_rows, s.width_step, w.grad_query + first * s.width_step,
                        s.width_step, rows, width_vectors, VECTORS * LANES);
    multiply_wide<true>({w.grad_scores, 1, TILE}, query, s.width_step, grad_key, s.width_step, VECTORS * LANES,
                        width_vectors, rows);
  }
}

// dH, dV and the item's share of dW, from O = H U and U = W^T V.
template <typename T>
void pull_back_output(const Call& c, const Shape& s, const BackwardScratch& w, const float* projector,
                      float* grad_projector, long b, long h) {
  const long narrow = s.unit_step * s.width_step;
  read_rows(item<T>(c.value, b, h), c.value.token, w.value, s.width_step, s.tokens, s.width, 1.0f);
  read_rows(item<T>(c.output, b, h), c.output.token, w.grad_output, s.width_step, s.tokens, s.width, 1.0f);

  clear(w.narrow_columns, narrow);
  multiply_small({w.value, 1, s.width_step}, projector, s.unit_step, w.narrow_columns, s.unit_step, s.width_step,
                 s.unit_step, s.tokens);
  clear(w.grad_hidden, s.rows * s.unit_step);
  multiply_small({w.grad_output, s.width_step, 1}, w.narrow_columns, s.unit_step, w.grad_hidden, s.unit_step, s.rows,
                 s.unit_step, s.width);

  const float* hidden = c.hidden + (b * s.heads + h) * s.tokens * s.rank;
  read_rows(hidden, s.rank, w.hidden, s.unit_step, s.tokens, s.rank, 1.0f);
  clear(w.narrow, narrow);
  multiply_small({w.hidden, 1, s.unit_step}, w.grad_output, s.width_step, w.narrow, s.width_step, s.units,
                 s.width_step, s.tokens);
  transpose(w.narrow, s.width_step, w.narrow_columns, s.unit_step, s.unit_step, s.width_step);
  multiply_small({w.value, s.width_step, 1}, w.narrow_columns, s.unit_step, grad_projector, s.unit_step, s.rows,
                 s.unit_step, s.width);
  clear(w.grad_value, s.rows * s.width_step);
  multiply_small({projector, s.unit_step, 1}, w.narrow, s.width_step, w.grad_value, s.width_step, s.rows,
                 s.width_step, s.rank);
  write_rows(w.grad_value, s.width_step, item<T>(c.grad_value, b, h), c.grad_value.token, s.tokens, s.width);
}

template <typename T>
void backward_item(const Call& c, const Shape& s, const BackwardScratch& w, const float* slopes,
                   const float* projector, float* grad_coef, float* grad_projector, long b, long h) {
  pull_back_output<T>(c, s, w, projector, grad_projector, b, h);
  read_rows(item<T>(c.query, b, h), c.query.token, w.query, s.width_step, s.tokens, s.width, s.scale);
  read_rows(item<T>(c.key, b, h), c.key.token, w.key, s.width_step, s.tokens, s.width, 1.0f);
  transpose(w.key, s.width_step, w.key_columns, s.token_step, s.vectors * LANES, s.width_step);
  clear(w.grad_query, s.rows * s.width_step);
  clear(w.grad_key, s.vectors * LANES * s.width_step);
  for_tiles(s, [&](auto vectors, long column) { backward_tile<vectors>(s, w, slopes, grad_coef, column); });
  // The query was read with the scale in it, so only dQ still lacks it.
  for (long i = 0; i < s.rows * s.width_step; i += LANES)
    store(w.grad_query + i, load(w.grad_query + i) * s.scale);
  write_rows(w.grad_query, s.width_step, item<T>(c.grad_query, b, h), c.grad_query.token, s.tokens, s.width);
  write_rows(w.grad_key, s.width_step, item<T>(c.grad_key, b, h), c.grad_key.token, s.tokens, s.width);
}

// The parameters' gradients of one unit, summed over the parts in their order; the first part takes the sums.
void sum_parts(const Call& c, const Shape& s, float* grad_coef, const float* grad_projector, long parts, long h,
               long p) {
  const long coefficients = s.coefficients(), projector = s.rows * s.unit_step;
  for (long f = 0; f < s.features(); f++) {
    float* sum = grad_coef + h * parts * coefficients + (f * s.units + p) * s.token_step;
    for (long part = 1; part < parts; part++)
      for (long q = 0; q < s.tokens; q++) sum[q] += sum[part * coefficients + q];
    float* out = f < s.grid ? c.grad_cosines : c.grad_sines;
    for (long q = 0; q < s.tokens; q++) out[s.coefficient(h, p, q, f % s.grid)] = sum[q];
  }
  for (long q = 0; q < s.tokens; q++) {
    float sum = 0;
    for (long part = 0; part < parts; part++) sum += grad_projector[(h * parts + part) * projector + q * s.unit_step + p];
    c.grad_projector[(h * s.tokens + q) * s.rank + p] = sum;
  }
}

template <typename T>
int backward(const Call& c) {
  const Shape s(c);
  Arena needed;
  BackwardScratch(s, needed);
  const long parts = std::min(s.batch, (SUMMANDS + s.heads - 1) / s.heads);
  const long coefficients = s.coefficients(), projector = s.rows * s.unit_step;
  float* packed = memory.zeros(s.heads * (1 + parts) * (coefficients + projector) + c.threads * needed.used());
  if (!packed) return 1;
  float* projectors = packed + s.heads * coefficients;
  float* grads = projectors + s.heads * projector;
  float* grad_projectors = grads + s.heads * parts * coefficients;
  float* scratch = grad_projectors + s.heads * parts * projector;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (long h = 0; h < s.heads; h++) {
      pack_for_backward(c, s, h, packed + h * coefficients);
      pack_projector(c, s, h, projectors + h * projector);
    }
    Arena arena(scratch + omp_get_thread_num() * needed.used());
    const BackwardScratch mine(s, arena);
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * parts; t++) {
      const long h = t / parts, part = t % parts;
      for (long b = s.batch * part / parts; b < s.batch * (part + 1) / parts; b++)
        backward_item<T>(c, s, mine, packed + h * coefficients, projectors + h * projector,
                         grads + t * coefficients, grad_projectors + t * projector, b, h);
    }
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * s.rank; t++)
      sum_parts(c, s, grads, grad_projectors, parts, t / s.rank, t % s.rank);
  }
  memory.release_if_large();
  return 0;
}

} // namespace

// 0, or 1 where memory ran out. dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" int karat_forward(const Call* c) {
  return c->dtype == 0 ? forward<float>(*c) : c->dtype == 1 ? forward<bfloat16>(*c) : forward<float16>(*c);
}

extern "C" int karat_backward(const Call* c) {
  return c->dtype == 0 ? backward<float>(*c) : c->dtype == 1 ? backward<bfloat16>(*c) : backward<float16>(*c);
}
