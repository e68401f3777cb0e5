"""Running out of memory, on the CPU or a GPU, as one line that says what to change."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from karat_scale.engine.distributed import World
from karat_scale.errors import UserError, one_line
from karat_scale.memory_errors import is_out_of_memory

_REMEMBERED = 100_000


@contextlib.contextmanager
def one_line_out_of_memory(fix: Callable[[], str], snapshot: Callable[[], str] = str) -> Iterator[None]:
    """Turn an allocation that fails within into a UserError that ends with `fix()`; other exceptions pass.

    snapshot: writes what is allocated, and returns where that is; an empty text for nothing.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = snapshot()
        look = f"; {where} shows what is allocated (drop it on pytorch.org/memory_viz)" if where else ""
        raise UserError(f"out of memory: {_what_failed(error)}; {fix()}{look}") from error


def record_memory(device: torch.device) -> None:
    """Record the stack of each allocation on a GPU from here on."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_REMEMBERED)


def memory_snapshot(directory: Path, world: World) -> str:
    """Write what is allocated on this rank's GPU to `directory`; returns the file, or nothing on a CPU."""
    if world.device.type != "cuda":
        return ""
    path = directory / f"memory-{world.rank}.pickle"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):  # the disk may be full, too
        return ""
    return str(path)


def _what_failed(error: BaseException) -> str:
    # torch's CPU allocator begins with its source line; CUDA's continues with all that it has allocated.
    text = one_line(error).rpartition("DefaultCPUAllocator: ")[2].partition(" GPU ")[0]
    return text.rstrip(". ")
