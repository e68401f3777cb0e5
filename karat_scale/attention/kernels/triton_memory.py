"""How tensors reach the Triton kernels: with contiguous rows, at addresses that are known, on the current device."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def rows_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype` with contiguous rows, copied only where it must be."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if _has_rows(tensor) else tensor.contiguous()


def room_for_rows(grad: Tensor) -> Tensor:
    """The gradient itself, or where its rows are not contiguous, room for one whose rows are."""
    return grad if _has_rows(grad) else torch.empty_like(grad, memory_format=torch.contiguous_format)


def _has_rows(tensor: Tensor) -> bool:
    """Whether rows are contiguous, and near enough for the kernels' offsets of 32 bits."""
    return tensor.stride(-1) == 1 and tensor.shape[-2] * tensor.stride(-2) < 2**31


def room(grad: Tensor) -> Tensor:
    """The gradient itself, or where it is not contiguous, room for one that is."""
    return grad if grad.is_contiguous() else torch.empty_like(grad, memory_format=torch.contiguous_format)


def are_aligned(*tensors: Tensor | None) -> bool:
    """Whether all addresses are multiples of 16."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses & 15 == 0


def device_of(tensor: Tensor) -> Any:
    """A context in which the tensor's device is the current one."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
