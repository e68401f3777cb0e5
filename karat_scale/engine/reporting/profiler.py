"""A trace of chosen steps by torch's profiler, for Perfetto, chrome://tracing or TensorBoard.

profile/
  rank-00000-steps-3-5.pt.trace.json   what ran when, on the CPU and the GPU
  rank-00000-steps-3-5.txt             operations by the time they took themselves, the longest first
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.foundation.files import commit_file, replace_file, temporary_folder

TABLE_ROWS = 40


class StepProfiler:
    """Traces steps `steps[0]` to `steps[1]`, both included, on each rank; the results are the same with and without.

    A run that stops in between leaves no trace.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, world: World, reporter: Reporter) -> None:
        self._first, self._last = steps or (0, -1)
        self._directory, self._world, self._reporter = directory, world, reporter
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Step `number`, counted from 1, is done inside."""
        inside = self._first <= number <= self._last
        if inside and self._profile is None:
            self._first = number  # a resumed run may begin in the middle
            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        if inside and number == self._last:
            self._profile.stop()
            self._write()
            self._profile = None

    def _write(self) -> None:
        name = f"rank-{self._world.rank:05d}-steps-{self._first}-{self._last}"
        trace = self._directory / f"{name}.pt.trace.json"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with temporary_folder(trace) as scratch:
                # The exporter wants a name that ends in .json.
                unfinished = scratch / trace.name
                self._profile.export_chrome_trace(str(unfinished))
                commit_file(unfinished, trace)
            replace_file(self._directory / f"{name}.txt", self._table() + "\n")
        except OSError as error:  # training is worth more than its profile
            self._reporter.warn(f"profile of steps {self._first} to {self._last} not written: {error}")
            return
        self._reporter.info(f"profiled steps {self._first} to {self._last}: {trace}")

    def _table(self) -> str:
        on = "cuda" if self._world.device.type == "cuda" else "cpu"
        table: str = self._profile.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=TABLE_ROWS)
        return table
