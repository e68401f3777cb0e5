"""How the Triton kernels divide their work: tiles, groups of harmonics, parts of the batch; the dtypes of products."""

from typing import Any, NamedTuple

import torch

# Rows to which coefficients are padded: a multiple of every tile.
TOKEN_MULTIPLE = 128
# Harmonics that packed float16 arithmetic computes within the error of their float16 sine and cosine.
LARGEST_HALF = 4
# Harmonics whose coefficients' gradients one program can hold in registers, at a rank of 16.
COEF_GROUP = 3
# Harmonics the backward pass writes out; beyond, a loop keeps the code short.
LARGEST_UNROLLED = 4
# Pairs in a word of a mask's bits; under a mask no tile walks along more.
MASK_WORD = 32
# Programs that share a batch: two on each multiprocessor of a large card, twice.
PROGRAMS_WANTED = 528


class Sizes(NamedTuple):
    """The sizes of a call: O is [batch, heads, tokens, value_width], query's heads are `width` wide."""

    batch: int
    heads: int
    tokens: int
    width: int
    value_width: int
    rank: int
    grid: int


class Products(NamedTuple):
    """How matrices are multiplied: the dtype of query, key and value, and Triton's precision of float32 operands.

    FAST as in `triton_features`. `scores` is the precision of Q K^T, `others` that of all other products.
    """

    dtype: torch.dtype
    fast: bool
    scores: str
    others: str


class Tiles(NamedTuple):
    """Rows of the side a program owns and of the side it walks along, and how the kernel is compiled."""

    own: int
    walked: int
    options: dict[str, Any]


def products_of(query: torch.dtype, key: torch.dtype, value: torch.dtype) -> Products:
    """The products of a call: those of one 16-bit dtype where all three have it, else float32's."""
    if query == key == value and query != torch.float32:
        return products(query, True)
    return products(torch.float32, tf32_is_allowed())


def tf32_is_allowed() -> bool:
    """Return whether torch allows TF32 in products. Once its newer setting is used, torch refuses to read the older."""
    everywhere: Any = torch.backends
    precision = getattr(everywhere.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return bool(everywhere.cuda.matmul.allow_tf32)
    return bool((everywhere.fp32_precision if precision == "none" else precision) == "tf32")


def products(dtype: torch.dtype, fast: bool) -> Products:
    """Return the products of a dtype.

    TF32 keeps 11 bits, as float16 does, so where it is allowed features may be float16. Scores are never rounded to 11
    bits: the phase of a harmonic must be exact to more than that.
    """
    if dtype != torch.float32:
        return Products(dtype, True, "tf32", "tf32")
    return Products(dtype, fast, "tf32x3", "tf32" if fast else "tf32x3")


def block(size: int) -> int:
    """The power of two, at least 16, that a matrix product covers `size` with."""
    return max(16, 1 << (size - 1).bit_length())


def padded_tokens(tokens: int) -> int:
    """Rows of the packed coefficients."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def parts_of(batch: int, programs: int) -> tuple[int, int]:
    """Return the images in a part and the number of parts, such that there are enough programs.

    Both depend only on shapes: the order of sums, and so their bits, must not depend on the device.
    """
    wanted = min(batch, -(-PROGRAMS_WANTED // programs))
    images = -(-batch // wanted)
    return images, -(-batch // images)


def coef_groups(grid: int) -> tuple[int, int]:
    """Harmonics in a group of near-equal size, and the number of groups."""
    groups = -(-grid // COEF_GROUP)
    return -(-grid // groups), groups


def is_fused(sizes: Sizes, products: Products) -> bool:
    """Return whether one launch has room for dK and dC."""
    narrow = block(sizes.rank) * sizes.grid <= 16 * COEF_GROUP and block(sizes.width) <= 64
    return narrow and products.dtype != torch.float32


def choose_tiles(kernel: str, sizes: Sizes, products: Products, architecture: int, paired: bool = False) -> Tiles:
    """Return the tiles of a kernel on compute capability 8.0 (80), 9.0 (90) and so on.

    The kernels are "forward", "grad_query", "grad_key" (with dC), "grad_key_alone" and "grad_coef". Tiles are so narrow
    that no register spills: tests compile the kernels for each architecture and count spills. `paired` calls have a
    bias or a mask, whose addresses take registers too.
    """
    # With an explicit limit, ptxas does not spill a register or two to raise occupancy.
    spacious = {"maxnreg": 255}
    if products.dtype == torch.float32:
        own = 64 if block(sizes.width) <= 64 and block(sizes.rank) == 16 else 32
        return Tiles(own, 16, compile_options(4, 1, **spacious))
    easy = block(sizes.width) <= 64 and block(sizes.rank) == 16
    if kernel == "grad_key_alone" and block(sizes.width) > 64:
        # Two warp groups share the sums of a wide head; a single one spills at many harmonics.
        return Tiles(64, 16, compile_options(8, 2, **spacious))
    if architecture // 10 == 10:
        # From 64 rows on, Triton keeps sums in tensor memory: dQ would take all of it, and Horner's sums would pass
        # through registers for each harmonic.
        walked = 32 if easy and not kernel.startswith("grad_key") else 16
        own = 16 if easy and paired and kernel == "grad_key" else 32
        return Tiles(own, walked, compile_options(2 if easy else 4, 2, **spacious))
    if paired:
        if easy and kernel == "grad_key" and architecture not in (80, 90):  # there, 64 rows do not spill
            return Tiles(32, 16, compile_options(4, 2, **spacious))
        return Tiles(64, 32 if easy and not kernel.startswith("grad_key") else 16, compile_options(4, 2, **spacious))
    if architecture == 90:
        if kernel == "forward" and easy and sizes.grid <= LARGEST_HALF and _covers(sizes.tokens, 128):
            return Tiles(128, 32, compile_options(4, 2, **spacious))
        walked = 16 if block(sizes.width) > 64 and kernel != "forward" else 32
        if easy and ((kernel == "grad_query" and sizes.grid <= LARGEST_UNROLLED) or sizes.grid == 1):
            walked = 64
        return Tiles(64, walked, compile_options(4, 2, **spacious))
    full = kernel == "grad_key" and sizes.grid > 1
    walked = 32 if easy and sizes.grid <= 4 and not full else 16
    return Tiles(64, walked, compile_options(4, 2, **spacious))


def choose_psi_tiles(kernel: str, sizes: Sizes, products: Products) -> Tiles:
    """The tiles of "forward", "grad_query" or "grad_key" of psi(A) V, the same for each architecture."""
    wide = block(max(sizes.width, sizes.value_width)) > 64
    if products.dtype == torch.float32:
        return Tiles(32, 16, compile_options(4, 1, maxnreg=255))
    if kernel == "forward":
        return Tiles(64, 32, compile_options(4, 2, maxnreg=255))
    return Tiles(64, 16 if wide else 32, compile_options(8 if wide else 4, 2, maxnreg=255))


def readout_rows(sizes: Sizes, products: Products, masked: bool) -> int:
    """Rows of a tile of the readout's backward pass.

    Wide float32 rows must fit 99 KB of shared memory. With Triton 3.9, 32 wide rows of more than 16 ranks spill.
    """
    if block(sizes.value_width) <= 64 and not masked:
        return 64
    return 16 if products.dtype == torch.float32 or block(sizes.rank) > 16 else 32


def _covers(tokens: int, rows: int) -> bool:
    """Return whether tiles of `rows` rows leave no more room unused than tiles of 64."""
    return -(-tokens // rows) * rows == -(-tokens // 64) * 64


def compile_options(warps: int, stages: int, **more: int) -> dict[str, Any]:
    """Triton's options for a kernel."""
    # By default, Triton fuses a product and a sum into one instruction only up to version 3.9.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **more}
