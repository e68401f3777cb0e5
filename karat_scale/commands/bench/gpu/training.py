"""Training steps through our own loop, softmax beside KArAt, eager, compiled and as graphs."""

import functools
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from karat_scale.commands.bench.gpu.process import one_line
from karat_scale.commands.bench.gpu.worker import Task, is_fatal
from karat_scale.commands.bench.measuring import cuda_peak, interleaved_seconds, median_ratio
from karat_scale.commands.bench.step import silent_trainer
from karat_scale.data.backends import ImageSpec
from karat_scale.data.backends.synthetic import TRAIN_STREAM, SyntheticBackend
from karat_scale.data.batch import Batch
from karat_scale.data.loading.loader import with_digest
from karat_scale.data.plan import BatchSlice
from karat_scale.engine import distributed
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import is_out_of_memory
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe

# The values of train.compile, by what they are called here.
MODES = {"eager": False, "compiled": "default", "graphs": "reduce-overhead"}
SOFTMAX = "softmax"
GRIDS = {"KArAt G1": 1, "KArAt G3": 3}
WARM_UP, ROUNDS, SECONDS_A_ROUND, MOST_STEPS = 3, 5, 0.3, 20
MANY = 10**6
STEP = "karat step"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
TOY_MODEL = {"image_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 10}


@dataclass(frozen=True)
class Group:
    """Kinds of attention of one model in one mode; they take turns."""

    mode: str
    model: str
    attentions: tuple[str, ...] = (SOFTMAX, *GRIDS)

    def __str__(self) -> str:
        return f"ViT-{self.model.capitalize()}, {self.mode}"


class HeldBatches(SyntheticBackend):
    """The synthetic backend with its first batch again and again: to make one takes longer than a step may."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Yield one batch again and again, in page-locked memory if there is a GPU."""
        held: Batch | None = None
        for part in slices:
            if held is None:
                held = with_digest(self._batch(part, TRAIN_STREAM))
                held = held.pin_memory() if torch.cuda.is_initialized() else held
            yield held


class OurLoop:
    """A run's parts and loop; `memory` is what they take on the device between steps."""

    def __init__(self, recipe: Recipe, world: World, task: Task) -> None:
        self._task = task
        before = allocated(task)
        self.classifier, self.parts, self._loop = silent_trainer(recipe, world)
        self.classifier.backend = HeldBatches(ImageSpec.of(recipe))
        self._batches = self._loop.feed(MANY)
        self.run(1 if task.toy else WARM_UP)
        self.memory = allocated(task) - before

    def launch(self, steps: int) -> None:
        """Steps as `Loop.run` takes them, without waiting for the device."""
        for _ in range(steps):
            self._loop.step(self._loop.micro_batches(self._batches))
            self._loop.save_or_stop()

    def run(self, steps: int) -> None:
        """Take steps, and wait for the device."""
        self.launch(steps)
        wait_for(self._task.device)

    def peak_mb(self) -> float | None:
        """The most that training needs on the device, without what other loops keep there."""
        if self._task.toy:
            return None
        return round(cuda_peak(lambda: self.run(1)) + self.memory / 1e6, 1)


def allocated(task: Task) -> int:
    """Bytes of tensors on the device."""
    return 0 if task.toy else torch.cuda.memory_allocated()


def compare(task: Task, world: World, group: Group, batch: int) -> None:
    """Tell a row for each attention. Raises what says that memory ran out."""
    loops: dict[str, OurLoop] = {}
    try:
        for name in group.attentions:
            try:
                loops[name] = OurLoop(_recipe(task, group, name, batch), world, task)
            except Exception as error:
                if is_out_of_memory(error) or is_fatal(error):
                    raise
                task.channel.failed(f"{group}, {name}", one_line(error))
        steps = _steps_a_round(loops, task)
        runs = {name: functools.partial(loop.run, steps) for name, loop in loops.items()}
        seconds = interleaved_seconds(runs, 1 if task.toy else ROUNDS)
        for name, loop in loops.items():
            _report(task, group, name, loop, steps * batch, seconds)
    finally:
        loops.clear()
        torch.compiler.reset()


def _report(task: Task, group: Group, name: str, loop: OurLoop, images: int, seconds: dict[str, list[float]]) -> None:
    rate = images / statistics.median(seconds[name])
    task.channel.row(
        model="toy" if task.toy else f"ViT-{group.model.capitalize()}",
        mode=group.mode,
        attention=name,
        batch=loop.parts.recipe.train.global_batch,
        images_per_second=round(rate, 1),
        ratio_to_softmax=round(1 / median_ratio(seconds, name, SOFTMAX), 3) if SOFTMAX in seconds else None,
        **loop.classifier.efficiency.figures(rate),
        peak_mb=loop.peak_mb(),
        **({} if task.toy else _work_of(loop)),
    )


def _recipe(task: Task, group: Group, attention: str, batch: int) -> Recipe:
    name = f"{group.model}-{group.mode}-{batch}-{attention}"
    karat = (
        {"kind": "karat", "grid": GRIDS[attention], "implementation": task.implementation} if attention in GRIDS else {}
    )
    tree = {
        "run": {"name": name, "dir": str(task.scratch / name), "device": task.device},
        "model": {"name": f"vit_{group.model}_patch16_224", **(TOY_MODEL if task.toy else {})},
        "attention": karat or {"kind": "softmax"},
        "data": {"backend": "synthetic", "synthetic_samples": batch},
        "train": {
            "global_batch": batch,
            "micro_batch": batch,
            "precision": "bf16",
            "compile": MODES[group.mode],
            "epochs": MANY,
            "eval_every_epochs": MANY,
        },
        "checkpoint": {"every_minutes": None},
        "log": {"every_steps": 1000, "trackers": []},
    }
    return validate_recipe(tree, "bench gpu")


def _steps_a_round(loops: dict[str, OurLoop], task: Task) -> int:
    if task.toy or not loops:
        return 1
    begun = time.perf_counter()
    next(iter(loops.values())).run(1)
    return max(1, min(MOST_STEPS, round(SECONDS_A_ROUND / (time.perf_counter() - begun))))


def _work_of(loop: OurLoop) -> dict[str, int]:
    """Return one step's kernels and launches, and how often the host waits for the device, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function(STEP):
        loop.launch(1)
    loop.run(0)
    events = list(profiler.events() or ())
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    end = next(event.time_range.end for event in on_host if event.name == STEP)  # after it, the profiler itself waits
    return {
        "kernels": sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events),
        "launches": sum(event.name.startswith(LAUNCHES) for event in events),
        "waits": sum(event.name.startswith(WAITS) and event.time_range.start < end for event in on_host),
    }


BATCHES, TOY_BATCH = {"small": 256, "tiny": 256, "base": 128}, 4
# First one row for each mode, then what compares more: compiling takes long.
GROUPS = (
    Group("eager", "small"),
    *(Group(mode, "small", ("KArAt G3",)) for mode in ("graphs", "compiled")),
    *(Group("eager", model) for model in ("tiny", "base")),
    *(Group(mode, model) for model in ("small", "base", "tiny") for mode in ("graphs", "compiled")),
)
# Seconds that an attention takes in a mode at first, before one was measured.
GUESSES = {"eager": 7.0, "compiled": 50.0, "graphs": 50.0}


def measure(task: Task) -> None:
    """Rows for each group that the time allows."""
    world = distributed.start(task.device)
    for group in GROUPS[:3] if task.toy else GROUPS:
        _measure_group(task, world, group)
    distributed.stop()


def _measure_group(task: Task, world: World, group: Group) -> None:
    count = len(group.attentions)
    if not task.budget.allows(group.mode, GUESSES[group.mode], count):
        task.channel.late(str(group))
        return
    task.channel.begin(str(group))
    begun = time.monotonic()
    batch = TOY_BATCH if task.toy else BATCHES[group.model]
    task.halving(str(group), batch, functools.partial(compare, task, world, group), least=2)
    task.free()
    task.budget.note(group.mode, begun, count)
