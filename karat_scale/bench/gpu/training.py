"""Section 3: training steps through our own loop and DeepSpeed, softmax beside KArAt, eager, compiled and as graphs."""

import tempfile
import time

from karat_scale.bench.gpu.loops import Group, compare
from karat_scale.bench.gpu.task import Task
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World

BATCHES, TOY_BATCH = {"small": 256, "tiny": 256, "base": 128}, 4
# Those that tell most first, since compiling takes long.
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
        task.tell.left_out(str(group), "there was no time for it; give more by --minutes, and name --only training")
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:

        def attempt(batch: int) -> None:
            compare(task, world, Group(group.mode, group.model, batch), scratch)

        task.halving(str(group), group.batch, attempt, least=2)
    task.free()
    task.budget.note(group.mode, begun)
