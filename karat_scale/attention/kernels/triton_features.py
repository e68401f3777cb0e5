"""What the Triton kernels share: loading tiles, and sine and cosine of scores with their harmonics."""

import os

import triton
import triton.language as tl

# The interpreter has no special-function unit.
_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
# Adding and taking away 1.5 * 2^23 rounds a float32 to an integer on the FMA pipe; a conversion runs at an eighth of
# its rate.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def load_rows(base, rows, row_stride, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix of WIDTH contiguous columns as [rows, BLOCK], zero outside the matrix."""
    columns = tl.arange(0, BLOCK)
    keep = rows[:, None] < tokens
    if WIDTH != BLOCK:
        keep = keep & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=keep, other=0.0)


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
def sine_cosine(x, FAST: tl.constexpr):
    """sin(x) and cos(x): FAST is good to 2^-20, which 16-bit features do not notice, otherwise to float32."""
    if FAST:
        return _sine_cosine_fast(x)
    return _sine_cosine_exact(x)


@triton.jit
def rotate(sin, cos, sin_step, cos_step):
    """sin and cos of the next harmonic. Its error grows with m; that of Chebyshev's recurrence grows with m^2."""
    return sin * cos_step + cos * sin_step, cos * cos_step - sin * sin_step


@triton.jit
def _sine_cosine_fast(x):
    # 2 pi in two parts: the special-function unit is exact only near zero.
    turns = (x * 0.15915494309189535 + _ROUNDER) - _ROUNDER
    x = x - turns * 6.2831854820251465
    x = x + turns * 1.7484556e-07
    if _HARDWARE:
        sin = tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        cos = tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return sin, cos
    return tl.sin(x), tl.cos(x)


@triton.jit
def _sine_cosine_exact(x):
    # pi / 2 in three parts of few enough bits that a quarter's multiples are exact up to |x| of about 10^4.
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
