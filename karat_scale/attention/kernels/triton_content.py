"""psi(A) V on NVIDIA GPUs, the part of the content form that is a function of each score.

Registered with torch.library, like the operations of `triton_fourier`, whose limits it has; Triton itself is imported
at the first call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from karat_scale.attention.call import refuse_second_derivative
from karat_scale.attention.kernels.triton_fourier import LARGEST_WIDTH, is_eager


def attend(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    """O [B, h, N, dv] = psi(A) V, A = Q K^T / sqrt(d), in the value's dtype; differentiable once.

    `triton_fourier.refusal` must have said None of a call with these tensors, and it must have no bias. Precision is as
    in `triton_fourier.attend`.

    Args:
        psi: float32 [h, 2 G + 1], c, a_1 to a_G and b_1 to b_G of psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x).
    """
    operation = _attend_eagerly if is_eager(query, psi) else torch.ops.karat_scale.triton_psi_forward
    psi = psi.contiguous()
    parts = [operation(query, key, part, psi) for part in value.split(LARGEST_WIDTH, -1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@functools.cache
def _kernels() -> Any:
    from karat_scale.attention.kernels import triton_launch

    return triton_launch


def _attend_eagerly(*arguments: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(*arguments)


class _Attention(torch.autograd.Function):
    """What `torch.ops.karat_scale.triton_psi_forward` is to autograd, without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _forward(*arguments)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("triton")
        return _backward(grad_output, *ctx.saved_tensors)


def _forward(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    output = _fake_forward(query, key, value, psi)
    if output.numel() > 0:
        _kernels().psi_forward(output, query, key, value, psi)
    return output


def _backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    if query.numel() == 0:
        return tuple(map(torch.zeros_like, (query, key, value, psi)))
    grads: tuple[Tensor, ...] = _kernels().psi_backward(grad_output, query, key, value, psi)
    return grads


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    """Room for O, stored token by token as the layers around attention hold it."""
    batch, heads, tokens, width = value.shape
    return value.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def _fake_backward(grad_output: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, given))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
    refuse_second_derivative("triton")
    grads: tuple[Tensor, ...] = torch.ops.karat_scale.triton_psi_backward(grad_output, *ctx.saved_tensors)
    return grads


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor psi"
_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(f"triton_psi_forward({_INPUTS}) -> Tensor")
_library.define(f"triton_psi_backward(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.impl("triton_psi_forward", _forward, "CompositeExplicitAutograd")
_library.impl("triton_psi_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("karat_scale::triton_psi_forward", _fake_forward, lib=_library)
torch.library.register_fake("karat_scale::triton_psi_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "karat_scale::triton_psi_forward", _differentiate, setup_context=_setup_context, lib=_library
)
