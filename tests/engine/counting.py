"""Counters, on a CPU, of what a training step asks of a device: operations, scalars that the host reads, and waits."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from karat_scale.engine import optimizers

# They make a view, look at a tensor's form or only allocate: no kernel runs.
_FREE = (
    *("view", "permute", "slice", "select", "unbind", "transpose", "expand", "aten.t.", "detach", "as_strided"),
    *("split", "alias", "narrow", "squeeze", "lift_fresh", "is_pinned", "set_", "empty", "_local_scalar_dense"),
)
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_fill_.Tensor")  # the last on CUDA alone


class Counting(TorchDispatchMode):
    """Counts kernels, scalar reads and copies between devices, but not what an operation does inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads = self.copies = 0
        self._counts_kernels = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.reads += any(f"aten.{read}." in f"{name}." for read in READS)
        if self._counts_kernels and name.startswith("aten.") and not any(free in name for free in _FREE):
            self.kernels[name] += 1
        out = func(*args, **(kwargs or {}))
        if "copy" in name:
            tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
            self.copies += len({one.device.type for one in tensors}) > 1
        return out

    @contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Do not count kernels inside the block, such as those of a model that is not under test."""
        self._counts_kernels = False
        yield
        self._counts_kernels = True


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Let AdamW step fused and lists of tensors go through torch's foreach operations, as on CUDA."""
    import torch.nn.utils.clip_grad as clipping

    monkeypatch.setattr(optimizers, "averages_one_by_one", lambda device: False)
    monkeypatch.setattr(optimizers, "steps_fused", lambda device: True)
    monkeypatch.setattr(clipping, "_has_foreach_support", lambda tensors, device: True)


class Stream:
    """A stand-in for a CUDA stream."""

    waits: Callable[[], None]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        """Note the stream: the device waits for it, and the host goes on."""
        self.waited_for.append(other)

    def wait_event(self, other: Any) -> None:
        """Do nothing: the device waits, and the host goes on."""

    def synchronize(self) -> None:
        """Count a wait of the host."""
        type(self).waits()


class Event:
    """A stand-in for a CUDA event that is complete."""

    def record(self, *_: Any) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return True: the event is complete."""
        return True


@contextmanager
def _inside(stream: Any) -> Iterator[None]:
    yield


@pytest.fixture
def waits(monkeypatch) -> Counter[str]:
    """Return a counter; "host" counts how often DeepSpeed would make the host wait for an asynchronous device."""
    from deepspeed.accelerator import get_accelerator

    counted: Counter[str] = Counter()

    def wait(*_: Any) -> None:
        counted["host"] += 1

    kind = type(get_accelerator())
    stream = type("CountedStream", (Stream,), {"waits": staticmethod(wait)})
    monkeypatch.setattr(kind, "is_synchronized_device", lambda self: False)
    monkeypatch.setattr(kind, "resolves_data_dependency", lambda self: False)
    monkeypatch.setattr(kind, "synchronize", wait)
    monkeypatch.setattr(kind, "Stream", stream)
    monkeypatch.setattr(kind, "Event", Event)
    monkeypatch.setattr(kind, "stream", lambda self, stream: _inside(stream))
    monkeypatch.setattr(kind, "current_stream", lambda self, index=None: stream())
    monkeypatch.setattr(kind, "default_stream", lambda self, index=None: stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    make_tensor = torch.tensor

    def copied(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """Count a wait of the host for a number that is copied to a device."""
        counted["host"] += device is not None
        return make_tensor(*args, device=device, **options)

    monkeypatch.setattr(torch, "tensor", copied)
    return counted
