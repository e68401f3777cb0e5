"""The modular Fourier operator as one compiled kernel for CPUs, at about the price of softmax attention.

Scores, harmonics and sums are float32 whatever the inputs. Where the CPU multiplies bfloat16 (AMX or AVX-512) and the
inputs are bfloat16 (N >= 32, r >= 4, no bias and no mask), features and coefficients are rounded to it as operands. A
mask acts on entries of S, which are then formed tile by tile. Besides inputs and outputs, only H and the features of
one tile per thread are stored; backward recomputes scores and features. Results do not depend on the number of threads.
Forward and backward are registered with torch.library: torch.compile takes each as one opaque operation.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from karat_scale.attention.call import FourierCall, as_4d, empty_output, refuse_second_derivative
from karat_scale.foundation import native_build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_RANK, MAX_GRID = 32, 64
SOURCE = Path(__file__).parent / "cpu" / "attention.cpp"


def refusal(call: FourierCall) -> str | None:
    """Return why this implementation cannot take the call, or None. Builds the kernel at first use."""
    query, _, value, cos_coef, _, proj, _, _, base = call
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    if any(x is not None and x.dtype not in DTYPES for x in call[:7]):
        return 'it computes in float32 and takes no float64; use implementation = "streaming"'
    if value.shape[:-1] != query.shape[:-1] or value.shape[-1] > query.shape[-1]:
        return f"value has shape {list(value.shape)}, not query's"
    if base != "zero":
        return f"base = {base!r}; it has no base activation"
    if proj.shape[-1] > MAX_RANK or cos_coef.shape[-1] > MAX_GRID:
        return f"r = {proj.shape[-1]} and G = {cos_coef.shape[-1]}; it goes up to {MAX_RANK} and {MAX_GRID}"
    return _machine_refusal()


def _kernel() -> ctypes.CDLL:
    return native_build.load(SOURCE, 'implementation "cpu" of KArAt attention')


def _machine_refusal() -> str | None:
    try:
        _kernel()
    except native_build.LoadError as error:
        return str(error)
    return None


# The same as torch.compiler.assume_constant_result, without the second that importing the compiler takes.
_machine_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(call: FourierCall, psi: Tensor | None = None) -> Tensor:
    """Return O [B, h, N, dv] of a call that `refusal` accepts; differentiable once in all but the mask.

    Its dtype is the one that query, key and value promote to.

    Args:
        psi: a function of each head, given by its constant, G cosines and G sines [h, 2 G + 1]; psi(A) V is added to O.
            Only for calls without bias and mask.
    """
    query, key, value, cos_coef, sin_coef, proj, bias, mask, _ = call
    columns, width = value.shape[-1], query.shape[-1]
    if columns < width:  # the kernel reads values as wide as queries
        value = functional.pad(value, (0, width - columns))
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (x.to(common) for x in (query, key, value))
    parameters = (x.to(torch.float32).contiguous() for x in (cos_coef, sin_coef, proj))
    psi = psi if psi is None else psi.to(torch.float32).contiguous()
    on_scores = as_4d(None if bias is None else bias.to(torch.float32)), as_4d(mask)
    output: Tensor = torch.ops.karat_scale.cpu_forward(query, key, value, *parameters, psi, *on_scores)[0]
    return output[..., :columns]


class _Strided(ctypes.Structure):
    """`Strided` of cpu/call.h: a [B, h, N, d] tensor whose last stride is 1."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Strided":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class _OnScores(ctypes.Structure):
    """`OnScores` of cpu/call.h: a tensor that broadcasts to [B, h, N, N]."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "query", "key"))]

    @classmethod
    def of(cls, tensor: Tensor) -> "_OnScores":
        strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.data_ptr(), *strides)


_SIZES = ("batch", "heads", "tokens", "width", "rank", "grid", "dtype", "threads")
_HEADS = ("query", "key", "value", "output", "grad_query", "grad_key", "grad_value")
_PARAMETERS = (
    "cosines",
    "sines",
    "projector",
    "hidden",
    "grad_cosines",
    "grad_sines",
    "grad_projector",
    "psi",
    "grad_psi",
)

_ON_SCORES = ("bias", "mask", "grad_bias")


class _Call(ctypes.Structure):
    """`Call` of cpu/call.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, _Strided) for name in _HEADS),
        *((name, ctypes.c_void_p) for name in _PARAMETERS),
        *((name, _OnScores) for name in _ON_SCORES),
    ]


def _run(function: str, inputs: Sequence[Tensor | None], **others: Tensor | None) -> None:
    given = dict(zip(_NAMES, inputs, strict=False), mask=inputs[-1])
    query, cosines = given["query"], given["cosines"]
    assert query is not None
    assert cosines is not None
    heads = {name: _unit_stride(x) for name, x in given.items() if name in _HEADS and x is not None}  # kept alive
    _, rank, _, grid = cosines.shape
    call = _Call(*query.shape, rank, grid, DTYPES[query.dtype], torch.get_num_threads())
    for name, tensor in {**given, **heads, **others}.items():
        if tensor is None:
            continue
        if name in _HEADS:
            field: Any = _Strided.of(tensor)
        else:
            field = _OnScores.of(tensor) if name in _ON_SCORES else tensor.data_ptr()
        setattr(call, name, field)
    if getattr(_kernel(), function)(ctypes.byref(call)):
        raise MemoryError("out of memory in KArAt attention")


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# Below, `inputs` are query, key, value, cosines, sines, W, and psi, bias and mask or None. All but the mask have
# gradients.
_NAMES = ("query", "key", "value", "cosines", "sines", "projector", "psi", "bias")


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    query, _, value, _, _, projector, *_ = inputs
    return empty_output(query, value), projector.new_empty(*query.shape[:3], projector.shape[2])


def _fake_backward(grad_output: Tensor, hidden: Tensor, *inputs_and_choice: Any) -> tuple[Tensor, ...]:
    query, key, value, cosines, sines, projector, psi, bias, _, needs_bias = inputs_and_choice
    batch, heads, _, _ = query.shape
    like_heads = (empty_output(x, x) for x in (query, key, value))
    grad_psi = projector.new_empty(0) if psi is None else psi.new_empty(batch, *psi.shape)
    # Threads work on different heads, so each head has its own gradient.
    has_bias = needs_bias and bias is not None
    grad_bias = bias.new_zeros(bias.shape[0], heads, *bias.shape[2:]) if has_bias else projector.new_empty(0)
    return (*like_heads, *(torch.empty_like(x) for x in (cosines, sines, projector)), grad_psi, grad_bias)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """O [B, h, N, d] and H [B, h, N, r]."""
    output, hidden = _fake_forward(*inputs)
    _run("karat_forward", inputs, output=output, hidden=hidden)
    return output, hidden


def _backward(grad_output: Tensor, hidden: Tensor, *inputs_and_choice: Any) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, cosines, sines and W, of psi for each item, and of the bias for each head."""
    *inputs, needs_bias = inputs_and_choice
    grads = _fake_backward(grad_output, hidden, *inputs_and_choice)
    written: dict[str, Tensor | None] = {f"grad_{name}": x for name, x in zip(_NAMES, grads, strict=False)}
    if not needs_bias:
        written["grad_bias"] = None
    _run("karat_backward", inputs, output=_unit_stride(grad_output), hidden=hidden, **written)
    return grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    refuse_second_derivative("cpu")
    saved = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[7]
    *grads, grad_psi, grad_bias = torch.ops.karat_scale.cpu_backward(grad_output, *saved, needs_bias)
    psi, bias = saved[7:9]
    return (
        *grads,
        None if psi is None else grad_psi.sum(0),
        grad_bias.sum_to_size(bias.shape) if needs_bias else None,
        None,
    )


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cosines, Tensor sines, Tensor projector, "
    "Tensor? psi, Tensor? bias, Tensor? mask"
)
_library = torch.library.Library("karat_scale", "FRAGMENT")
_library.define(f"cpu_forward({_INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"cpu_backward(Tensor grad_output, Tensor hidden, {_INPUTS}, bool needs_bias) -> ({', '.join(['Tensor'] * 8)})"
)
_library.impl("cpu_forward", _forward, "CPU")
_library.impl("cpu_backward", _backward, "CPU")
torch.library.register_fake("karat_scale::cpu_forward", _fake_forward, lib=_library)
torch.library.register_fake("karat_scale::cpu_backward", _fake_backward, lib=_library)
torch.library.register_autograd("karat_scale::cpu_forward", _differentiate, setup_context=_setup_context, lib=_library)
