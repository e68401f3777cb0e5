"""What a section is given: the device, its time, and whom to tell."""

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from karat_scale.bench.gpu.budget import Budget
from karat_scale.bench.gpu.channel import Channel, one_line
from karat_scale.memory_errors import is_out_of_memory


def is_fatal(error: BaseException) -> bool:
    """Whether nothing runs on the device any more in this process: a kernel has crashed."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)


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

    def halving(self, what: str, batch: int, attempt: Callable[[int], None], least: int = 1) -> None:
        """Call `attempt(batch)`, with half of it when memory runs out. Report a failure and let the section continue.

        Raises:
            Exception: one that `is_fatal`.
        """
        while True:
            try:
                attempt(batch)
                return
            except Exception as error:
                if is_fatal(error):
                    raise
                if not is_out_of_memory(error) or batch // 2 < least:
                    traceback.print_exc()
                    self.tell.failed(what, one_line(error))
                    return
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
