"""The peak of live tensors of a few real training steps, each rank in a process of its own.

torch's profiler reports each allocation of its CPU allocator, which all tensors go through, those inside operations
included. Not seen: what C++ libraries allocate for themselves (oneDNN's scratch, our CPU kernel's tiles).
"""

import multiprocessing
import os
import socket
from typing import Any

from karat_scale.recipe import Recipe


def live_tensor_peak(recipe: Recipe, world: int, steps: int = 2) -> int:
    """Bytes of live tensors at their peak on the rank with the most, from the model's birth to the last step."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    arguments = [(recipe, rank, world, port, steps) for rank in range(world)]
    with context.Pool(world, maxtasksperchild=1) as pool:
        return max(pool.starmap(_measure, arguments, chunksize=1))


def _measure(recipe: Recipe, rank: int, world: int, port: int, steps: int) -> int:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _train(recipe, steps)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def _train(recipe: Recipe, steps: int) -> None:
    from karat_scale.train import distributed
    from karat_scale.train.loop import Loop
    from karat_scale.train.parts import build_parts
    from karat_scale.train.progress import Reporter, SilentDisplay
    from karat_scale.train.run_directory import RunDirectory
    from karat_scale.train.signals import StopSignals
    from karat_scale.train.state import TrainState

    world = distributed.start("cpu")
    try:
        reporter = Reporter(SilentDisplay(), None)
        parts = build_parts(recipe, world, RunDirectory(recipe.run.dir), StopSignals(), reporter)
        loop = Loop(parts, TrainState())
        batches = parts.backend.train_batches(parts.plan.slices(0, steps))
        for _ in range(steps):
            loop.step([next(batches) for _ in range(parts.plan.accumulation)])
    finally:
        distributed.stop()
