"""One call of KArAt attention: its arguments and their checks, its dtypes, and the simplex projection of its rows.

Each error names the argument, its shape and what is expected. The projection takes each row to the nearest point of
the probability simplex {x >= 0, sum x = 1}; its derivative is here too.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from karat_scale.attention.bases import BASE_ACTIVATIONS, Basis

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FourierCall(NamedTuple):
    """The arguments of `fourier_karat_attention`, in the order of the registered operations."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos_coef: Tensor
    sin_coef: Tensor
    proj: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    base: str = "zero"


class UnitsCall(NamedTuple):
    """A call of any basis: O = S V, where S = H W^T, or H itself where there is no W.

    Attributes:
        query, key, value: [B, h, N, d], [B, h, M, d] and [B, h, P, dv].
        coef: the packed coefficients, [h, K, r, M]; without `proj`, r = P.
        proj: W [h, P, r].
        bias: added to the scores; broadcastable to [B, h, N, M].
        mask: boolean, broadcastable to [B, h, N, M]; a false pair adds nothing to H.
        cut: boolean, broadcastable to [B, h, N, P]; where false, S is 0.
        basis, base: the basis of the learnable part of phi_pq(x), and the name of b(x).
        on_simplex: projects each row of S onto the simplex.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    coef: Tensor
    proj: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    cut: Tensor | None
    basis: Basis
    base: str
    on_simplex: bool = False


def check_call(call: FourierCall) -> None:
    """Raises ValueError for shapes, dtypes, devices or a base the modular Fourier operator cannot take."""
    heads, tokens = check_tokens(call.query, call.key, call.value)
    cos_coef = call.cos_coef
    _check_float("cos_coef", cos_coef, "[h, r, N, G]")
    shape = cos_coef.shape
    if cos_coef.dim() != 4 or 0 in shape or (shape[0], shape[2]) != (heads, tokens):
        expected = f"[h, r, N, G] = [{heads}, r, {tokens}, G] with r and G of at least 1"
        raise _wrong_shape("cos_coef", cos_coef, expected)
    _check_like("sin_coef", call.sin_coef, "cos_coef", cos_coef)
    check_shape("proj", call.proj, "[h, N, r]", (heads, tokens, shape[1]))
    check_pairs(call.query, call.bias, call.mask)
    check_devices(call.query, zip(call._fields, call, strict=True))
    check_choice("base", call.base, BASE_ACTIVATIONS)


def check_tokens(query: Tensor, key: Tensor, value: Tensor | None) -> tuple[int, int]:
    """Return h and N of query, key and value; raise ValueError if their shapes or dtypes do not fit."""
    _check_float("query", query, "[B, h, N, d]")
    if query.dim() != 4 or 0 in query.shape[1:]:
        raise _wrong_shape("query", query, "[B, h, N, d] with h, N and d of at least 1")
    _check_like("key", key, "query", query)
    if value is not None:
        _check_like("value", value, "query", query)
    return query.shape[1], query.shape[2]


def check_shape(name: str, tensor: Any, layout: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` is a floating tensor of `shape`, which `layout` names."""
    _check_float(name, tensor, layout)
    if tensor.shape != shape:
        raise _wrong_shape(name, tensor, f"{layout} = {list(shape)}")


def check_pairs(query: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raises ValueError unless a bias and a mask fit scores of `query`."""
    if bias is not None:
        _check_float("bias", bias, "broadcastable to [B, h, N, N]; a boolean tensor belongs in mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise _wrong_shape("mask", mask, "torch.bool, true where a pair takes part; scores are added by bias")
    for name, pairs in (("bias", bias), ("mask", mask)):
        if pairs is None:
            continue
        target = (*query.shape[:3], query.shape[2])
        shape = (1,) * (4 - pairs.dim()) + tuple(pairs.shape)
        if pairs.dim() > 4 or any(size not in (1, whole) for size, whole in zip(shape, target, strict=True)):
            raise _wrong_shape(name, pairs, f"broadcastable to [B, h, N, N] = {list(target)}")


def check_devices(query: Tensor, arguments: Iterable[tuple[str, object]]) -> None:
    """Raise ValueError unless the tensors among the arguments, by name, are on query's device."""
    for name, tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}: expected query's device, {query.device}")


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument} = {value!r}: expected one of {', '.join(choices)}")


def _check_float(name: str, tensor: Any, layout: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise _wrong_shape(name, tensor, f"float16, bfloat16, float32 or float64, {layout}")


def _check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    _check_float(name, tensor, f"of {model_name}'s shape")
    if tensor.shape != model.shape:
        raise _wrong_shape(name, tensor, f"{model_name}'s shape, {list(model.shape)}")


def _wrong_shape(name: str, tensor: object, expected: str) -> ValueError:
    if not isinstance(tensor, Tensor):
        return ValueError(f"{name} is a {type(tensor).__name__}: expected a tensor, {expected}")
    return ValueError(f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype}: expected {expected}")


def refuse_second_derivative(implementation: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated: torch would take its result as constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"KArAt attention by {implementation!r} is differentiable once: call backward without create_graph, or use "
            "implementation='reference'"
        )


def as_4d(tensor: Tensor | None) -> Tensor | None:
    """Return a bias or a mask with the four dimensions that it broadcasts to."""
    return None if tensor is None else tensor[(None,) * (4 - tensor.dim())]


def empty_gradients(_: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Room for the gradients of those inputs that are tensors; the first argument is the output's gradient."""
    return tuple(torch.empty_like(x) for x in inputs if isinstance(x, Tensor))


def register_function(
    library: torch.library.Library,
    name: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    settings: str,
) -> None:
    """Register O = f(A) V of query, key, value and the settings of f, and the gradients. It is differentiable once.

    Args:
        settings: the types and names of f's settings, in torch.library's notation.
    """
    inputs = f"Tensor query, Tensor key, Tensor value, {settings}"
    gradients = ", ".join(["Tensor"] * inputs.count("Tensor "))
    library.define(f"{name}_forward({inputs}) -> Tensor")
    library.define(f"{name}_backward(Tensor grad_output, {inputs}) -> ({gradients})")
    library.impl(f"{name}_forward", forward, "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [x for x in inputs if not isinstance(x, Tensor)]

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(name.partition("_")[0])
        operation = getattr(torch.ops.karat_scale, f"{name}_backward")
        return *operation(grad_output, *ctx.saved_tensors, *ctx.others), *(None for _ in ctx.others)

    own = f"karat_scale::{name}_"
    torch.library.register_fake(f"{own}forward", lambda query, _, value, *__: empty_output(query, value), lib=library)
    torch.library.register_fake(f"{own}backward", empty_gradients, lib=library)
    torch.library.register_autograd(f"{own}forward", differentiate, setup_context=setup_context, lib=library)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Room for O [B, h, N, dv] stored token by token, as the layers that merge the heads want it."""
    batch, heads, tokens, _ = query.shape
    return value.new_empty((batch, tokens, heads, value.shape[3])).transpose(1, 2)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any tensor has it: harmonics of scores rounded to 16 bits are wrong."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def output_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the result of PyTorch's own attention: `like`'s or, under autocast, autocast's."""
    if like.dtype != torch.float64 and autocast_is_on(like.device.type):
        return torch.get_autocast_dtype(like.device.type)
    return like.dtype


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Suspends autocast, which would round scores and harmonics to 16 bits inside matrix products."""
    if autocast_is_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_is_on(device_type: str) -> bool:
    """Return whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def project(rows: Tensor, keep: Tensor | None = None) -> Tensor:
    """max(y - lambda, 0) along the last dimension, with the lambda that makes it sum to one (paper, l1 projection).

    Entries whose `keep` is false are 0 and take no part; a row that keeps nothing is 0. A kept
    NaN or +infinity makes its row NaN.
    """
    lost = rows.detach().isnan() | (rows.detach() == torch.inf)
    lost = lost if keep is None else lost & keep
    if keep is not None:
        rows = rows.masked_fill(~keep, -torch.inf)
    descending = rows.detach().sort(-1, descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device)
    in_support = descending * counts > descending.cumsum(-1) - 1
    size = in_support.sum(-1, keepdim=True).clamp_(min=1)
    # lambda is computed from the rows themselves, so that autograd sees it.
    smallest = descending.gather(-1, size - 1)
    support = (rows >= smallest) & rows.isfinite()
    threshold = (torch.where(support, rows, 0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True).clamp_(min=1)
    projected = torch.where(support, rows - threshold, 0)
    return projected.masked_fill(lost.any(-1, keepdim=True), torch.nan)


def pull_back(projected: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the rows: `grad` minus its mean on the support, and 0 elsewhere."""
    support = projected > 0
    kept = torch.where(support, grad, 0)
    mean = kept.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp_(min=1)
    return torch.where(support, grad - mean, 0)
