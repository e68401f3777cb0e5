"""What a call of Fourier-KArAt attention must look like; each complaint names argument, shape and expectation."""

from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos_coef: Tensor,
    sin_coef: Tensor,
    proj: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raises ValueError for shapes, dtypes or devices the operator cannot take."""
    _check_float("query", query, "[B, h, N, d]")
    if query.dim() != 4 or 0 in query.shape[1:]:
        raise _wrong_shape("query", query, "[B, h, N, d] with h, N and d of at least 1")
    _, heads, tokens, _ = query.shape
    _check_like("key", key, "query", query)
    if value is not None:
        _check_like("value", value, "query", query)

    _check_float("cos_coef", cos_coef, "[h, r, N, G]")
    shape = cos_coef.shape
    if cos_coef.dim() != 4 or 0 in shape or (shape[0], shape[2]) != (heads, tokens):
        expected = f"[h, r, N, G] = [{heads}, r, {tokens}, G] with r and G of at least 1"
        raise _wrong_shape("cos_coef", cos_coef, expected)
    _check_like("sin_coef", sin_coef, "cos_coef", cos_coef)
    _check_float("proj", proj, "[h, N, r]")
    if proj.shape != (heads, tokens, shape[1]):
        raise _wrong_shape("proj", proj, f"[h, N, r] = [{heads}, {tokens}, {shape[1]}]")

    scores = (query.shape[0], heads, tokens, tokens)
    if bias is not None:
        _check_float("bias", bias, "broadcastable to [B, h, N, N]; a boolean tensor belongs in mask")
        _check_broadcasts("bias", bias, scores)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise _wrong_shape("mask", mask, "torch.bool, true where a pair takes part; scores are added by bias")
        _check_broadcasts("mask", mask, scores)

    named = {"key": key, "value": value, "cos_coef": cos_coef, "sin_coef": sin_coef, "proj": proj}
    for name, tensor in {**named, "bias": bias, "mask": mask}.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}: expected query's device, {query.device}")


def check_choice(argument: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument} = {value!r}: expected one of {', '.join(choices)}")


def _check_float(name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise _wrong_shape(name, tensor, f"float16, bfloat16, float32 or float64, {layout}")


def _check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    _check_float(name, tensor, f"of {model_name}'s shape")
    if tensor.shape != model.shape:
        raise _wrong_shape(name, tensor, f"{model_name}'s shape, {list(model.shape)}")


def _check_broadcasts(name: str, tensor: Tensor, target: tuple[int, ...]) -> None:
    shape = (1,) * (len(target) - tensor.dim()) + tuple(tensor.shape)
    if tensor.dim() > 4 or any(size not in (1, whole) for size, whole in zip(shape, target, strict=True)):
        raise _wrong_shape(name, tensor, f"broadcastable to [B, h, N, N] = {list(target)}")


def _wrong_shape(name: str, tensor: object, expected: str) -> ValueError:
    if not isinstance(tensor, Tensor):
        return ValueError(f"{name} is a {type(tensor).__name__}: expected a tensor, {expected}")
    return ValueError(f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype}: expected {expected}")
