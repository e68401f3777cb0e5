"""Runs forward and backward passes by the Triton kernels: finds the launches, makes room, launches.

Tensors reach the kernels with contiguous rows, at addresses that are known, on the current device. O = psi(A) V has
kernels of its own: one for a forward pass, two for a backward pass.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from karat_scale.attention.kernels.triton_plans import BackwardPlan, ForwardPlan, Launch
from karat_scale.attention.kernels.triton_psi import psi_forward_kernel, psi_grad_key_kernel, psi_grad_query_kernel
from karat_scale.attention.kernels.triton_tiles import (
    Products,
    Sizes,
    block,
    choose_psi_tiles,
    padded_tokens,
    products,
    products_of,
)


def rows_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` with contiguous rows, copied only where it must be."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if _has_rows(tensor) else tensor.contiguous()


def room_for_rows(grad: Tensor) -> Tensor:
    """The gradient itself, or where its rows are not contiguous, room for one whose rows are."""
    return grad if _has_rows(grad) else torch.empty_like(grad, memory_format=torch.contiguous_format)


def _has_rows(tensor: Tensor) -> bool:
    """Whether rows are contiguous, and near enough for the kernels' offsets of 32 bits."""
    return tensor.stride(-1) == 1 and tensor.shape[-2] * tensor.stride(-2) < 2**31


def room(grad: Tensor) -> Tensor:
    """The gradient itself, or where it is not contiguous, room for one that is."""
    return grad if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether all addresses are multiples of 16."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses & 15 == 0


def device_of(tensor: Tensor) -> Any:
    """A context in which the tensor's device is the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


# By all that launches depend on; a model has a handful.
_forward_plans: dict[Any, ForwardPlan] = {}
_backward_plans: dict[Any, BackwardPlan] = {}


def forward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    base: str,
) -> None:
    """Fills O, H, U or the mask's bits, the packed coefficients and their scale, as `triton_fourier` makes room for
    them."""
    output, hidden, reader, coef, coef_scale = outputs
    dtype = hidden.dtype
    q, k, v = rows_in(query, dtype), rows_in(key, dtype), rows_in(value, dtype)
    cos, sin, w = cos_coef.contiguous(), sin_coef.contiguous(), proj.contiguous()
    added, keep = _spread(bias, q), _spread(mask, q)
    narrow, bits = _narrow_and_bits(reader, mask, q)
    strides = q.stride(), k.stride(), v.stride(), _stride(added), _stride(keep), _stride(bits)
    dtypes = cos.dtype, sin.dtype, w.dtype, None if bias is None else bias.dtype, output.dtype, dtype, coef.dtype
    signature = (q.shape, v.shape[3], cos.shape, strides, reader.shape[:2], dtypes, base, q.device)
    with device_of(q):
        plan = _forward_plans.get(signature)
        if plan is None:
            sizes, chosen = _sizes(q, v, cos), products(dtype, coef.dtype == torch.float16)
            plan = _forward_plans[signature] = ForwardPlan(
                sizes, chosen, base, *strides, output.stride(), reader.shape[:2]
            )
        aligned = are_aligned(q, k, v, cos, sin, w, added, keep)
        plan.prepare(cos, sin, w, v, keep, coef, coef_scale, narrow, bits, aligned=aligned)
        plan.forward(q, k, added, bits, coef, coef_scale, narrow, w, v, output, hidden, aligned=aligned)


def backward(
    grad_output: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    base: str,
    bias_is_learned: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of `given`, and of the bias or None, laid out as `torch.empty_like` does.

    `kept` is H, U or the mask's bits, the packed coefficients and their scale; `given` are query, key, value, cos_coef,
    sin_coef, proj.
    """
    hidden, reader, coef, coef_scale = kept
    query, key, value, cos_coef, _, proj = given
    dtype = hidden.dtype
    q, k, v = rows_in(query, dtype), rows_in(key, dtype), rows_in(value, dtype)
    upstream, w = rows_in(grad_output, grad_output.dtype), proj.contiguous()
    added = _spread(bias, q)
    narrow, bits = _narrow_and_bits(reader, mask, q)
    grads = [torch.empty_like(x) for x in given]
    rows = [room_for_rows(x) for x in grads[:3]]
    parameters = [room(x) for x in grads[3:]]
    grad_query, grad_key, grad_value = rows
    bias_by_image = bias_is_learned and bias is not None and bias.dim() == 4 and bias.shape[0] > 1
    strides = (
        q.stride(),
        k.stride(),
        v.stride(),
        _stride(added),
        _stride(bits),
        upstream.stride(),
        grad_query.stride(),
        grad_key.stride(),
        grad_value.stride(),
    )
    dtypes = (*(x.dtype for x in given), upstream.dtype, dtype, coef.dtype, None if bias is None else bias.dtype)
    signature = (q.shape, v.shape[3], cos_coef.shape, strides, dtypes, base, bias_is_learned, bias_by_image, q.device)
    with device_of(q):
        plan = _backward_plans.get(signature)
        if plan is None:
            sizes, chosen = _sizes(q, v, cos_coef), products(dtype, coef.dtype == torch.float16)
            plan = _backward_plans[signature] = BackwardPlan(sizes, chosen, base, *strides, bias_by_image)
        aligned = are_aligned(q, k, v, w, added, upstream)
        batch, heads, tokens, _ = q.shape
        padded_rank = coef.shape[3]
        wide = torch.float32
        grad_hidden = hidden.new_empty(hidden.shape, dtype=coef.dtype)
        grad_scale = hidden.new_empty((batch, heads), dtype=wide)
        grad_base = None if base == "zero" else hidden.new_empty((batch, heads, tokens), dtype=wide)
        proj_parts = hidden.new_empty((plan.readout_parts, heads, tokens, padded_rank), dtype=wide)
        shape = (plan.coef_parts, heads, plan.features, padded_tokens(tokens), padded_rank)
        coef_parts = hidden.new_empty(shape, dtype=wide)
        bias_parts = hidden.new_empty((plan.bias_parts, heads, tokens, tokens), dtype=wide) if bias_is_learned else None
        plan.readout(
            hidden,
            narrow,
            w,
            v,
            bits,
            upstream,
            grad_value,
            grad_hidden,
            grad_scale,
            grad_base,
            proj_parts,
            aligned=aligned,
        )
        shared = (q, k, added, bits, coef, coef_scale, grad_hidden, grad_scale, grad_base)
        plan.grad_query(*shared, grad_query, aligned=aligned)
        plan.grad_key(*shared, grad_key, bias_parts, coef_parts, aligned=aligned)
        if plan.grad_coef is not None:
            plan.grad_coef(*shared, grad_key, None, coef_parts, aligned=aligned)
        plan.reduce(coef_parts, proj_parts, *parameters, aligned=True)
    for grad, written in zip(grads, (*rows, *parameters), strict=True):
        if written is not grad:
            grad.copy_(written)
    if bias_parts is None or bias is None:
        return *grads, None
    return *grads, torch.empty_like(bias).copy_(bias_parts.sum_to_size(bias.shape))


def _narrow_and_bits(reader: Tensor, mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """U, or the bits of a mask as [B, h, 2, N / 32, N]."""
    if mask is None:
        return reader, None
    return None, reader.expand(*query.shape[:2], -1, -1, -1)


def _spread(pairs: Tensor | None, query: Tensor) -> Tensor | None:
    """A bias or a mask as [B, h, N, N]."""
    return None if pairs is None else pairs.expand(*query.shape[:3], query.shape[2])


def _stride(pairs: Tensor | None) -> tuple[int, ...] | None:
    return None if pairs is None else pairs.stride()


def _sizes(query: Tensor, value: Tensor, cos_coef: Tensor) -> Sizes:
    batch, heads, tokens, width = query.shape
    return Sizes(batch, heads, tokens, width, value.shape[3], cos_coef.shape[1], cos_coef.shape[3])


PSI_KERNELS = {"forward": psi_forward_kernel, "grad_query": psi_grad_query_kernel, "grad_key": psi_grad_key_kernel}
_psi_launches: dict[Any, Launch] = {}


def psi_forward(output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> None:
    """Fill O [B, h, N, dv] of query, key and value and of psi, float32 [h, 2 G + 1]."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    with device_of(query):
        launch = _psi_launch("forward", heads, [output], psi, products)
        launch(*heads, psi, output, aligned=are_aligned(*heads, psi, output))


def psi_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the four, laid out as `torch.empty_like` does."""
    products = products_of(query.dtype, key.dtype, value.dtype)
    heads = [rows_in(x, products.dtype) for x in (query, key, value)]
    upstream = rows_in(grad_output, products.dtype)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    grad_query, grad_key, grad_value = rows = [room_for_rows(x) for x in grads]
    with device_of(query):
        aligned = are_aligned(*heads, psi, upstream)
        launch = _psi_launch("grad_query", heads, [upstream, grad_query], psi, products)
        batch, count = query.shape[:2]
        partial = psi.new_empty((batch, count, launch.grid[0] // (batch * count), psi.shape[1]))
        launch(*heads, psi, upstream, grad_query, partial, aligned=aligned)
        launch = _psi_launch("grad_key", heads, [upstream, grad_key, grad_value], psi, products)
        launch(*heads, psi, upstream, grad_key, grad_value, aligned=aligned)
    for grad, written in zip(grads, rows, strict=True):
        if written is not grad:
            grad.copy_(written)
    return *grads, partial.sum((0, 2))


def _psi_launch(kernel: str, heads: list[Tensor], others: list[Tensor], psi: Tensor, products: Products) -> Launch:
    """The launch of a kernel, a program for each tile; `others` are the other tensors of rows that it is given."""
    tensors = (*heads, *others)
    kinds = tuple((x.stride(), x.dtype) for x in tensors)
    signature = (kernel, heads[0].shape, heads[2].shape[3], psi.shape, kinds, products, heads[0].device)
    found = _psi_launches.get(signature)
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
        found = _psi_launches[signature] = Launch(PSI_KERNELS[kernel], programs, numbers, constants, cut.options)
    return found
