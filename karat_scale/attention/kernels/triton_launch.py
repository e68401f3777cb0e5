"""Packs a call's tensors as the Triton kernels want them, chooses tiles and launches.

A program owns 64 rows, 16 for each of its 4 warps (more warps would double elementwise work), and walks along the
other side in tiles so narrow that nothing spills out of the registers: tests compile the kernels for each
architecture and count. Where that is not enough it owns 32. float32 products have no tensor core to fill; there
tiles are smaller.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from karat_scale.attention.kernels.triton_backward import grad_coef_kernel, grad_side_kernel
from karat_scale.attention.kernels.triton_forward import forward_kernel

Constants = dict[str, Any]
# Rows to which coefficients are padded: a multiple of every tile.
TOKEN_MULTIPLE = 64
# Harmonics whose coefficients' gradients one program can hold in registers.
COEF_GROUP = 3
# Harmonics the backward pass unrolls; beyond, a loop keeps the registers of one.
LARGEST_UNROLLED = 3
# Programs of the coefficients' gradients: enough to fill a large card a few times over.
PROGRAMS_WANTED = 1024


class Tiles(NamedTuple):
    """Rows of the side a program owns and of the side it walks along, and how the kernel is compiled."""

    own: int
    walked: int
    options: dict[str, int]


def choose_tiles(width: int, rank: int, grid: int, dtype: torch.dtype, capability: int) -> Tiles:
    """The tiles for heads of `width`, products in `dtype` and a device's major compute capability."""
    # With a limit of its own ptxas does not spill a register or two to raise occupancy.
    spacious = {"maxnreg": 255}
    if dtype == torch.float32:
        return Tiles(32, 16, {"num_warps": 8, "num_stages": 1, **spacious})
    if capability >= 9:
        return Tiles(64, 32, {"num_warps": 4, "num_stages": 2})
    walked = 32 if width <= 64 and rank <= 16 and grid <= 4 else 16
    # The 128 columns that wide heads take leave no room for many harmonics of 64 rows.
    own = 32 if width > 64 and grid > 4 else 64
    return Tiles(own, walked, {"num_warps": 4, "num_stages": 2, **spacious})


def forward_constants(
    width: int, value_width: int, rank: int, grid: int, dtype: torch.dtype, tiles: Tiles
) -> Constants:
    """The compile-time arguments of `forward_kernel`."""
    return {
        **_constants(width, rank, dtype),
        "GRID": grid,
        "VALUE_WIDTH": value_width,
        "BLOCK_VALUE": block(value_width),
        "BLOCK_QUERY": tiles.own,
        "BLOCK_KEY": tiles.walked,
    }


def grad_side_constants(
    width: int, rank: int, grid: int, dtype: torch.dtype, tiles: Tiles, *, own_is_query: bool
) -> Constants:
    """The compile-time arguments of `grad_side_kernel`."""
    return {
        **_constants(width, rank, dtype),
        "OWN_IS_QUERY": own_is_query,
        "GRID": grid,
        "UNROLL": grid if grid <= LARGEST_UNROLLED else 1,
        "BLOCK_OWN": tiles.own,
        "BLOCK_OTHER": tiles.walked,
    }


def grad_coef_constants(width: int, rank: int, grid: int, dtype: torch.dtype, tiles: Tiles) -> Constants:
    """The compile-time arguments of `grad_coef_kernel`: harmonics in groups of near-equal size."""
    groups = triton.cdiv(grid, COEF_GROUP)
    return {
        **_constants(width, rank, dtype),
        "GROUP": triton.cdiv(grid, groups),
        "GROUPS": groups,
        "BLOCK_QUERY": tiles.walked,
        "BLOCK_KEY": tiles.own,
    }


def _constants(width: int, rank: int, dtype: torch.dtype) -> Constants:
    return {
        "RANK": block(rank),
        "WIDTH": width,
        "BLOCK_WIDTH": block(width),
        "FAST": dtype != torch.float32,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _tiles_for(query: Tensor, rank: int, grid: int) -> Tiles:
    capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
    return choose_tiles(query.shape[-1], rank, grid, query.dtype, capability)


def block(size: int) -> int:
    """The power of two, at least 16, that a matrix product covers `size` with."""
    return max(16, triton.next_power_of_2(size))


def forward(
    query: Tensor, key: Tensor, value: Tensor, cos_coef: Tensor, sin_coef: Tensor, proj: Tensor, output: Tensor
) -> Tensor:
    """Fills O [B, h, N, dv], and returns H [B, h, N, R] with R the padded rank, in the query's dtype.

    query, key [B, h, N, d] and value [B, h, N, dv] share a dtype and have contiguous rows.
    """
    batch, heads, tokens, width = query.shape
    rank, grid = cos_coef.shape[1], cos_coef.shape[3]
    tiles = _tiles_for(query, rank, grid)
    coef = pack(cos_coef, sin_coef, query.dtype)
    padded_proj = query.new_zeros(heads, coef.shape[2], coef.shape[3])
    padded_proj[:, :tokens, :rank] = proj
    hidden = query.new_empty(batch, heads, tokens, coef.shape[3])
    with torch.cuda.device_of(query):
        forward_kernel[(triton.cdiv(tokens, tiles.own) * batch * heads,)](
            query,
            key,
            value,
            coef,
            padded_proj,
            output,
            hidden,
            heads,
            tokens,
            coef.shape[2],
            width**-0.5,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            **forward_constants(width, value.shape[3], rank, grid, query.dtype, tiles),
            **tiles.options,
        )
    return hidden


def pack(cos_coef: Tensor, sin_coef: Tensor, dtype: torch.dtype) -> Tensor:
    """Two [h, r, N, G] become one [h, 2G, padded N, R], cosine and sine by turns, zero in the padding."""
    heads, rank, tokens, grid = cos_coef.shape
    padded = triton.cdiv(tokens, TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    packed = cos_coef.new_zeros((heads, grid, 2, padded, block(rank)), dtype=dtype)
    packed[:, :, 0, :tokens, :rank] = cos_coef.permute(0, 3, 2, 1)
    packed[:, :, 1, :tokens, :rank] = sin_coef.permute(0, 3, 2, 1)
    return packed.flatten(1, 2)


def grad_query_key(
    query: Tensor, key: Tensor, cos_coef: Tensor, sin_coef: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of query and key, given dH [B, h, N, R]."""
    # d/dx (a cos(m x) + b sin(m x)) = m b cos(m x) - m a sin(m x)
    orders = torch.arange(1, cos_coef.shape[3] + 1, device=query.device, dtype=torch.float32)
    slopes = pack(orders * sin_coef, -orders * cos_coef, query.dtype)
    grad_query = _grad_side(query, key, slopes, grad_hidden, cos_coef.shape, own_is_query=True)
    grad_key = _grad_side(key, query, slopes, grad_hidden, cos_coef.shape, own_is_query=False)
    return grad_query, grad_key


def _grad_side(
    own: Tensor, other: Tensor, slopes: Tensor, grad_hidden: Tensor, units: torch.Size, *, own_is_query: bool
) -> Tensor:
    batch, heads, tokens, width = own.shape
    tiles = _tiles_for(own, units[1], units[3])
    grad_own = torch.empty_like(own)
    with torch.cuda.device_of(own):
        grad_side_kernel[(triton.cdiv(tokens, tiles.own) * batch * heads,)](
            own,
            other,
            grad_hidden,
            slopes,
            grad_own,
            heads,
            tokens,
            slopes.shape[2],
            width**-0.5,
            *own.stride()[:3],
            *other.stride()[:3],
            *grad_own.stride()[:3],
            **grad_side_constants(width, units[1], units[3], own.dtype, tiles, own_is_query=own_is_query),
            **tiles.options,
        )
    return grad_own


def grad_coef(
    query: Tensor, key: Tensor, cos_coef: Tensor, sin_coef: Tensor, grad_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of cos_coef and sin_coef, given dH [B, h, N, R].

    The batch is cut into parts by the shapes alone and their sums are added in order, so that bits do not depend
    on which program ends first.
    """
    batch, heads, tokens, width = query.shape
    _, rank, _, grid = cos_coef.shape
    tiles = _tiles_for(query, rank, grid)
    constants = grad_coef_constants(width, rank, grid, query.dtype, tiles)
    groups, group = constants["GROUPS"], constants["GROUP"]
    programs_per_part = triton.cdiv(tokens, tiles.own) * groups * heads
    batches_per_part = triton.cdiv(batch, triton.cdiv(PROGRAMS_WANTED, programs_per_part))
    parts = triton.cdiv(batch, batches_per_part)
    padded = triton.cdiv(tokens, TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    partial = torch.empty(
        (parts, heads, groups * group, 2, padded, block(rank)), dtype=torch.float32, device=query.device
    )
    with torch.cuda.device_of(query):
        grad_coef_kernel[(programs_per_part * parts,)](
            query,
            key,
            grad_hidden,
            partial,
            batch,
            batches_per_part,
            heads,
            tokens,
            padded,
            width**-0.5,
            *query.stride()[:3],
            *key.stride()[:3],
            **constants,
            **tiles.options,
        )
    total = partial.sum(0)[:, :grid, :, :tokens, :rank]
    by_cos, by_sin = total.permute(2, 0, 4, 3, 1).unbind()
    return torch.empty_like(cos_coef).copy_(by_cos), torch.empty_like(sin_coef).copy_(by_sin)
