"""Functions that the Triton kernels share: loads and stores of tiles, functions of scores and their derivatives.

FAST is for products of 16 bits, or of TF32, which keep 11 bits at most: sine and cosine come from the
special-function unit, features are float16.
"""

import os

import triton
import triton.language as tl

# The interpreter has neither special-function unit nor packed arithmetic.
_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
# Adding and taking away 1.5 * 2^23 rounds a float32 to an integer on the FMA pipe; a conversion runs at an eighth of
# its rate.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def place(tokens, heads, BLOCK: tl.constexpr):
    """Return the place of a program that takes one tile of BLOCK tokens of one head of one image.

    This is its tile, the number of tiles, its place among all heads of all images, its image and its head.
    """
    tiles = tl.cdiv(tokens, BLOCK)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles, tiles, item, item // heads, item % heads


@triton.jit
def load_rows(base, rows, row_stride, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix of WIDTH contiguous columns as [rows, BLOCK], zero outside the matrix."""
    columns = tl.arange(0, BLOCK)
    keep = rows[:, None] < tokens
    if WIDTH != BLOCK:
        keep = keep & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=keep, other=0.0)


@triton.jit
def load_projector(proj, rows, tokens, rank, RANK: tl.constexpr):
    """Rows of W [N, rank] as [rows, RANK], zero outside it."""
    ranks = tl.arange(0, RANK)
    inside = (rows[:, None] < tokens) & (ranks[None, :] < rank)
    return tl.load(proj + rows[:, None] * rank + ranks[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, row_stride, tokens, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the part of a tile [rows, BLOCK] that lies in the matrix."""
    columns = tl.arange(0, BLOCK)
    keep = rows[:, None] < tokens
    if WIDTH != BLOCK:
        keep = keep & (columns[None, :] < WIDTH)
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_pairs(base, queries, keys, query_stride, key_stride, tokens):
    """A tile of a matrix [N, N], zero outside it; `queries` and `keys` broadcast to the tile's shape."""
    inside = (queries < tokens) & (keys < tokens)
    return tl.load(base + queries * query_stride + keys * key_stride, mask=inside, other=0)


@triton.jit
def load_kept(bits, rows, first, tokens, WALKED: tl.constexpr):
    """Return whether each pair of a row with one of the WALKED columns from `first` on takes part.

    `bits` are words [N / 32, N] of 32 columns each. WALKED divides 32.
    """
    words = tl.load(bits + first // 32 * tokens + rows, mask=rows < tokens, other=0) >> (first % 32)
    return ((words[:, None] >> tl.arange(0, WALKED)[None, :]) & 1) != 0


@triton.jit
def scaled(rows, scale, SCALED_FIRST: tl.constexpr):
    """Return the rows, multiplied by the scale if SCALED_FIRST: then `pair_scores` leaves it out."""
    if SCALED_FIRST:
        rows = (rows.to(tl.float32) * scale).to(rows.dtype)
    return rows


@triton.jit
def pair_scores(left, right, scale, SCALED_FIRST: tl.constexpr, SCORES: tl.constexpr):
    """left right^T / sqrt(d); SCALED_FIRST says that left has the scale already."""
    scores = tl.dot(left, tl.trans(right), input_precision=SCORES)
    if not SCALED_FIRST:
        scores = scores * scale
    return scores


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left right, with left in right's dtype. For float16, each row of left is scaled by a power of two."""
    if right.dtype == tl.float16:
        unit = power_of_two_above(tl.max(tl.abs(left), 1))
        units = (left / unit[:, None]).to(tl.float16)
        return total + tl.dot(units, right) * unit[:, None]
    else:
        return tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)


@triton.jit
def power_of_two_above(x):
    """The smallest power of two above a float32 x >= 0, but 2^-100 at least, 1 for zero, -0 for infinity and NaN."""
    power = ((x.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)
    return tl.where(x == 0, 1.0, tl.where(x < 7.9e-31, 7.888609052210118e-31, power))


@triton.jit
def sine_cosine(x, FAST: tl.constexpr):
    """sin(x) and cos(x) in float32: to 2^-20 + 2^-23 |x| if FAST, otherwise to float32."""
    if FAST:
        return _sine_cosine_fast(x)
    return _sine_cosine_exact(x)


@triton.jit
def rotate(sin, cos, sin_step, cos_step):
    """sin and cos of the next harmonic. Its error grows with m; that of Chebyshev's recurrence grows with m^2."""
    return sin * cos_step + cos * sin_step, cos * cos_step - sin * sin_step


@triton.jit
def half_harmonic_step(sin):
    """Return the step of `next_half_harmonic`, 2 sin(x) in float16, from the first harmonic."""
    return sin + sin


@triton.jit
def next_half_harmonic(sin_before, cos_before, sin, cos, step):
    """exp(i (m + 1) x) = exp(i (m - 1) x) + 2 i sin(x) exp(i m x), in packed float16 arithmetic."""
    return _half_fma(step, cos, sin_before), _half_fma_negative(step, sin, cos_before)


@triton.jit
def _half_fma(a, b, c):
    if _HARDWARE:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    return (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(tl.float16)


@triton.jit
def _half_fma_negative(a, b, c):
    """c - a b, rounded once."""
    if _HARDWARE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 minus; neg.f16x2 minus, $1; fma.rn.f16x2 $0, minus, $2, $3; }",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return (c.to(tl.float32) - a.to(tl.float32) * b.to(tl.float32)).to(tl.float16)


@triton.jit
def _sine_cosine_fast(x):
    # The unit works on turns, x / 2 pi rounded to float32, which is good to 2^-23 of x.
    if _HARDWARE:
        sin = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        cos = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return sin, cos
    turns = x * 0.15915494309189535
    angle = (turns - ((turns + _ROUNDER) - _ROUNDER)) * 6.283185307179586
    return tl.sin(angle), tl.cos(angle)


@triton.jit
def _sine_cosine_exact(x):
    # pi / 2 in three parts of so few bits that their products with `quarters` are exact up to |x| of about 10^4.
    shifted = x * 0.6366197723675814 + _ROUNDER
    quarters = shifted - _ROUNDER
    x = ((x - quarters * 1.5703125) - quarters * 0.0004837512969970703) - quarters * 7.549789948768648e-08
    # Minimax polynomials on |x| <= pi / 4; 4e-9 off.
    z = x * x
    sin = x + x * z * (-0.1666665491 + z * (0.0083321758 + z * -0.00019516975))
    cos = 1.0 + z * (-0.5 + z * (0.041666647 + z * (-0.0013887364 + z * 2.4438087e-05)))
    quarter = quarters.to(tl.int32)
    swapped = (quarter & 1) == 1
    sin, cos = tl.where(swapped, cos, sin), tl.where(swapped, sin, cos)
    return tl.where((quarter & 2) == 2, -sin, sin), tl.where(((quarter + 1) & 2) == 2, -cos, cos)


@triton.jit
def base_value(x, BASE: tl.constexpr):
    """The base activation b(x), with b(0) = 0: "identity", "silu" or "gelu"."""
    if BASE == "silu":
        return x * tl.sigmoid(x)
    elif BASE == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@triton.jit
def base_derivative(x, BASE: tl.constexpr):
    """b'(x)."""
    if BASE == "silu":
        gate = tl.sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif BASE == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        return tl.full(x.shape, 1.0, tl.float32)
