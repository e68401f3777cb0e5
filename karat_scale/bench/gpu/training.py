"""Section 3: training steps through our own loop and DeepSpeed, softmax beside KArAt, eager, compiled and as graphs."""

import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from karat_scale.bench.gpu.task import Task

if TYPE_CHECKING:
    from karat_scale.train.distributed import World

# The values of train.compile, by what they are called here.
MODES = {"eager": False, "compiled": "default", "graphs": "reduce-overhead"}
BATCHES = {"small": 256, "tiny": 256, "base": 128}
# Those that tell most first, since compiling takes long.
GROUPS = (
    *(("eager", model) for model in BATCHES),
    *(("compiled", "small"), ("graphs", "small"), ("compiled", "base"), ("graphs", "tiny")),
    *(("compiled", "tiny"), ("graphs", "base")),
)
# Seconds that a group takes at first, before one of its mode was measured.
GUESSES = {"eager": 20.0, "compiled": 90.0, "graphs": 60.0}


@dataclass(frozen=True)
class Group:
    """Softmax, KArAt G1 and G3 of one model in one mode; they take turns."""

    mode: str
    model: str
    batch: int

    def __str__(self) -> str:
        return f"ViT-{self.model.capitalize()}, {self.mode}"


def measure(task: Task) -> None:
    """Rows for each group that the time allows."""
    from karat_scale.train import distributed

    world = distributed.start(task.device)
    try:
        for mode, model in GROUPS[:1] if task.toy else GROUPS:
            _measure_group(task, world, Group(mode, model, 4 if task.toy else BATCHES[model]))
    finally:
        distributed.stop()


def _measure_group(task: Task, world: "World", group: Group) -> None:
    from karat_scale.bench.gpu.loops import compare

    if not task.budget.allows(group.mode, GUESSES[group.mode]):
        task.tell.left_out(str(group), "there was no time left for it; name --only training and more --minutes")
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:

        def attempt(batch: int) -> None:
            compare(task, world, Group(group.mode, group.model, batch), scratch)

        task.halving(str(group), group.batch, attempt, least=2)
    task.free()
    task.budget.note(group.mode, begun)
