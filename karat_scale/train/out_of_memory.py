"""Running out of memory, on the CPU or a GPU, as one line that says what to change."""

import contextlib
from collections.abc import Iterator

import torch

from karat_scale.data.plan import choose_micro_batch
from karat_scale.errors import UserError
from karat_scale.recipe import Recipe

# Beside the exceptions' own classes: torch's CPU allocator, CUDA's driver, C++.
_SIGNS = ("can't allocate memory", "out of memory", "std::bad_alloc")


@contextlib.contextmanager
def explain_out_of_memory(recipe: Recipe, world_size: int) -> Iterator[None]:
    """Turn an allocation that fails within into a UserError; other exceptions pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        train = recipe.train
        micro_batch = choose_micro_batch(train.global_batch, world_size, train.micro_batch, even=recipe.augment.mixes)
        raise UserError(
            f"out of memory: {_what_failed(error)}; lower train.micro_batch (now {micro_batch}), recompute more by "
            f"train.recompute.policy (now {train.recompute.policy}), or partition more by deepspeed.config (now "
            f"{recipe.deepspeed.config})"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _what_failed(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    # torch's CPU allocator begins with its source line; CUDA's goes on with all that it has allocated.
    text = lines[0].rpartition("DefaultCPUAllocator: ")[2].partition(" GPU ")[0]
    return text.rstrip(". ")
