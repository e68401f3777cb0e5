"""The dtype in which an attention call computes, and the dtype of its result."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any tensor has it: harmonics of scores rounded to 16 bits are wrong."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def output_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the result of PyTorch's own attention: `like`'s or, under autocast, autocast's."""
    if like.dtype != torch.float64 and _autocast_is_on(like.device.type):
        return torch.get_autocast_dtype(like.device.type)
    return like.dtype


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Suspends autocast, which would round scores and harmonics to 16 bits inside matrix products."""
    if _autocast_is_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
