"""The peak of live tensors of a few real training steps and of an evaluation, each rank in a process of its own.

torch's profiler reports each allocation of its CPU allocator, which all tensors go through, those inside operations
included. Not seen: what C++ libraries allocate for themselves (oneDNN's scratch, our CPU kernel's tiles).
"""

import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

from karat_scale.recipe import Recipe

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast", "reduce")
# gloo's thread lets go of a collective's tensors a moment after it has answered.
SECONDS_TO_LET_GO = 0.003


def live_tensor_peak(recipe: Recipe, world: int, steps: int = 2, evaluates: bool = False) -> int:
    """Return the peak bytes of live tensors on the rank with the most, from building the model to the last step.

    With `evaluates` an evaluation follows.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    arguments = [(recipe, rank, world, port, steps, evaluates) for rank in range(world)]
    with context.Pool(world, maxtasksperchild=1) as pool:
        return max(pool.starmap(measure, arguments, chunksize=1))


def measure(recipe: Recipe, rank: int, world: int, port: int, steps: int, evaluates: bool = False) -> int:
    """`live_tensor_peak` of one rank, in a process of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    _outwait_gloo()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(recipe, steps, evaluates)
    return _peak(profiler.profiler.kineto_results.experimental_event_tree())


def _peak(tree: Iterable[Any]) -> int:
    """The most bytes alive at once, of allocations by address."""
    changes = sorted(_allocations(tree, False), key=lambda change: change[0])
    alive: dict[int, int] = {}
    live = peak = 0
    for _, address, size in changes:
        live -= alive.pop(address, 0)  # also what another thread let go unseen, now that its address is used again
        if size > 0:
            alive[address] = size
            live += size
        peak = max(peak, live)
    return peak


def _allocations(events: Iterable[Any], in_collective: bool) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes or less than 0) of all but what gloo copies for itself, and frees on its own thread."""
    for event in events:
        if event.name == "[memory]" and not in_collective:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children, in_collective or event.name.startswith("c10d::"))


def _outwait_gloo() -> None:
    """Wait after each collective: the profiler does not see what is freed on gloo's own thread."""
    import torch.distributed as dist

    def waiting(collective: Any) -> Any:
        @functools.wraps(collective)
        def run(*args: Any, **kwargs: Any) -> Any:
            answer = collective(*args, **kwargs)
            time.sleep(SECONDS_TO_LET_GO)
            return answer

        return run

    for name in COLLECTIVES:
        setattr(dist, name, waiting(getattr(dist, name)))


def _train(recipe: Recipe, steps: int, evaluates: bool) -> None:
    from karat_scale.engine import distributed
    from karat_scale.training.tasks.classification.task import ClassificationTask
    from karat_scale.training.trainer import silent_trainer

    world = distributed.start("cpu")
    try:
        trainer = silent_trainer(recipe, world, ClassificationTask)
        batches = trainer.feed(steps)
        for _ in range(steps):
            trainer.step([next(batches) for _ in range(trainer.plan.accumulation)])
        if evaluates:
            trainer.evaluate(lambda *_: None)
    finally:
        distributed.stop()
