"""A stop between two micro batches gives the step up; the resumed run takes it again, with the same bits."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.engine.distributed import World
from karat_scale.training.agreement import StoppedError
from karat_scale.training.trainer import Trainer
from tests.small_engines import equal, make_trainer

STEPS = 8

OWN = ("data.workers=0", "train.micro_batch=2", "model.proj_drop=0.2", "augment.mix_prob=0.5", "log.every_steps=3")


def final_tensors(run: Path) -> dict[str, object]:
    """All tensor files of the last checkpoint: weights, optimizer, EMA and random generators."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    return {path.name: load_tensors(path) for path in sorted(last.glob("*.pt"))}


class SignalInside(Trainer):
    """A signal comes during the second micro batch of a step."""

    at = -1

    def micro_batches(self, batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(super().micro_batches(batches)):
            if (self.state.step, number) == (self.at, 1):
                self.signals.received = signal.SIGINT
            yield batch


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
    with make_trainer(small_recipe(*own, f"run.dir={whole}"), world) as uninterrupted:
        uninterrupted.run()

    with make_trainer(small_recipe(*own, f"run.dir={cut}"), world, kind=SignalInside) as stopped:
        stopped.at = at
        with pytest.raises(StoppedError) as error:
            stopped.run()
    assert (error.value.saved, stopped.state.step) == (True, at)
    assert stopped.checkpoints.store.pointed("latest") == f"step-{at:08d}"
    timed = stopped.state.timed_samples, stopped.state.timed_seconds

    with make_trainer(small_recipe(*own, f"run.dir={cut}"), world) as resumed:
        state = resumed.resume()
        assert (state.timed_samples, state.timed_seconds) == timed
        resumed.run()
    assert state.step == STEPS
    assert equal(final_tensors(cut), final_tensors(whole))
    assert state.data_digest == uninterrupted.state.data_digest != 0


def test_where_a_step_has_one_micro_batch_the_stop_is_after_it(small_recipe, world: World) -> None:
    with make_trainer(small_recipe("data.workers=0"), world) as trainer:
        assert not trainer._can_give_up
        trainer.signals.received = signal.SIGTERM
        with pytest.raises(StoppedError):
            trainer.run()
    assert trainer.state.step == 1
