"""Section 5, a process a card: a step at each ZeRO stage against DistributedDataParallel."""

import time
from dataclasses import replace

from karat_scale.bench.gpu.task import Task
from karat_scale.bench.stages import StagesCase, compare
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.memory_errors import is_out_of_memory

BATCH = 128
CASES, TOY_CASE = (("small", "softmax"), ("small", "karat"), ("base", "softmax")), ("tiny", "karat")
GUESS = 40.0


def measure(task: Task) -> None:
    """Rows for each case that the time allows, all of them agreed by all ranks.

    Raises:
        RuntimeError, MemoryError: a rank failed. Where memory ran out the section asks to run again with half the
            batch: the other ranks wait within a collective, and end with this process.
    """
    world = distributed.start(task.device)
    batch = 2 if task.toy else task.largest_batch or BATCH
    try:
        for model, attention in (TOY_CASE,) if task.toy else CASES:
            _measure_case(task, world, model, attention, batch)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and batch > 1:
            task.channel.again(batch // 2)
        raise
    distributed.stop()


def _measure_case(task: Task, world: World, model: str, attention: str, batch: int) -> None:
    what = f"{'toy' if task.toy else f'ViT-{model.capitalize()}'}, {attention}, bf16, {world.size} x {batch}"
    if world.any(not task.budget.allows("case", GUESS)):
        if world.is_main:
            task.channel.left_out(what, "the time was up")
        return
    begun = time.monotonic()
    case = StagesCase(f"vit_{model}_patch16_224", 224, batch, attention, world.size, 3, 5, "bf16")
    if task.toy:
        case = replace(case, image_size=32, depth=1, steps=1, rounds=1)
    for row in compare(case, world):
        if world.is_main:
            rate = 1e3 * world.size * batch / row["milliseconds_a_step"]
            task.channel.row(case=what, **row, images_per_second=round(rate, 1))
    task.free()
    task.budget.note("case", begun)
