"""The memory of training: keeping freed memory, recomputing as the recipe says, and one line if memory runs out.

That line says what to change, on the CPU or a GPU.

For training on a CPU the C library keeps the memory of freed tensors. By default glibc gives large blocks back to the
kernel. Each step then gets them again, page by page and filled with zeros. docs/benchmarks.md has what that costs.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from karat_scale.engine.deepspeed_internals import deepspeed_checkpoint
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import UserError, is_out_of_memory, one_line
from karat_scale.models.layers import blocks_of
from karat_scale.models.recompute import choices_by_rule, recompute, torch_checkpoint
from karat_scale.recipe import RunRecipe


@contextlib.contextmanager
def one_line_out_of_memory(fix: Callable[[], str], snapshot: Callable[[], str] = str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into a UserError that ends with `fix()`; other exceptions pass.

    `snapshot` writes what is allocated, and returns the file's path, or an empty text if there is no file.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # torch's CPU allocator begins with its source line; CUDA's continues with all that it has allocated.
        failed = one_line(error).rpartition("DefaultCPUAllocator: ")[2].partition(" GPU ")[0].rstrip(". ")
        where = snapshot()
        look = f"; {where} shows what is allocated (drop it on pytorch.org/memory_viz)" if where else ""
        raise UserError(f"out of memory: {failed}; {fix()}{look}") from error


def record_memory(device: torch.device) -> None:
    """Record the stack of each allocation on a GPU from here on."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=100_000)


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


# Names of malloc.h: the free memory at the heap's end that is given back, what it grows by, and the size from which
# a block is mapped by itself and given back when it is freed. Older versions allow at most 32 MB for that.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ((_TRIM_THRESHOLD, (2**31 - 1,)), (_TOP_PAD, (2**26,)), (_MMAP_THRESHOLD, (2**30, 2**25)))


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step; return whether the C library does so.

    It changes nothing where the environment has settings of malloc, and on systems without glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(any(mallopt(name, value) for value in values) for name, values in _SETTINGS)
    return False


def apply_recompute(model: nn.Module, recipe: RunRecipe) -> str:
    """Let `model` recompute what the recipe's `train.recompute` says; returns what that is, in words, or "".

    Raises RecipeError if the policy does not suit the model.
    """
    config = recipe.train.recompute
    if config.policy == "none":
        return ""
    choices = choices_by_rule(config, len(blocks_of(model)))
    recompute(model, choices, torch_checkpoint if config.method == "torch" else deepspeed_checkpoint())
    blocks, attentions = choices.count("block"), choices.count("attention")
    return f"recomputes {blocks} of {len(choices)} blocks, and the attention of {attentions} more"
