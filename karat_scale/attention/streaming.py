"""Memory-lean KArAt attention in plain PyTorch, for any device and any feature basis.

O = S V = H (W^T V), so the N x N matrix S need never exist; H = sum_f f(A) C_f^T is summed tile by tile, and the
backward pass recomputes scores and features. Beside inputs and outputs only H is kept, and the features of one
tile. A mask cuts entries of S, so with one S = H W^T is formed, by query rows.

Forward and backward are registered with torch.library: torch.compile takes each as one opaque operation, and
autograd knows the second as the derivative of the first.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.bases import BASE_ACTIVATIONS, FourierBasis
from karat_scale.attention.precision import compute_dtype, full_precision
from karat_scale.attention.readout import readout_of
from karat_scale.attention.tiles import Workspace, pick_broadcast

# BLAS multiplies by a matrix of 16 columns about as fast as by one of 12.
RANK_MULTIPLE = 16


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    base: str,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """O [B, h, N, dv] in the value's dtype; differentiable once in everything but the mask."""
    dtype = compute_dtype(query, key, value, cos_coef, sin_coef, proj, bias)
    padding = -proj.shape[-1] % RANK_MULTIPLE
    coef = FourierBasis.pack(cos_coef.to(dtype), sin_coef.to(dtype))
    coef = functional.pad(coef, (0, 0, 0, padding)).contiguous()
    proj = functional.pad(proj.to(dtype), (0, padding))
    forward = torch.ops.karat_scale.streaming_forward
    return forward(query, key, value, coef, proj, _as_4d(bias), _as_4d(mask), "fourier", base)[0]


def _as_4d(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def _streaming_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv] and H [h, B, N, r]."""
    activation = BASE_ACTIVATIONS[base]
    output, hidden = _fake_forward(query, key, value, coef)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis, backward=False)
        for head, batch in itertools.product(range(query.shape[1]), work.batches):
            q, k, v = (x[batch, head].to(coef.dtype) for x in (query, key, value))
            readout = readout_of(v, proj[head], masked=mask is not None)
            for rows in work.rows:
                tile, keep = work.load(q[:, rows], k, head, batch, rows)
                tile_hidden = tile.hidden(coef[head], activation)
                hidden[head, batch, rows] = tile_hidden
                output[batch, head, rows] = readout.output(tile_hidden, keep)
    return output, hidden


def _streaming_backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, coef and proj, and of bias (empty unless `needs_bias`)."""
    activation = BASE_ACTIVATIONS[base]
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_coef, grad_proj = torch.zeros_like(coef), torch.zeros_like(proj)
    grad_bias = coef.new_zeros(bias.shape if needs_bias and bias is not None else 0)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis, backward=True)
        for head, batch in itertools.product(range(query.shape[1]), work.batches):
            q, k, v, grad_o = (x[batch, head].to(coef.dtype) for x in (query, key, value, grad_output))
            readout = readout_of(v, proj[head], masked=mask is not None)
            grad_k = k.new_zeros(k.shape)
            for rows in work.rows:
                tile, keep = work.load(q[:, rows], k, head, batch, rows)
                grad_hidden = readout.pull_back(hidden[head, batch, rows], grad_o[:, rows], keep)
                by_unit = grad_hidden.flatten(0, 1).t().expand(coef.shape[1], -1, -1)
                grad_coef[head].baddbmm_(by_unit, tile.flat_values)
                grad_scores = tile.pull_back(grad_hidden, coef[head], activation)
                if keep is not None:
                    grad_scores *= keep
                if needs_bias:
                    part = pick_broadcast(grad_bias, head, batch, rows)
                    part += grad_scores.sum_to_size(part.shape)
                grad_query[batch, head, rows] = torch.bmm(grad_scores, k).mul_(work.scale)
                grad_k.baddbmm_(grad_scores.mT, q[:, rows], alpha=work.scale)
            grad_key[batch, head] = grad_k
            grad_value[batch, head] = readout.grad_value()
            grad_proj[head] += readout.grad_proj()
    if bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_coef, grad_proj, grad_bias


def _empty_output(value: Tensor) -> Tensor:
    """[B, h, N, dv] stored token by token, as the layers that merge the heads want it."""
    batch, heads, tokens, width = value.shape
    return value.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.basis, ctx.base = inputs[7:]


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    needs_bias = ctx.needs_input_grad[5]
    backward = torch.ops.karat_scale.streaming_backward
    *grads, grad_bias = backward(grad_output, *ctx.saved_tensors, ctx.basis, ctx.base, needs_bias)
    return *grads, grad_bias if needs_bias else None, None, None, None


_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(
    "streaming_forward(Tensor query, Tensor key, Tensor value, Tensor coef, Tensor proj, Tensor? bias, "
    "Tensor? mask, str basis, str base) -> (Tensor, Tensor)"
)
_library.define(
    "streaming_backward(Tensor grad_output, Tensor hidden, Tensor query, Tensor key, Tensor value, Tensor coef, "
    "Tensor proj, Tensor? bias, Tensor? mask, str basis, str base, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("streaming_forward", _streaming_forward, "CompositeExplicitAutograd")
_library.impl("streaming_backward", _streaming_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("karat_scale::streaming_forward", lib=_library)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, coef: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _width = query.shape
    return _empty_output(value), coef.new_empty(heads, batch, tokens, coef.shape[2])


@torch.library.register_fake("karat_scale::streaming_backward", lib=_library)
def _fake_backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    basis: str,
    base: str,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else coef.new_empty(0)
    return (*(torch.empty_like(x) for x in (query, key, value, coef, proj)), grad_bias)


torch.library.register_autograd(
    "karat_scale::streaming_forward", _differentiate, setup_context=_setup_context, lib=_library
)
