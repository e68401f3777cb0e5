"""What a section is given: the device, its time, and whom to tell."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from karat_scale.bench.gpu.budget import Budget
from karat_scale.bench.gpu.channel import Channel
from karat_scale.memory_errors import is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """On a CPU sizes are toys, and another implementation takes the place of the GPU's."""

    device: str
    budget: Budget
    tell: Channel
    largest_batch: int | None = None

    @property
    def toy(self) -> bool:
        """Whether this is to try the command, not to measure."""
        return self.device == "cpu"

    @property
    def implementation(self) -> str:
        """Of the operator."""
        return "streaming" if self.toy else "triton"

    def halving(self, what: str, batch: int, attempt: Callable[[int], T], least: int = 1) -> T:
        """`attempt(batch)`, again with half of it where memory runs out.

        Raises:
            RuntimeError, MemoryError: another failure, or `least` is still too much.
        """
        while True:
            try:
                return attempt(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or batch // 2 < least:
                    raise
            self.free()  # after the exception is gone, which held what it had built
            batch //= 2
            self.tell.notice(f"{what}: out of memory with a batch of {2 * batch}, so it is {batch}")

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if not self.toy:
            torch.cuda.synchronize()
