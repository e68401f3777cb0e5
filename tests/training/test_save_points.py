"""A run that is stopped at any point, at any stage, ends with the same bits as one that was not stopped.

A sample of the cases runs by default; `pytest --slow=all tests/training/test_save_points.py` runs all of them.
"""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter
from karat_scale.recipe import Recipe
from karat_scale.training.agreement import StoppedError
from karat_scale.training.trainer import Trainer
from tests.small_engines import CONFIGS, equal, make_trainer
from tests.training.runs import last_tensors, losses

STEPS_PER_EPOCH = 4  # 32 samples in batches of 8; two epochs

# Where the signal comes: (step, moment). At "in evaluation", the resumed run does the epoch's evaluation. At "in a
# step", between two micro batches, the step is given up, and the resumed run takes it again.
POINTS = {
    "inside the first step": (0, "in a step"),
    "inside a step": (5, "in a step"),
    "first step": (1, "after step"),
    "middle of epoch": (6, "after step"),
    "last step of epoch": (4, "after step"),
    "during evaluation": (4, "in evaluation"),
    "epoch boundary": (4, "after evaluation"),
}
SAMPLE = {("zero1", "fp32", "inside a step"), ("zero3", "bf16", "during evaluation")}
MATRIX = [
    pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow, id="-".join(case).replace(" ", "_"))
    for case in ((config, precision, point) for config in CONFIGS for precision in ("fp32", "bf16") for point in POINTS)
]


class StoppingTrainer(Trainer):
    """A trainer that gets a signal at one point of its training, a step and a moment."""

    stop: tuple[int, str] | None = None

    def _signal(self, moment: str) -> None:
        if (self.state.step, moment) == self.stop:
            self.signals.received = signal.SIGTERM

    def micro_batches(self, batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(super().micro_batches(batches)):
            if number == 1:
                self._signal("in a step")
            yield batch

    def step(self, micro_batches: Any) -> Any:
        super().step(micro_batches)
        self._signal("after step")

    def _during_evaluation(self, done: int, total: int) -> None:
        self._signal("in evaluation")
        super()._during_evaluation(done, total)

    def save_or_stop(self) -> None:
        self._signal("after evaluation")
        super().save_or_stop()


def train_to_the_end(recipe: Recipe, world: World, stop: tuple[int, str] | None = None) -> dict[str, object]:
    """Train or resume in the recipe's directory; return what its last checkpoint holds, and the losses so far."""
    run = Path(recipe.run.dir)
    run.mkdir(exist_ok=True)
    reporter = Reporter(PlainDisplay(), MetricsLog(run / "metrics.jsonl"))
    with make_trainer(recipe, world, reporter, kind=StoppingTrainer) as trainer:
        trainer.stop = stop
        trainer.resume()
        with nullcontext() if stop is None else pytest.raises(StoppedError):
            trainer.run()
    store = CheckpointStore(run / "checkpoints")
    saved = store.state(store.pointed("latest") or "")
    learned = ("step", "samples", "evaluated_step", "best_top1", "best_step", "last_top1", "data_digest", "stream")
    return {**last_tensors(run), **{key: saved[key] for key in learned}, "losses": losses(run)}


@pytest.mark.parametrize(("config", "precision", "point"), MATRIX)
def test_resume_is_bit_equal(small_recipe, world, tmp_path, config, precision, point) -> None:
    # Dropout needs each rank's generator to resume in its saved state.
    own = [f"deepspeed.config={config}", f"train.precision={precision}", "model.proj_drop=0.1", "data.workers=0"]
    own.append("log.every_steps=3")  # so that most stops are between two lines of the log
    if POINTS[point][1] == "in a step":
        own += ["train.micro_batch=2", "augment.mix_prob=0.5"]
    whole = train_to_the_end(small_recipe(*own, f"run.dir={tmp_path / 'whole'}"), world)
    cut = small_recipe(*own, f"run.dir={tmp_path / 'cut'}")
    stopped = train_to_the_end(cut, world, POINTS[point])
    assert stopped["step"] == POINTS[point][0]
    assert (stopped["evaluated_step"] == stopped["step"]) == (point == "epoch boundary")
    resumed = train_to_the_end(cut, world)
    assert resumed["step"] == 2 * STEPS_PER_EPOCH
    assert equal(resumed, whole)


def test_where_a_step_has_one_micro_batch_the_stop_is_after_it(small_recipe, world) -> None:
    with make_trainer(small_recipe("data.workers=0"), world) as trainer:
        trainer.signals.received = signal.SIGTERM
        with pytest.raises(StoppedError):
            trainer.run()
    assert trainer.state.step == 1
