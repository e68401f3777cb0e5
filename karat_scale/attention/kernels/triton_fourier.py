"""Fourier-KArAt attention on NVIDIA GPUs: Triton kernels behind operations registered with torch.library.

A forward pass runs two kernels, a backward pass four or five. Besides inputs and outputs, the forward pass keeps H,
U = W^T V and the coefficients as the tensor cores read them; the backward pass recomputes scores and harmonics. Nothing
of size N x N is stored except the gradient of a bias and, in place of U, the bits of a mask. Triton itself is imported
at the first call.

The part of the content form that is a function of each score, psi(A) V, has separate operations and kernels.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from karat_scale.attention.call import FourierCall, empty_output, refuse_second_derivative, register_function
from karat_scale.attention.kernels.triton_tiles import MASK_WORD, block, padded_tokens, products_of
from karat_scale.attention.kernels.triton_toolchain import launch_problem

# The most that one program holds in registers; `attend` splits longer ranks and wider values.
LARGEST_RANK = 32
LARGEST_WIDTH = 128
LARGEST_GRID = 16
# Triton's own switch: kernels run on the CPU, element by element, to check their values.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST_CAPABILITY = (8, 0)
# The first version whose loops carry tuples.
_OLDEST_TRITON = (3, 3)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _missing_triton() -> str | None:
    """Return what is wrong with the installed Triton, or None, without importing it."""
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
    """Return why `attend` cannot take the call, or None."""
    device = call.query.device
    if _MISSING_TRITON is not None:
        return _MISSING_TRITON
    if not _INTERPRETED and (device.type != "cuda" or torch.version.hip is not None):
        return f"it needs tensors on an NVIDIA GPU and these are on {device.type}"
    if not _INTERPRETED and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 (Ampere) or newer"
    return call_refusal(call) or launch_problem()


def call_refusal(call: FourierCall) -> str | None:
    """Return why `attend` cannot take the call on any machine, or None."""
    query, cos_coef = call.query, call.cos_coef
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in call):
        return "it computes in float32 and an argument is float64"
    if query.shape[-1] > LARGEST_WIDTH:
        return f"its heads are at most {LARGEST_WIDTH} wide and query's are {query.shape[-1]}"
    if cos_coef.shape[-1] > LARGEST_GRID:
        return f"its grid is at most {LARGEST_GRID} and cos_coef's is {cos_coef.shape[-1]}"
    return None


def attend(call: FourierCall) -> Tensor:
    """O [B, h, N, dv] in the value's dtype; differentiable once. `refusal` must have returned None.

    Products run on 16-bit tensor cores if query, key and value share a 16-bit dtype. Otherwise they are float32, in
    three passes of TF32, or in one if `torch.backends.cuda.matmul.allow_tf32` is set. Scores and sums are always
    float32.
    """
    operation = _attend_eagerly if is_eager(call.query, call.cos_coef) else _attend_by_operation
    if call.value.shape[-1] <= LARGEST_WIDTH and call.proj.shape[-1] <= LARGEST_RANK:
        return operation(*call)
    columns = []
    for value in call.value.split(LARGEST_WIDTH, -1):
        # S = H W^T is a sum over ranks.
        parts = zip(*(x.split(LARGEST_RANK, 1) for x in (call.cos_coef, call.sin_coef, call.proj.mT)), strict=True)
        ranks = (call._replace(value=value, cos_coef=cos, sin_coef=sin, proj=w.mT) for cos, sin, w in parts)
        summands = [operation(*part) for part in ranks]
        columns.append(functools.reduce(torch.add, summands))
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def is_eager(query: Tensor, parameter: Tensor) -> bool:
    """Return whether nothing traces operations: no compiler, tracer, fake tensor, mode or transform of PyTorch.

    Then the kernels can be launched without PyTorch's dispatcher, which takes longer than they do.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(query) is Tensor
        and type(parameter) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _attend_by_operation(*arguments: Any) -> Tensor:
    output: Tensor = torch.ops.karat_scale.triton_forward(*arguments)[0]
    return output


def _attend_eagerly(*arguments: Any) -> Tensor:
    apply: Callable[..., Tensor] = _Attention.apply
    return apply(*arguments)


class _Attention(torch.autograd.Function):
    """The autograd function of `torch.ops.karat_scale.triton_forward`, without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        outputs = _forward(*arguments)
        _setup_context(ctx, arguments, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate_by(_pull_back, ctx, grad_output)


@functools.cache
def _kernels() -> Any:
    from karat_scale.attention.kernels import triton_launch

    return triton_launch


def _forward(*arguments: Any) -> Outputs:
    """O [B, h, N, dv], and what the backward pass needs; see `_fake_forward`. The arguments are a `FourierCall`."""
    outputs = _fake_forward(*arguments)
    if outputs[0].numel() > 0:
        _kernels().forward(outputs, FourierCall(*arguments))
    return outputs


def _fake_forward(*arguments: Any) -> Outputs:
    """Return empty tensors for O, H, U or a mask's bits, the packed coefficients and their scale.

    O [B, h, N, dv] is stored token by token, as the layers around attention hold it. H is [B, h, N, R] with R the
    padded rank, U [B, h, R, dv], the bits [B or 1, h or 1, 2, N / 32, N] in int32, the coefficients
    [h, 2G, padded N, R], the scale [h].
    """
    query, key, value, cos_coef, *_, mask, _ = arguments
    batch, heads, tokens, width = value.shape
    _, rank, _, grid = cos_coef.shape
    products = products_of(query.dtype, key.dtype, value.dtype)
    padded_rank = block(rank)
    packed = torch.float16 if products.fast else torch.float32
    if mask is None:
        reader = query.new_empty((batch, heads, padded_rank, width), dtype=products.dtype)
    else:
        matrices = (1, 1, *mask.shape[:-2])[-2:]
        reader = query.new_empty((*matrices, 2, -(-tokens // MASK_WORD), tokens), dtype=torch.int32)
    return (
        empty_output(query, value),
        query.new_empty((batch, heads, tokens, padded_rank), dtype=products.dtype),
        reader,
        query.new_empty((heads, 2 * grid, padded_tokens(tokens), padded_rank), dtype=packed),
        query.new_empty(heads, dtype=torch.float32),
    )


def _pull_back(grad_output: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the seven tensors from query to bias, in the dtype and strides of `torch.empty_like`.

    The arguments are what the forward pass kept, its call, and whether the bias is learned.
    """
    *kept, bias_is_learned = arguments
    call = FourierCall(*kept[4:])
    if call.query.numel() == 0:
        by_bias = None if call.bias is None or not bias_is_learned else torch.zeros_like(call.bias)
        return *map(torch.zeros_like, call[:6]), by_bias
    gradients: tuple[Tensor | None, ...] = _kernels().backward(grad_output, kept[:4], call, bias_is_learned)
    return gradients


def _backward(*arguments: Any) -> tuple[Any, ...]:
    """`_pull_back` as an operation; its results must be tensors, so a bias that is not learned has an empty one."""
    *grads, by_bias = _pull_back(*arguments)
    return *grads, arguments[0].new_empty(0) if by_bias is None else by_bias


def _fake_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, bias, _, _, bias_is_learned = arguments[4:]
    by_bias = torch.empty_like(bias) if bias_is_learned else grad_output.new_empty(0)
    return *map(torch.empty_like, given), by_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:8])
    ctx.base = inputs[8]


def _differentiate_by(
    backward: Callable[..., tuple[Tensor | None, ...]], ctx: Any, grad_output: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    refuse_second_derivative("triton")
    bias_is_learned = ctx.needs_input_grad[6]
    *grads, by_bias = backward(grad_output, *ctx.saved_tensors, ctx.base, bias_is_learned)
    return *grads, by_bias if bias_is_learned else None, None, None


def _differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _differentiate_by(torch.ops.karat_scale.triton_backward, ctx, grad_output)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cos_coef, Tensor sin_coef, Tensor proj, Tensor? bias, "
    "Tensor? mask, str base"
)
_KEPT = "Tensor hidden, Tensor reader, Tensor coef, Tensor coef_scale"
_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(f"triton_forward({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    f"triton_backward(Tensor grad_output, {_KEPT}, {_INPUTS}, bool bias_is_learned)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("triton_forward", _forward, "CompositeExplicitAutograd")
_library.impl("triton_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("karat_scale::triton_forward", _fake_forward, lib=_library)
torch.library.register_fake("karat_scale::triton_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "karat_scale::triton_forward", _differentiate, setup_context=_setup_context, lib=_library
)


def attend_psi(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    """O [B, h, N, dv] = psi(A) V, A = Q K^T / sqrt(d), in the value's dtype; differentiable once.

    `refusal` must have returned None for a call with these tensors, and the call must have no bias. Precision is as in
    `attend`.

    Args:
        psi: float32 [h, 2 G + 1], c, a_1 to a_G and b_1 to b_G of psi(x) = c + sum_m a_m cos(m x) + b_m sin(m x).
    """
    operation = _attend_psi_eagerly if is_eager(query, psi) else torch.ops.karat_scale.triton_psi_forward
    psi = psi.contiguous()
    parts = [operation(query, key, part, psi) for part in value.split(LARGEST_WIDTH, -1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _attend_psi_eagerly(*arguments: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _PsiAttention.apply
    return apply(*arguments)


class _PsiAttention(torch.autograd.Function):
    """The autograd function of `torch.ops.karat_scale.triton_psi_forward`, without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        return _psi_forward(*arguments)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("triton")
        return _psi_backward(grad_output, *ctx.saved_tensors)


def _psi_forward(query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    output = empty_output(query, value)
    if output.numel() > 0:
        _kernels().psi_forward(output, query, key, value, psi)
    return output


def _psi_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> tuple[Tensor, ...]:
    if query.numel() == 0:
        return tuple(map(torch.zeros_like, (query, key, value, psi)))
    grads: tuple[Tensor, ...] = _kernels().psi_backward(grad_output, query, key, value, psi)
    return grads


register_function(_library, "triton_psi", _psi_forward, _psi_backward, "Tensor psi")
