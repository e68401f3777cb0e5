"""Time the real training loop, end to end."""

import itertools
import time
from dataclasses import dataclass

from karat_scale.data.batch import Batch
from karat_scale.doctor.clock import slowest, wait_for
from karat_scale.train.loop import Loop
from karat_scale.train.parts import Parts
from karat_scale.train.state import TrainState

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
    batches = parts.backend.train_batches(parts.plan.slices(0, MANY_STEPS))

    def take() -> list[Batch]:
        return list(itertools.islice(batches, parts.plan.accumulation))

    loop.step(take())
    wait_for(parts.world.device)
    begun = time.perf_counter()
    waited, steps, unreadable = 0.0, 0, 0
    while steps < FEWEST_STEPS or not parts.world.any(time.perf_counter() - begun > seconds):
        before = time.perf_counter()
        micro_batches = take()
        waited += time.perf_counter() - before
        unreadable += sum(len(batch.bad) for batch in micro_batches)
        loop.step(micro_batches)
        steps += 1
    wait_for(parts.world.device)
    elapsed = slowest(time.perf_counter() - begun, parts.world)
    rate = steps * parts.plan.global_batch / elapsed
    return LoopSpeed(rate, slowest(waited / elapsed, parts.world), steps, unreadable)
