"""What makes the host wait for a device, counted on a machine without one."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They compute nothing.
_VIEWS = ("view", "select", "slice", "unsqueeze", "squeeze", "transpose", "aten.t.", "permute", "expand", "detach")
_VIEWS += ("alias", "unbind", "split", "as_strided", "lift_fresh", "flatten", "_local_scalar")


class Counts(TorchDispatchMode):
    """reads: values that Python asked for. copies: between the host and another device. kernels: names of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.copies = 0
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        self.reads += any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal"))
        if "copy" in name:
            tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
            self.copies += len({one.device.type for one in tensors}) > 1
        if not any(word in name for word in _VIEWS):
            self.kernels.append(name)
        return out
