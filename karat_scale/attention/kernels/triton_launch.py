"""Runs a forward and a backward pass by the Triton kernels: finds the launches, makes room, launches."""

from typing import Any

import torch
from torch import Tensor

from karat_scale.attention.kernels.triton_memory import are_aligned, device_of, room, room_for_rows, rows_in
from karat_scale.attention.kernels.triton_plans import BackwardPlan, ForwardPlan
from karat_scale.attention.kernels.triton_tiles import Sizes, padded_tokens, products

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
