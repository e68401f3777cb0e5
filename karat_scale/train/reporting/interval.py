"""What is measured between two reports of a run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from karat_scale.data.digest import BITS


class Interval:
    """Sums and a stopwatch. The stopwatch starts after this process's first step, which pays for warm-up."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.steps = 0
        self.grad_norm: float | None = None
        self._bad = 0
        self._digest = 0
        self._timed_steps = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._warm = False

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a step's (share of a) loss without waiting for the device."""
        self.loss += loss.detach()

    def add_bad(self, count: int) -> None:
        """Count samples that could not be read."""
        self._bad += count

    def add_digest(self, digest: int) -> None:
        """Add a batch's `batch_digest`."""
        self._digest = (self._digest + digest) % 2**BITS

    def take_digest(self) -> int:
        """The sum of the batches' digests since it was last taken."""
        taken, self._digest = self._digest, 0
        return taken

    def finish_step(self, grad_norm: float | None) -> None:
        """Count a step."""
        self.steps += 1
        self.grad_norm = grad_norm
        if self._warm:
            self._timed_steps += 1
        else:
            self._warm = True
            self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training. Pauses nest."""
        running = self._since is not None
        self._stop()
        try:
            yield
        finally:
            if running:
                self._since = time.monotonic()

    def take_counts(self) -> tuple[int, int, float]:
        """(unreadable samples, timed steps, their seconds) since they were last taken."""
        with self.paused():
            taken = self._bad, self._timed_steps, self._seconds
            self._bad, self._timed_steps, self._seconds = 0, 0, 0.0
        return taken

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
            self._since = None

    def take_loss(self) -> tuple[torch.Tensor, int]:
        """(summed loss, steps) since they were last taken."""
        taken = self.loss.clone(), self.steps
        self.loss.zero_()
        self.steps = 0
        return taken


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU if it trains there, else resident in RAM; in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def resident_memory_mb() -> float:
    """What this process and its data workers hold in RAM now, in MB. Pages that they share count for each."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # it may end while we ask
            total += child.memory_info().rss
    return total / 1e6
