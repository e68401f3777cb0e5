"""Memory-lean KArAt attention in plain PyTorch, for any device, basis and form.

It computes scores and features tile by tile, and again in the backward pass. In addition to inputs and outputs, it
keeps only H and the features of one tile. It never forms the N x N matrix S (see `routes`).

Forward and backward are registered with torch.library: torch.compile takes each as one opaque operation, and
autograd uses the second as the derivative of the first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.bases import BASE_ACTIVATIONS, FeatureBasis, Fourier, basis_of, key_of
from karat_scale.attention.call import (
    FourierCall,
    UnitsCall,
    as_4d,
    compute_dtype,
    empty_output,
    full_precision,
    refuse_second_derivative,
)
from karat_scale.attention.routes import Head, HeadGradients, Workspace, choose_route, pick_broadcast

# BLAS multiplies by a matrix of 16 columns about as fast as by one of 12.
RANK_MULTIPLE = 16
Forward = Callable[..., tuple[Tensor, Tensor]]


def attend(call: FourierCall, forward: Forward | None = None) -> Tensor:
    """O [B, h, N, dv] in the value's dtype, of the modular Fourier form; differentiable once in all but the mask.

    `forward` replaces the operation `streaming_forward`, and has the same arguments and results.
    """
    query, key, value, cos_coef, sin_coef, proj, bias, mask, base = call
    dtype = compute_dtype(*call[:7])
    coef = Fourier.pack(_ANY_FOURIER, {"cos_coef": cos_coef.to(dtype), "sin_coef": sin_coef.to(dtype)})
    return attend_units(UnitsCall(query, key, value, coef, proj, bias, mask, mask, _ANY_FOURIER, base), forward)


def attend_units(call: UnitsCall, forward: Forward | None = None) -> Tensor:
    """O [B, h, N, dv] of any basis in the value's dtype; differentiable once in all but the masks."""
    dtype = compute_dtype(*call[:6])
    coef, proj = call.coef.to(dtype), call.proj
    if proj is not None:
        padding = -proj.shape[-1] % RANK_MULTIPLE if isinstance(call.basis, FeatureBasis) else 0
        coef, proj = functional.pad(coef, (0, 0, 0, padding)), functional.pad(proj.to(dtype), (0, padding))
    tensors = *call[:3], coef.contiguous(), proj, *map(as_4d, call[5:8])
    forward = forward or torch.ops.karat_scale.streaming_forward
    output: Tensor = forward(*tensors, key_of(call.basis), *call[9:])[0]
    return output


_ANY_FOURIER = Fourier()
key_of(_ANY_FOURIER)  # a compiled call may not be the first to name it


def _call_of(arguments: Sequence[Any]) -> UnitsCall:
    """Return the call of an operation's arguments, which are those of `UnitsCall` with the basis by name."""
    return UnitsCall._make((*arguments[:8], basis_of(arguments[8]), *arguments[9:]))


def _streaming_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv], and H [h, B, N, r] where there is a W (else it is as large as S, and computed again)."""
    call = _call_of(arguments)
    output, hidden = fake_forward(*arguments)
    with full_precision(output.device):
        work = Workspace(call)
        for number, head in enumerate(_heads(call, hidden)):
            q, k = (x[:, number].to(hidden.dtype) for x in (call.query, call.key))
            route = choose_route(head, work)
            for batch, rows in work.tiling.tiles():
                tile = work.load(q, k, number, batch, rows)
                route.read(tile, pick_broadcast(call.cut, number, batch, rows), batch, rows, output[:, number])
            route.finish_reading(output[:, number])
    return output, hidden


def _streaming_backward(grad_output: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, coef, proj (empty without one), and bias (empty unless it is learned)."""
    *given, needs_bias = arguments
    call = _call_of(given)
    coef, proj, bias, dtype = call.coef, call.proj, call.bias, call.coef.dtype
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in call[:3])
    grad_coef = torch.zeros_like(coef)
    grad_proj = coef.new_zeros(0 if proj is None else proj.shape)
    grad_bias = coef.new_zeros(bias.shape if needs_bias and bias is not None else 0)
    with full_precision(coef.device):
        work = Workspace(call)
        for number, head in enumerate(_heads(call, hidden)):
            q, k, grad_o = (x[:, number].to(dtype) for x in (call.query, call.key, grad_output))
            grad_q, grad_k, grad_v = (
                _room_like(x[:, number], dtype).zero_() for x in (grad_query, grad_key, grad_value)
            )
            grads = HeadGradients(grad_o, grad_v, grad_coef[number], grad_proj if proj is None else grad_proj[number])
            route = choose_route(head, work)
            route.start_pull_back(grads)
            for batch, rows in work.tiling.tiles():
                tile = work.load(q, k, number, batch, rows)
                grad_scores = route.pull_back(tile, pick_broadcast(call.cut, number, batch, rows), batch, rows, grads)
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


def _heads(call: UnitsCall, hidden: Tensor) -> Iterator[Head]:
    activation = BASE_ACTIVATIONS[call.base]
    for number in range(call.value.shape[1]):
        kept, w = (hidden, None) if call.proj is None else (hidden[number], call.proj[number])
        value = call.value[:, number].to(call.coef.dtype)
        yield Head(value, call.coef[number], w, kept, activation, call.on_simplex, call.cut is not None)


def _room_like(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor to compute `target` in: `target` itself if it has the dtype."""
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep H and the arguments for `differentiate`."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.settings = inputs[8:]


def differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `streaming_forward`, from the gradient of O."""
    if grad_output is None:
        return (None,) * 11
    refuse_second_derivative("streaming")
    needs_bias = ctx.needs_input_grad[5]
    backward = torch.ops.karat_scale.streaming_backward
    saved = ctx.saved_tensors
    *grads, grad_proj, grad_bias = backward(grad_output, *saved, *ctx.settings, needs_bias)
    has_proj = saved[5] is not None
    return *grads, grad_proj if has_proj else None, grad_bias if needs_bias else None, *(None,) * 5


INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor coef, Tensor? proj, Tensor? bias, Tensor? mask, Tensor? cut, "
    "str basis, str base, bool on_simplex"
)
_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(f"streaming_forward({INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"streaming_backward(Tensor grad_output, Tensor hidden, {INPUTS}, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("streaming_forward", _streaming_forward, "CompositeExplicitAutograd")
_library.impl("streaming_backward", _streaming_backward, "CompositeExplicitAutograd")


def fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the results of `streaming_forward`."""
    query, _, value, coef, proj, *_ = arguments
    batch, heads, tokens, _ = query.shape
    hidden = coef.new_empty(0) if proj is None else coef.new_empty(heads, batch, tokens, coef.shape[2])
    return empty_output(query, value), hidden


def _fake_backward(grad_output: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, coef, proj, bias, *_, needs_bias = arguments
    # Contiguous, whatever strides the bias and W have.
    grad_bias = coef.new_empty(bias.shape, dtype=bias.dtype) if needs_bias else coef.new_empty(0)
    grad_proj = coef.new_empty(0 if proj is None else proj.shape)
    return *(torch.empty_like(x) for x in (query, key, value, coef)), grad_proj, grad_bias


torch.library.register_fake("karat_scale::streaming_forward", fake_forward, lib=_library)
torch.library.register_fake("karat_scale::streaming_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "karat_scale::streaming_forward", differentiate, setup_context=setup_context, lib=_library
)
