"""Launches the kernels of O = psi(A) V: one for a forward pass, two for a backward pass."""

from typing import Any

import torch
import triton
from torch import Tensor

from karat_scale.attention.kernels.triton_memory import are_aligned, device_of, room_for_rows, rows_in
from karat_scale.attention.kernels.triton_plans import Launch
from karat_scale.attention.kernels.triton_psi import psi_forward_kernel, psi_grad_key_kernel, psi_grad_query_kernel
from karat_scale.attention.kernels.triton_tiles import Products, Sizes, block, choose_psi_tiles, products_of

KERNELS = {"forward": psi_forward_kernel, "grad_query": psi_grad_query_kernel, "grad_key": psi_grad_key_kernel}
# By all that a launch depends on; a model has a handful.
_launches: dict[Any, Launch] = {}


def forward(output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> None:
    """Fill O [B, h, N, dv] of query, key and value and of psi, float32 [h, 2 G + 1]."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    with device_of(query):
        launch = _launch("forward", heads, [output], psi, products)
        launch(*heads, psi, output, aligned=are_aligned(*heads, psi, output))


def backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the four, laid out as `torch.empty_like` does."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    upstream = rows_in(grad_output, products.dtype)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    grad_query, grad_key, grad_value = rows = [room_for_rows(x) for x in grads]
    with device_of(query):
        aligned = are_aligned(*heads, psi, upstream)
        launch = _launch("grad_query", heads, [upstream, grad_query], psi, products)
        batch, count = query.shape[:2]
        partial = psi.new_empty((batch, count, launch.grid[0] // (batch * count), psi.shape[1]))
        launch(*heads, psi, upstream, grad_query, partial, aligned=aligned)
        launch = _launch("grad_key", heads, [upstream, grad_key, grad_value], psi, products)
        launch(*heads, psi, upstream, grad_key, grad_value, aligned=aligned)
    for grad, written in zip(grads, rows, strict=True):
        if written is not grad:
            grad.copy_(written)
    return *grads, partial.sum((0, 2))


def _launch(kernel: str, heads: list[Tensor], others: list[Tensor], psi: Tensor, products: Products) -> Launch:
    """The launch of a kernel, a program for each tile; `others` are the other tensors of rows that it is given."""
    tensors = (*heads, *others)
    kinds = tuple((x.stride(), x.dtype) for x in tensors)
    signature = (kernel, heads[0].shape, heads[2].shape[3], psi.shape, kinds, products, heads[0].device)
    found = _launches.get(signature)
    if found is None:
        batch, count, tokens, width = heads[0].shape
        sizes = Sizes(batch, count, tokens, width, heads[2].shape[3], 1, psi.shape[1] // 2)
        cut = choose_psi_tiles(kernel, sizes, products)
        programs = triton.cdiv(tokens, cut.own) * batch * count
        numbers = (count, tokens, width**-0.5, *(step for x in tensors for step in x.stride()[:3]))
        constants = {
            "GRID": sizes.grid,
            "WIDTH": width,
            "BLOCK_WIDTH": block(width),
            "VALUE_WIDTH": sizes.value_width,
            "BLOCK_VALUE": block(sizes.value_width),
            "BLOCK_OWN": cut.own,
            "BLOCK_WALKED": cut.walked,
            # A power of two scales 16-bit queries without a rounding.
            "SCALED_FIRST": width in (16, 64),
            "FAST": products.fast,
            "SCORES": products.scores,
            "PRECISION": products.others,
        }
        found = _launches[signature] = Launch(KERNELS[kernel], programs, numbers, constants, cut.options)
    return found
