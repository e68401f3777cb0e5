"""Section 3: training steps through our own loop, softmax beside KArAt, eager, compiled and as graphs."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from karat_scale.attention import KaratOperator
from karat_scale.bench.gpu.process import one_line
from karat_scale.bench.gpu.task import Task, is_fatal
from karat_scale.bench.measuring import cuda_peak, interleaved_seconds, median_ratio
from karat_scale.bench.step import silent_trainer
from karat_scale.data.backends import ImageSpec
from karat_scale.data.backends.synthetic import TRAIN_STREAM, SyntheticBackend
from karat_scale.data.batch import Batch
from karat_scale.data.digest import with_digest
from karat_scale.data.plan import BatchSlice
from karat_scale.engine import distributed
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.memory_errors import is_out_of_memory
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
PRECISION, DTYPE = "bf16", "bfloat16"


@dataclass(frozen=True)
class Group:
    """Softmax, KArAt G1 and G3 of one model in one mode; they take turns."""

    mode: str
    model: str
    batch: int

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
        self.dtypes = _dtypes_inside(self.parts.engine.module, lambda: self.run(1)) if not recipe.train.compile else {}
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


def compare(task: Task, world: World, group: Group, scratch: str) -> None:
    """Tell a row for each attention. Raises what says that memory ran out."""
    loops: dict[str, OurLoop] = {}
    try:
        for name in (SOFTMAX, *GRIDS):
            try:
                loops[name] = OurLoop(_recipe(task, group, name, scratch), world, task)
            except Exception as error:
                if is_out_of_memory(error) or is_fatal(error):
                    raise
                task.channel.failed(f"{group}, {name}", one_line(error))
        steps = _steps_a_round(loops, task)
        runs = {name: functools.partial(loop.run, steps) for name, loop in loops.items()}
        seconds = interleaved_seconds(runs, 1 if task.toy else ROUNDS)
        for name, loop in loops.items():
            _report(task, group, name, loop, steps, seconds)
    finally:
        loops.clear()
        torch.compiler.reset()


def _report(task: Task, group: Group, name: str, loop: OurLoop, steps: int, seconds: dict[str, list[float]]) -> None:
    rate = steps * group.batch / statistics.median(seconds[name])
    row: dict[str, Any] = {
        "model": "toy" if task.toy else f"ViT-{group.model.capitalize()}",
        "mode": group.mode,
        "attention": name,
        "batch": group.batch,
        "images_per_second": round(rate, 1),
        "ratio_to_softmax": round(1 / median_ratio(seconds, name, SOFTMAX), 3) if SOFTMAX in seconds else None,
        **loop.classifier.efficiency.figures(rate),
        "peak_mb": loop.peak_mb(),
        **({} if task.toy else _work_of(loop)),
        **loop.dtypes,
    }
    if loop.dtypes:
        row["right"] = all(dtype == DTYPE for dtype in loop.dtypes.values())
    task.channel.row(**row)


def _recipe(task: Task, group: Group, attention: str, scratch: str) -> Recipe:
    name = f"{group.model}-{group.mode}-{group.batch}-{attention}"
    karat = (
        {"kind": "karat", "grid": GRIDS[attention], "implementation": task.implementation} if attention in GRIDS else {}
    )
    tree = {
        "run": {"name": name, "dir": f"{scratch}/{name}", "device": task.device},
        "model": {"name": f"vit_{group.model}_patch16_224", **(TOY_MODEL if task.toy else {})},
        "attention": karat or {"kind": "softmax"},
        "data": {"backend": "synthetic", "synthetic_samples": group.batch},
        "train": {
            "global_batch": group.batch,
            "micro_batch": group.batch,
            "precision": PRECISION,
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


def _dtypes_inside(model: nn.Module, step: Callable[[], object]) -> dict[str, str]:
    """Return the dtypes of the outputs of the first block's MLP and attention in a step."""
    seen: dict[str, str] = {}
    linear = next(module for name, module in model.named_modules() if name.endswith("mlp.fc1"))
    attention = next((module for module in model.modules() if isinstance(module, KaratOperator)), None)
    if attention is None:  # SDPA is no module; what it is given is this layer's
        attention = next(module for name, module in model.named_modules() if name.endswith("attn.qkv"))

    def noting(key: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def note(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            seen[key] = str(output.dtype).removeprefix("torch.")

        return note

    hooks = [linear.register_forward_hook(noting("linear_dtype"))]
    hooks.append(attention.register_forward_hook(noting("operator_dtype")))
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


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
# The most important first, since compiling takes long.
GROUPS = (
    *(("eager", model) for model in BATCHES),
    *(("compiled", "small"), ("graphs", "small"), ("compiled", "base"), ("graphs", "tiny")),
    *(("compiled", "tiny"), ("graphs", "base")),
)
# Seconds that a group takes at first, before one of its mode was measured.
GUESSES = {"eager": 20.0, "compiled": 90.0, "graphs": 60.0}


def measure(task: Task) -> None:
    """Rows for each group that the time allows."""
    world = distributed.start(task.device)
    for mode, model in GROUPS[:1] if task.toy else GROUPS:
        _measure_group(task, world, Group(mode, model, TOY_BATCH if task.toy else BATCHES[model]))
    distributed.stop()


def _measure_group(task: Task, world: World, group: Group) -> None:
    if not task.budget.allows(group.mode, GUESSES[group.mode]):
        task.channel.left_out(str(group), "there was no time for it; give more by --minutes, and name --only training")
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:

        def attempt(batch: int) -> None:
            compare(task, world, Group(group.mode, group.model, batch), scratch)

        task.halving(str(group), group.batch, attempt, least=2)
    task.free()
    task.budget.note(group.mode, begun)
