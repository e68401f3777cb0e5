"""Memory-lean KArAt attention in plain PyTorch, for any device, basis and form.

It computes scores and features tile by tile, and again in the backward pass. In addition to inputs and outputs, it
keeps only H and the features of one tile. It never forms the N x N matrix S (see `routes`).

Forward and backward are registered with torch.library: torch.compile takes each as one opaque operation, and
autograd uses the second as the derivative of the first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.bases import BASE_ACTIVATIONS, Basis, FeatureBasis, Fourier, basis_of, key_of
from karat_scale.attention.call import FourierCall, as_4d, compute_dtype, full_precision, refuse_second_derivative
from karat_scale.attention.routes import Head, HeadGradients, Workspace, choose_route, pick_broadcast

# BLAS multiplies by a matrix of 16 columns about as fast as by one of 12.
RANK_MULTIPLE = 16


def attend(call: FourierCall) -> Tensor:
    """O [B, h, N, dv] in the value's dtype, of the modular Fourier form; differentiable once in all but the mask."""
    query, key, value, cos_coef, sin_coef, proj, base, bias, mask = call
    dtype = compute_dtype(query, key, value, cos_coef, sin_coef, proj, bias)
    coef = Fourier.pack(_ANY_FOURIER, {"cos_coef": cos_coef.to(dtype), "sin_coef": sin_coef.to(dtype)})
    return attend_units(query, key, value, coef, proj, _ANY_FOURIER, base, bias, mask, mask)


def attend_units(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor | None,
    basis: Basis,
    base: str,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cut: Tensor | None = None,
    on_simplex: bool = False,
) -> Tensor:
    """O = S V [B, h, N, dv] in the value's dtype, where S = H W^T, or H itself where there is no W.

    Differentiable once in all but the masks.

    Args:
        query, key, value: [B, h, N, d], [B, h, M, d] and [B, h, P, dv].
        coef: the packed coefficients, [h, K, r, M]; without `proj`, r = P.
        proj: W [h, P, r].
        basis, base: phi_pq(x) less b(x), and b(x) by name.
        bias: added to the scores; broadcastable to [B, h, N, M].
        mask: boolean, broadcastable to [B, h, N, M]; a false pair adds nothing to H.
        cut: boolean, broadcastable to [B, h, N, P]; where false, S is 0.
        on_simplex: projects each row of S onto the simplex.
    """
    dtype = compute_dtype(query, key, value, coef, proj, bias)
    coef = coef.to(dtype)
    if proj is not None:
        padding = -proj.shape[-1] % RANK_MULTIPLE if isinstance(basis, FeatureBasis) else 0
        coef, proj = functional.pad(coef, (0, 0, 0, padding)), functional.pad(proj.to(dtype), (0, padding))
    forward = torch.ops.karat_scale.streaming_forward
    on_scores = as_4d(bias), as_4d(mask), as_4d(cut)
    output: Tensor = forward(query, key, value, coef.contiguous(), proj, *on_scores, key_of(basis), base, on_simplex)[0]
    return output


_ANY_FOURIER = Fourier()


def _streaming_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    cut: Tensor | None,
    basis: str,
    base: str,
    on_simplex: bool,
) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv], and H [h, B, N, r] where there is a W (else it is as large as S, and computed again)."""
    output, hidden = _fake_forward(query, key, value, coef, proj)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis_of(basis), value.shape[2] if proj is None else 0)
        heads = _heads(value, coef, proj, hidden, base, on_simplex)
        for number, head in enumerate(heads):
            q, k = (x[:, number].to(coef.dtype) for x in (query, key))
            route = choose_route(head, work, cut is not None)
            for batch, rows in work.tiling.tiles():
                tile = work.load(q, k, number, batch, rows)
                route.read(tile, pick_broadcast(cut, number, batch, rows), batch, rows, output[:, number])
            route.finish_reading(output[:, number])
    return output, hidden


def _streaming_backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coef: Tensor,
    proj: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    cut: Tensor | None,
    basis: str,
    base: str,
    on_simplex: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value, coef, proj (empty without one), and bias (empty unless `needs_bias`)."""
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_coef = torch.zeros_like(coef)
    grad_proj = coef.new_zeros(0 if proj is None else proj.shape)
    grad_bias = coef.new_zeros(bias.shape if needs_bias and bias is not None else 0)
    with full_precision(query.device):
        work = Workspace(query, coef, bias, mask, basis_of(basis), value.shape[2] if proj is None else 0)
        heads = _heads(value, coef, proj, hidden, base, on_simplex)
        for number, head in enumerate(heads):
            q, k, grad_o = (x[:, number].to(coef.dtype) for x in (query, key, grad_output))
            grad_q, grad_k, grad_v = (
                _room_like(x[:, number], coef.dtype).zero_() for x in (grad_query, grad_key, grad_value)
            )
            grads = HeadGradients(grad_o, grad_v, grad_coef[number], grad_proj if proj is None else grad_proj[number])
            route = choose_route(head, work, cut is not None)
            route.start_pull_back(grads)
            for batch, rows in work.tiling.tiles():
                tile = work.load(q, k, number, batch, rows)
                grad_scores = route.pull_back(tile, pick_broadcast(cut, number, batch, rows), batch, rows, grads)
                if needs_bias:
                    part = pick_broadcast(grad_bias, number, batch, rows)
                    part += grad_scores.sum_to_size(part.shape)
                torch.bmm(grad_scores, k[batch], out=grad_q[batch, rows])
                grad_k[batch].baddbmm_(grad_scores.mT, q[batch, rows])
            route.finish_pull_back(grads)
            torch.mul(grad_q, work.scale, out=grad_query[:, number])
            torch.mul(grad_k, work.scale, out=grad_key[:, number])
            grad_value[:, number] = grad_v
    if needs_bias and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_coef, grad_proj, grad_bias


def _heads(
    value: Tensor, coef: Tensor, proj: Tensor | None, hidden: Tensor, base: str, on_simplex: bool
) -> Iterator[Head]:
    activation = BASE_ACTIVATIONS[base]
    for number in range(value.shape[1]):
        kept, w = (hidden, None) if proj is None else (hidden[number], proj[number])
        yield Head(value[:, number].to(coef.dtype), coef[number], w, kept, activation, on_simplex)


def _room_like(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Room to compute `target` in: itself where the dtype allows."""
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, h, N, dv] stored token by token, as the layers that merge the heads want it."""
    batch, heads, tokens, _ = query.shape
    width = value.shape[3]
    return value.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 11
    refuse_second_derivative("streaming")
    needs_bias = ctx.needs_input_grad[5]
    backward = torch.ops.karat_scale.streaming_backward
    saved = ctx.saved_tensors
    *grads, grad_proj, grad_bias = backward(grad_output, *saved, *ctx.settings, needs_bias)
    has_proj = saved[5] is not None
    return *grads, grad_proj if has_proj else None, grad_bias if needs_bias else None, *(None,) * 5


_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(
    "streaming_forward(Tensor query, Tensor key, Tensor value, Tensor coef, Tensor? proj, Tensor? bias, "
    "Tensor? mask, Tensor? cut, str basis, str base, bool on_simplex) -> (Tensor, Tensor)"
)
_library.define(
    "streaming_backward(Tensor grad_output, Tensor hidden, Tensor query, Tensor key, Tensor value, Tensor coef, "
    "Tensor? proj, Tensor? bias, Tensor? mask, Tensor? cut, str basis, str base, bool on_simplex, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("streaming_forward", _streaming_forward, "CompositeExplicitAutograd")
_library.impl("streaming_backward", _streaming_backward, "CompositeExplicitAutograd")


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, coef: Tensor, proj: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _width = query.shape
    hidden = coef.new_empty(0) if proj is None else coef.new_empty(heads, batch, tokens, coef.shape[2])
    return _empty_output(query, value), hidden


def _fake_backward(
    grad_output: Tensor, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, coef: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    proj, bias, *_, needs_bias = rest
    # Contiguous, whatever strides the bias and W have.
    grad_bias = coef.new_empty(bias.shape, dtype=bias.dtype) if needs_bias else coef.new_empty(0)
    grad_proj = coef.new_empty(0 if proj is None else proj.shape)
    q, k, v, c = (torch.empty_like(x) for x in (query, key, value, coef))
    return q, k, v, c, grad_proj, grad_bias


torch.library.register_fake("karat_scale::streaming_forward", _fake_forward, lib=_library)
torch.library.register_fake("karat_scale::streaming_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "karat_scale::streaming_forward", _differentiate, setup_context=_setup_context, lib=_library
)
