"""Time the real training loop, end to end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from karat_scale.commands.doctor.device_speed import slowest
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import wait_for
from karat_scale.training.loop import Loop
from karat_scale.training.parts import Parts
from karat_scale.training.tasks.classification.evaluate import TrainState

MANY_STEPS = 1_000_000_000
FEWEST_STEPS = 2


@dataclass(frozen=True)
class LoopSpeed:
    """images_per_second: over all ranks. waiting_share: the share of time spent waiting for data, on the slowest rank.
    steps: the number of timed steps. unreadable: samples of rank 0 that could not be decoded.
    """

    images_per_second: float
    waiting_share: float
    steps: int
    unreadable: int


def measure_loop(parts: Parts, seconds: float) -> LoopSpeed:
    """Train for about `seconds`, after a first step that does not count. Nothing is evaluated or saved."""
    loop = Loop(parts, TrainState())
    waited = 0.0

    @contextmanager
    def waiting() -> Iterator[None]:
        nonlocal waited
        before = time.perf_counter()
        yield
        waited += time.perf_counter() - before

    unreadable = 0
    batches = loop.feed(MANY_STEPS, waiting)

    def counted() -> Iterator[Batch]:
        nonlocal unreadable
        for batch in loop.micro_batches(batches):
            unreadable += len(batch.bad)
            yield batch

    loop.step(counted())
    wait_for(parts.world.device)
    begun, waited = time.perf_counter(), 0.0
    steps = unreadable = 0
    while steps < FEWEST_STEPS or not parts.world.any(time.perf_counter() - begun > seconds):
        loop.step(counted())
        steps += 1
    wait_for(parts.world.device)
    elapsed = slowest(time.perf_counter() - begun, parts.world)
    rate = steps * parts.plan.global_batch / elapsed
    return LoopSpeed(rate, slowest(waited / elapsed, parts.world), steps, unreadable)
