"""Fourier-KArAt attention on NVIDIA GPUs: Triton kernels behind operations registered with torch.library.

The forward pass is one kernel. Beside inputs and outputs it keeps H alone; the backward pass recomputes scores and
harmonics. Nothing of N x N is ever stored. Triton itself is imported at the first call.
"""

import importlib.metadata
import importlib.util
import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from karat_scale.attention.call import FourierCall
from karat_scale.attention.kernels.triton_toolchain import launch_problem
from karat_scale.attention.precision import full_precision

# What one program holds in registers; `attend` cuts longer ranks and wider values into such pieces.
LARGEST_RANK = 32
LARGEST_WIDTH = 128
LARGEST_GRID = 16
# Triton's own switch: kernels run on the CPU, element by element, to check their values.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST_CAPABILITY = (8, 0)
# The first whose loops carry tuples.
_OLDEST_TRITON = (3, 3)


def _missing_triton() -> str | None:
    """What is wrong with the installed Triton, asked without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    for distribution in ("triton", "pytorch-triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(distribution)
            if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:
                return f"it needs triton {'.'.join(map(str, _OLDEST_TRITON))} or newer and finds {version}"
    return None


_MISSING_TRITON = _missing_triton()


def refusal(call: FourierCall) -> str | None:
    """Why `attend` cannot take the call, or None."""
    device = call.query.device
    if _MISSING_TRITON is not None:
        return _MISSING_TRITON
    if not _INTERPRETED and (device.type != "cuda" or torch.version.hip is not None):
        return f"it needs tensors on an NVIDIA GPU and these are on {device.type}"
    if not _INTERPRETED and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 (Ampere) or newer"
    return call_refusal(call) or launch_problem()


def call_refusal(call: FourierCall) -> str | None:
    """Why `attend` cannot take the call on any machine, or None."""
    query, key, value, cos_coef, sin_coef, proj, base, bias, mask = call
    if torch.float64 in (query.dtype, key.dtype, value.dtype, cos_coef.dtype, sin_coef.dtype, proj.dtype):
        return "it computes in float32 and an argument is float64"
    if base != "zero" or bias is not None or mask is not None:
        return 'it has base = "zero" alone, and neither bias nor mask'
    if query.shape[-1] > LARGEST_WIDTH:
        return f"its heads are at most {LARGEST_WIDTH} wide and query's are {query.shape[-1]}"
    if cos_coef.shape[-1] > LARGEST_GRID:
        return f"its grid is at most {LARGEST_GRID} and cos_coef's is {cos_coef.shape[-1]}"
    return None


def attend(call: FourierCall) -> Tensor:
    """O [B, h, N, dv] in the value's dtype; differentiable once. `refusal` must have said None.

    Products are those of 16-bit tensor cores where query, key and value are of one 16-bit dtype, else float32's.
    Scores, harmonics and sums are float32 in either case.
    """
    query, key, value, cos_coef, sin_coef, proj, *_ = call
    operation = torch.ops.karat_scale.triton_forward
    pieces = []
    for columns in value.split(LARGEST_WIDTH, -1):
        # O = H W^T V is a sum over ranks.
        ranks = zip(*(x.split(LARGEST_RANK, 1) for x in (cos_coef, sin_coef, proj.mT)), strict=True)
        pieces.append(sum(operation(query, key, columns, cos, sin, w.mT)[0] for cos, sin, w in ranks))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _product_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    return query.dtype if query.dtype == key.dtype == value.dtype else torch.float32


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` with contiguous rows, copied only where it must be."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cos_coef: Tensor, sin_coef: Tensor, proj: Tensor
) -> tuple[Tensor, Tensor]:
    """O [B, h, N, dv], and H [B, h, N, R] with R the rank padded to a power of two."""
    from karat_scale.attention.kernels import triton_launch

    output, hidden = _fake_forward(query, key, value, cos_coef, sin_coef, proj)
    if output.numel() == 0:
        return output, hidden
    dtype = _product_dtype(query, key, value)
    q, k, v = (_rows(x, dtype) for x in (query, key, value))
    return output, triton_launch.forward(q, k, v, cos_coef, sin_coef, proj, output)


def _backward(
    grad_output: Tensor,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the last six arguments, each in its argument's dtype."""
    from karat_scale.attention.kernels import triton_launch

    given = (query, key, value, cos_coef, sin_coef, proj)
    if query.numel() == 0:
        return tuple(torch.zeros_like(x) for x in given)  # type: ignore[return-value]
    q, k, v, grad = (_rows(x, hidden.dtype) for x in (query, key, value, grad_output))
    with full_precision(query.device):
        grad_hidden, grad_value, grad_proj = _pull_back_readout(hidden, v, proj, grad)
        grad_query, grad_key = triton_launch.grad_query_key(q, k, cos_coef, sin_coef, grad_hidden)
        grad_cos, grad_sin = triton_launch.grad_coef(q, k, cos_coef, sin_coef, grad_hidden)
    grads = (grad_query, grad_key, grad_value, grad_cos, grad_sin, grad_proj)
    return tuple(_laid_out_like(x, g) for x, g in zip(given, grads, strict=True))  # type: ignore[return-value]


def _laid_out_like(given: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the dtype and strides that the fake kernel promises."""
    promised = torch.empty_like(given)
    if (grad.dtype, grad.stride()) == (promised.dtype, promised.stride()):
        return grad
    return promised.copy_(grad)


def _pull_back_readout(hidden: Tensor, value: Tensor, proj: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of H, V and W in O = H (W^T V)."""
    rank = proj.shape[-1]
    weights = hidden.new_zeros(*proj.shape[:-1], hidden.shape[-1])
    weights[..., :rank] = proj
    grad_narrow = hidden.mT @ grad
    grad_hidden = grad @ (weights.mT @ value).mT
    grad_proj = (value @ grad_narrow.mT).sum(0, dtype=torch.float32)[..., :rank]
    return grad_hidden, weights @ grad_narrow, grad_proj


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 6
    return torch.ops.karat_scale.triton_backward(grad_output, *ctx.saved_tensors)


_library = torch.library.Library("karat_scale", "FRAGMENT")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cos_coef, Tensor sin_coef, Tensor proj"
_library.define(f"triton_forward({_INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"triton_backward(Tensor grad_output, Tensor hidden, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("triton_forward", _forward, "CompositeExplicitAutograd")
_library.impl("triton_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("karat_scale::triton_forward", lib=_library)
def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, cos_coef: Tensor, _sin: Tensor, _proj: Tensor
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = value.shape
    # Stored token by token, as the layers that merge the heads want it.
    output = value.new_empty(batch, tokens, heads, width).transpose(1, 2)
    padded_rank = 16 if cos_coef.shape[1] <= 16 else 32
    hidden = query.new_empty(batch, heads, tokens, padded_rank, dtype=_product_dtype(query, key, value))
    return output, hidden


@torch.library.register_fake("karat_scale::triton_backward", lib=_library)
def _fake_backward(_grad: Tensor, _hidden: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in given)


torch.library.register_autograd(
    "karat_scale::triton_forward", _differentiate, setup_context=_setup_context, lib=_library
)
