"""Measurements of a run while it trains: figures between two reports, histograms of heads, and traces of steps.

A rank's own time is the part of a step in which it waits for no other: for its data, and in its forward pass.
Efficiency is how much of a device's arithmetic training uses: FLOP/s of the model's equations, and MFU where the peak
is known. Histograms, for the trackers, are of each head's coefficients and its projector W.

Traces are by torch's profiler, for Perfetto, chrome://tracing or TensorBoard:

profile/
  rank-00000-steps-3-5.pt.trace.json   what ran when, on the CPU and the GPU
  rank-00000-steps-3-5.txt             operations by the time they took themselves, the longest first
"""

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from karat_scale.engine.deepspeed_internals import whole_parameters
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine, matrix_peak
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.foundation.files import commit_file, replace_file, temporary_folder
from karat_scale.foundation.machine import find_gpu
from karat_scale.models.flops import flops_per_image
from karat_scale.models.operators import head_parameters
from karat_scale.recipe import LogConfig, Recipe, TrainConfig

COUNTED = "counted"
"""The name beside the sums of losses of the number of steps, in parts, whose loss was finite."""


class Interval:
    """Sums and a stopwatch. The device's results are added up on the device, and read when they are taken.

    The stopwatch starts after this process's first step, which pays for warm-up. Starting and stopping it waits for the
    device, so that the time of a step does not count for what follows it.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._clock = device, clock
        self._losses: dict[str, torch.Tensor] = {}
        self._step_losses: list[torch.Tensor] = []
        self._loss_so_far: torch.Tensor | None = None
        self._norms: list[torch.Tensor] = []
        self._steps = self._timed_steps = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._warm = False

    def add_losses(self, losses: Mapping[str, torch.Tensor], parts: int) -> None:
        """Add one of a step's `parts` micro batches: its losses, 0-dim, by name, without waiting for the device.

        If its "loss" is not finite, the step will be skipped, and it does not count.
        """
        counts = losses["loss"].detach().isfinite()
        for name, loss in {COUNTED: counts, **losses}.items():
            share = torch.where(counts, loss.detach() / parts, 0.0).float()
            self._losses[name] = self._losses[name] + share if name in self._losses else share

    def add_to_step(self, share: torch.Tensor) -> None:
        """Add a micro batch's share of a step's loss, 0-dim, to be read step by step."""
        share = share.detach().float()
        self._loss_so_far = share if self._loss_so_far is None else self._loss_so_far + share

    def take_step_losses(self) -> torch.Tensor:
        """Return the loss of each step since the last call, [steps], on the device."""
        taken, self._step_losses = self._step_losses, []
        return torch.stack(taken) if taken else torch.empty(0, device=self._device)

    def add_norm(self, norm: torch.Tensor) -> None:
        """Keep a step's gradient norm, 0-dim, without waiting for the device."""
        self._norms.append(norm.detach().to(torch.float32, copy=True))  # its memory may hold the next one soon

    def take_norms(self) -> list[float]:
        """Return the norms since the last call, in the order of the steps; one read for all."""
        taken, self._norms = self._norms, []
        return torch.stack(taken).tolist() if taken else []

    def finish_step(self) -> None:
        """Count a step."""
        self._steps += 1
        if self._loss_so_far is not None:
            self._step_losses.append(self._loss_so_far)
            self._loss_so_far = None
        if self._warm:
            self._timed_steps += 1
        else:
            self._warm = True
            self._since = self._now()

    def stand(self) -> tuple[float, dict[str, torch.Tensor], torch.Tensor | None]:
        """Return the state that a step changes before it is finished, for `go_back`."""
        with self.paused():
            return self._seconds, dict(self._losses), self._loss_so_far

    def go_back(self, stand: tuple[float, dict[str, torch.Tensor], torch.Tensor | None]) -> None:
        """Forget what has been added since `stand`."""
        self._seconds, self._losses, self._loss_so_far = stand
        if self._since is not None:
            self._since = self._now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the block as training. Pauses nest."""
        running = self._since is not None
        if self._since is not None:
            self._seconds += self._now() - self._since
            self._since = None
        try:
            yield
        finally:
            if running:
                self._since = self._now()

    def take_time(self) -> tuple[int, float]:
        """Return (timed steps, their seconds) since the last call."""
        with self.paused():
            taken = self._timed_steps, self._seconds
            self._timed_steps, self._seconds = 0, 0.0
        return taken

    def losses_of_ranks(self, world: World) -> tuple[int, dict[str, list[int]]]:
        """Return the steps since the last `take_losses`, and each rank's sums, as the bits of float32. Collective."""
        ranks = world.gather({name: int(loss.view(torch.int32)) for name, loss in self._losses.items()})
        return self._steps, {name: [rank[name] for rank in ranks] for name in self._losses}

    def resume_losses(self, steps: int, losses: Mapping[str, Sequence[int]], world: World) -> None:
        """Resume from the result of `losses_of_ranks`; another world size begins with the mean of the sums."""
        self._steps = steps
        if losses and COUNTED not in losses:  # of an earlier version
            self._losses[COUNTED] = torch.tensor(float(steps), device=self._device)
        for name, bits in losses.items():
            sums = torch.tensor(bits, dtype=torch.int32, device=self._device).view(torch.float32)
            self._losses[name] = sums[world.rank] if len(sums) == world.size else sums.mean()

    def take_losses(self) -> tuple[dict[str, torch.Tensor], int]:
        """Return (summed losses by name, with the steps that they are of as COUNTED; all steps) since the last call."""
        taken = self._losses, self._steps
        self._losses, self._steps = {}, 0
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU if it trains there, else resident in RAM; in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def resident_memory_mb() -> float:
    """Return the RAM of this process, its data workers and trackers now, in MB. Shared pages count for each."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # it may end while we ask
            total += child.memory_info().rss
    return total / 1e6


# The number of forward passes on a GPU that may wait to be added up; beyond it, the finished ones are added.
MOST_WAITING = 64

_Pass = tuple[torch.cuda.Event, torch.cuda.Event]


class OwnTime:
    """Adds up this rank's own seconds. At ZeRO stage 3 the forward pass also waits for other ranks' weights.

    A GPU's forward pass is timed by the device, whose clock is read when the sum is taken: nothing waits for it before.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._seconds = 0.0
        self._waiting: list[_Pass] = []

    @contextmanager
    def data(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        begun = self._clock()
        yield
        self._seconds += self._clock() - begun

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the time inside the block as a forward pass."""
        if not self._on_gpu:
            with self.data():  # by the host's clock, too
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._waiting.append((begin, end))
        if len(self._waiting) > MOST_WAITING:
            self._add_up([one for one in self._waiting if one[1].query()])

    def take(self) -> float:
        """Return the seconds since the last call."""
        for _, end in self._waiting:
            end.synchronize()
        self._add_up(self._waiting)
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _add_up(self, done: list[_Pass]) -> None:
        self._seconds += sum(begin.elapsed_time(end) for begin, end in done) / 1e3
        self._waiting = self._waiting[len(done) :]  # the device does them in order


def device_peak(device: torch.device, train: TrainConfig) -> float | None:
    """The most FLOP/s that a device has in a recipe's precision; None for a CPU and for a GPU not in the table."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return matrix_peak(train, gpu.peaks) if gpu is not None else None


class Efficiency:
    """Converts images per second to FLOP/s per device and MFU (defined in arXiv 2204.02311, appendix B).

    Args:
        devices: the number of devices that share the images.
        peak: peak FLOP/s of one device; None if unknown.
    """

    def __init__(self, recipe: Recipe, devices: int, peak: float | None) -> None:
        self._recipe, self._devices, self._peak = recipe, devices, peak

    def figures(self, images_per_second: float | None) -> dict[str, float | None]:
        """Return `tflops`, 1e12 FLOP/s per device, and `mfu`, a fraction of the peak, if that is known."""
        achieved = self._flops * images_per_second / self._devices if images_per_second else None
        figures = {"tflops": achieved / 1e12 if achieved else None}
        if self._peak:
            figures["mfu"] = achieved / self._peak if achieved else None
        return figures

    @cached_property
    def _flops(self) -> int:
        # Counted at the first report: a start need not wait for it.
        return flops_per_image(self._recipe.model, self._recipe.attention, self._recipe.train.freeze).training


class HeadHistograms:
    """Histograms each `log.histogram_every_steps`; rank 0 writes them, and at stage 3 all ranks bring their parts."""

    def __init__(self, engine: Engine, log: LogConfig, reporter: Reporter) -> None:
        self._engine, self._reporter = engine, reporter
        self._every = log.histogram_every_steps if log.trackers else None
        self._parameters = list(head_parameters(engine.module))

    def due(self, step: int) -> bool:
        """Return whether there is something to write after `step` finished steps; the same on every rank."""
        return bool(self._every and self._parameters) and step > 0 and step % (self._every or 1) == 0

    def write(self, step: int) -> None:
        """Write one histogram of each parameter of each head. Collective at stage 3."""
        with whole_parameters(self._engine.deepspeed, [parameter for *_, parameter in self._parameters]):
            if self._reporter.is_recording:
                histograms = {
                    f"block {block}, {name}/head {head}": _histogram(values)
                    for name, block, parameter in self._parameters
                    for head, values in enumerate(parameter.detach())
                }
                self._reporter.histograms(step, histograms)


def _histogram(values: torch.Tensor) -> dict[str, Any]:
    """Count the finite values in bins of equal width."""
    numbers = values.double().flatten().cpu().numpy()
    numbers = numbers[np.isfinite(numbers)]
    counts, edges = np.histogram(numbers, 64)
    return {
        "counts": counts.tolist(),
        "edges": [float(f"{edge:.7g}") for edge in edges],
        "sum": float(numbers.sum()),
        "sum_squares": float(np.square(numbers).sum()),
    }


class StepProfiler:
    """Traces steps `steps[0]` to `steps[1]`, both included, on each rank; training's results do not change.

    A run that a signal stops in between leaves no trace.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, world: World, reporter: Reporter) -> None:
        self._first, self._last = steps or (0, -1)
        self._directory, self._world, self._reporter = directory, world, reporter
        self._profile: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number`, counted from 1, inside the block."""
        inside = self._first <= number <= self._last
        if inside and self._profile is None:
            self._first = number  # a resumed run may begin in the middle
            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        if inside and number == self._last:
            self.close(number)

    def close(self, step: int) -> None:
        """Write what has been traced up to `step`, if anything is being traced."""
        if self._profile is not None:
            self._last = step
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
            on = "cuda" if self._world.device.type == "cuda" else "cpu"
            times = self._profile.key_averages().table(sort_by=f"self_{on}_time_total", row_limit=40)
            replace_file(self._directory / f"{name}.txt", f"{times}\n")
        except OSError as error:  # training is worth more than its profile
            self._reporter.warn(f"profile of steps {self._first} to {self._last} not written: {error}")
            return
        self._reporter.info(f"profiled steps {self._first} to {self._last}: {trace}")
