"""Triton's interpreter with the bfloat16 arithmetic of the hardware.

Triton keeps bfloat16 as raw uint16: its products multiply the raw bits, and its casts truncate where hardware rounds.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install_bfloat16() -> None:
    """Correct the products and casts of bfloat16 in this process."""
    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def mended_dot(self, a, b, *rest):
        return create_dot(self, _widened(a), _widened(b), *rest)

    def mended_cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = mended_dot, mended_cast


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
