"""Memory-lean KArAt attention in plain PyTorch, for any device and any feature basis.

O = S V = H (W^T V), so the N x N matrix S need never exist; H = sum_f f(A) C_f^T is summed tile by tile, and the
backward pass recomputes scores and features. Beside inputs and outputs only H is kept, and the features of one
tile. A mask cuts entries of S, so with one S = H W^T is formed, by query rows.

Forward and backward are registered with torch.library: torch.compile takes each as one opaque operation, and
autograd knows the second as the derivative of the first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention import readout
from karat_scale.attention.bases import BASE_ACTIVATIONS, FourierBasis
from karat_scale.attention.precision import compute_dtype, full_precision
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
    output, hidden = _fake_forward(query, key, value, coef)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis)
        for head in range(query.shape[1]):
            q, k, v = (x[:, head].to(coef.dtype) for x in (query, key, value))
            for batch, rows in work.tiling.tiles():
                tile, _ = work.load(q, k, head, batch, rows)
                tile.sum_units(coef[head], BASE_ACTIVATIONS[base], out=hidden[head, batch, rows])
            if mask is None:
                output[:, head] = readout.read_out(hidden[head], v, proj[head])
            else:
                output[:, head] = readout.read_out_masked(hidden[head], v, proj[head], mask, head, work.tiling)
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
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_coef, grad_proj = torch.zeros_like(coef), torch.empty_like(proj)
    grad_bias = coef.new_zeros(bias.shape if needs_bias and bias is not None else 0)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis)
        for head in range(query.shape[1]):
            q, k, v, grad_o = (x[:, head].to(coef.dtype) for x in (query, key, value, grad_output))
            given = (hidden[head], v, proj[head])
            grad_hidden, grad_value[:, head], grad_proj[head] = (
                readout.pull_back(*given, grad_o)
                if mask is None
                else readout.pull_back_masked(*given, mask, head, work.tiling, grad_o)
            )
            grad_q = _room_like(grad_query[:, head], coef.dtype)
            grad_k = _room_like(grad_key[:, head], coef.dtype).zero_()
            for batch, rows in work.tiling.tiles():
                tile, keep = work.load(q, k, head, batch, rows)
                upstream = grad_hidden[batch, rows]
                tile.add_grad_coef(upstream, grad_coef[head])
                grad_scores = tile.pull_back(upstream, coef[head], BASE_ACTIVATIONS[base], keep)
                if needs_bias:
                    part = pick_broadcast(grad_bias, head, batch, rows)
                    part += grad_scores.sum_to_size(part.shape)
                torch.bmm(grad_scores, k[batch], out=grad_q[batch, rows])
                grad_k[batch].baddbmm_(grad_scores.mT, q[batch, rows])
            torch.mul(grad_q, work.scale, out=grad_query[:, head])
            torch.mul(grad_k, work.scale, out=grad_key[:, head])
    if bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_coef, grad_proj, grad_bias


def _room_like(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Room to compute `target` in: itself where the dtype allows."""
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


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
    grads = backward(grad_output, *ctx.saved_tensors, ctx.basis, ctx.base, needs_bias)
    return *grads[:5], grads[5] if needs_bias else None, None, None, None


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
    grad_output: Tensor, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, coef: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    proj, bias, *_, needs_bias = rest
    grad_bias = torch.empty_like(bias) if needs_bias else coef.new_empty(0)
    q, k, v, c, w = (torch.empty_like(x) for x in (query, key, value, coef, proj))
    return q, k, v, c, w, grad_bias


torch.library.register_autograd(
    "karat_scale::streaming_forward", _differentiate, setup_context=_setup_context, lib=_library
)
