"""fp16 on a CPU: DeepSpeed can compute in it there, but its accelerator and our check refuse it."""

from collections.abc import Callable
from typing import Any


def allow_fp16(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let this process train in fp16 on the CPU. `patch` sets an attribute, as `monkeypatch.setattr` does."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from karat_scale.engine import engine

    accelerator = type(get_accelerator())
    patch(accelerator, "is_fp16_supported", lambda self: True)
    patch(accelerator, "supported_dtypes", lambda self: [torch.float, torch.bfloat16, torch.float16])
    patch(engine, "check_precision", lambda precision, device: None)
