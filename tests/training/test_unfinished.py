"""A stop between two micro batches gives the step up; the resumed run takes it again, with the same bits."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.engine.distributed import World
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.signals import StoppedError
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import equal, make_parts

STEPS = 8

OWN = ("data.workers=0", "train.micro_batch=2", "model.proj_drop=0.2", "augment.mix_prob=0.5", "log.every_steps=3")


def final_tensors(run: Path) -> dict[str, object]:
    """All tensor files of the last checkpoint: weights, optimizer, EMA and random generators."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    return {path.name: load_tensors(path) for path in sorted(last.glob("*.pt"))}


class SignalInside(Loop):
    """A signal comes during the second micro batch of a step."""

    at = -1

    def micro_batches(self, batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(super().micro_batches(batches)):
            if (self.state.step, number) == (self.at, 1):
                self.parts.signals.received = signal.SIGINT
            yield batch


def run(parts: Parts, loop: Loop) -> None:
    try:
        loop.run()
    finally:
        parts.task.close()


CASES = [
    pytest.param(config, at, marks=() if (config, at) == ("zero1", 5) else pytest.mark.slow)
    for config in ("zero0", "zero1", "zero2", "zero3")
    for at in (0, 5)
]


@pytest.mark.parametrize(("config", "at"), CASES)
def test_the_resumed_run_equals_an_uninterrupted_one(
    small_recipe, world: World, tmp_path: Path, config: str, at: int
) -> None:
    own = (*OWN, f"deepspeed.config={config}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    parts = make_parts(small_recipe(*own, f"run.dir={whole}"), world)
    uninterrupted = Loop(parts, TrainState())
    run(parts, uninterrupted)

    parts = make_parts(small_recipe(*own, f"run.dir={cut}"), world)
    stopped = SignalInside(parts, TrainState())
    stopped.at = at
    with pytest.raises(StoppedError) as error:
        run(parts, stopped)
    assert (error.value.saved, stopped.state.step) == (True, at)
    assert parts.checkpoints.store.pointed("latest") == f"step-{at:08d}"
    timed = stopped.state.timed_samples, stopped.state.timed_seconds

    parts = make_parts(small_recipe(*own, f"run.dir={cut}"), world)
    state = parts.checkpoints.load("")
    assert state is not None
    assert (state.timed_samples, state.timed_seconds) == timed
    run(parts, Loop(parts, state))
    assert state.step == STEPS
    assert equal(final_tensors(cut), final_tensors(whole))
    assert state.data_digest == uninterrupted.state.data_digest != 0


def test_where_a_step_has_one_micro_batch_the_stop_is_after_it(small_recipe, world: World) -> None:
    parts = make_parts(small_recipe("data.workers=0"), world)
    loop = SignalInside(parts, TrainState())
    assert not loop._can_give_up
    parts.signals.received = signal.SIGTERM
    with pytest.raises(StoppedError):
        run(parts, loop)
    assert loop.state.step == 1
