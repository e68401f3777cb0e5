"""What the loop does when the data, the loss or a gradient is not finite, and when the clock jumps."""

import math
import time
import weakref
from collections.abc import Callable
from itertools import count

import pytest
import torch

from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.foundation.errors import DivergedError
from karat_scale.training.trainer import Trainer
from tests.conftest import wait_until
from tests.small_engines import FEW_CELLS, equal, make_trainer
from tests.training.nonfinite import KINDS, NonfiniteTrainer


def _learned(trainer: Trainer) -> list[object]:
    """Return copies of masters, optimizer states and averages."""
    engine = trainer.engine.deepspeed
    assert trainer.ema is not None
    states = [dict(state) for state in engine.basic_optimizer.state.values()]
    kept = (master_weights(engine), states, trainer.ema.shards)
    return [torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), part) for part in kept]


@pytest.mark.parametrize(("config", "precision"), FEW_CELLS)
def test_nothing_is_learned_from_what_is_not_finite(small_recipe, world, config, precision) -> None:
    own = (f"deepspeed.config={config}", f"train.precision={precision}", "data.workers=0", "train.micro_batch=4")
    trainer = make_trainer(small_recipe(*own, "train.epochs=3"), world, kind=NonfiniteTrainer)
    try:
        batches = trainer.task.backend.train_batches(trainer.plan.slices(0, 12))
        trainer.step([next(batches), next(batches)])
        for kind in KINDS:
            before = _learned(trainer)
            trainer.inject = kind
            trainer.step([next(batches), next(batches)])
            assert equal(_learned(trainer), before), kind
            assert trainer.state.skipped_in_row == 1
            trainer.step([next(batches), next(batches)])
            assert not equal(_learned(trainer), before), kind
            assert trainer.state.skipped_in_row == 0
            assert all(tensor.isfinite().all() for tensor in master_weights(trainer.engine.deepspeed))
        assert trainer.state.step == 1 + 2 * len(KINDS)  # the cursor and with it the schedule went on
    finally:
        trainer.task.close()


# At stage 3, DeepSpeed's own hooks keep its engine.
@pytest.mark.parametrize(("config", "precision"), [one for one in FEW_CELLS if not one.values[0].startswith("zero3")])
def test_what_is_released_is_freed_while_the_trainer_is_still_there(small_recipe, world, config, precision) -> None:
    """Before the fix, the averages kept the weights and the optimizer's states of an image size beside the next."""
    own = (f"deepspeed.config={config}", f"train.precision={precision}", "data.workers=0")
    trainer = make_trainer(small_recipe(*own), world)
    assert trainer.ema is not None
    held = [weakref.ref(trainer.engine.deepspeed), weakref.ref(trainer.engine.module), weakref.ref(trainer.ema)]
    trainer.release()
    assert [ref() for ref in held] == [None] * 3
    trainer.task.close()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_recipe_may_say_to_stop(small_recipe, world, log_every) -> None:
    own = ("train.on_nonfinite=stop", "data.workers=0", "checkpoint.every_steps=1", f"log.every_steps={log_every}")
    trainer = make_trainer(small_recipe(*own), world, kind=NonfiniteTrainer)
    trainer.bad_steps = range(3, 4)
    with pytest.raises(
        DivergedError,
        match=r"step 3 has a loss .* and train.on_nonfinite = stop; the last checkpoint is step-00000002; lower",
    ):
        trainer.run()
    trainer.task.close()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_run_that_skips_for_ever_ends(small_recipe, world, capsys, log_every) -> None:
    recipe = small_recipe("train.max_skipped_steps=3", "data.workers=0", f"log.every_steps={log_every}")
    trainer = make_trainer(recipe, world, kind=NonfiniteTrainer)
    trainer.bad_steps = range(2, 101)
    said = r"step 4 .*the last of 3 in a row \(train\.max_skipped_steps = 3\); there is no checkpoint yet"
    with pytest.raises(DivergedError, match=said):
        trainer.run()
    assert trainer.state.step == 4  # where it would be evaluated
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split("warning: ")[1][:6] for line in warnings] == ["step 2", "step 3"]
    trainer.task.close()


def test_a_skipped_step_does_not_count_in_the_mean_loss(small_recipe, world) -> None:
    """Before the fix, one such step made the loss of its log interval nan."""
    found = {}
    for bad in (range(0), range(2, 3), range(1, 4)):
        trainer = make_trainer(small_recipe("data.workers=0", "log.every_steps=3"), world, kind=NonfiniteTrainer)
        trainer.bad_steps = bad
        told: list[dict[str, float]] = []
        trainer.reporter.train = lambda step, total, figures, told=told: told.append(figures)
        batches = trainer.feed(3)
        for _ in range(3):
            trainer.step(trainer.micro_batches(batches))
        found[len(bad)] = told[-1]["loss"]
        trainer.task.close()
    assert math.isnan(found[3])
    assert math.isfinite(found[1])
    assert 0.8 < found[1] / found[0] < 1.25


def test_a_step_that_is_not_finite_is_found_between_log_lines(small_recipe, world, capsys) -> None:
    recipe = small_recipe("data.workers=0", "log.every_steps=1000", "train.epochs=100", "train.eval_every_epochs=100")
    trainer = make_trainer(recipe, world, kind=NonfiniteTrainer)
    trainer.bad_steps = range(2, 3)
    batches = trainer.feed(3)
    for _ in range(3):
        trainer.step(trainer.micro_batches(batches))
    assert trainer.state.skipped_in_row == 0
    assert "warning" not in capsys.readouterr().out
    trainer._save_points.agreement._next = 4
    trainer.save_or_stop()
    assert "warning" not in capsys.readouterr().out
    trainer._save_points.agreement._next = 3
    trainer.save_or_stop()
    assert "warning: step 2 has a loss or gradients that are not finite; skipped" in capsys.readouterr().out
    assert trainer.state.skipped_in_row == 0  # step 3 was good


def test_a_save_under_way_is_completed_in_an_evaluation(small_recipe, world) -> None:
    """Before the fix, a kill in a long evaluation lost a checkpoint whose files were all written."""
    trainer = make_trainer(small_recipe("data.workers=0", "train.epochs=1"), world)
    batches = trainer.feed(trainer.total_steps)
    for step in range(trainer.total_steps):
        trainer.step(trainer.micro_batches(batches))
        if step == trainer.total_steps - 2:
            assert trainer.checkpoints.save(trainer.state, wait=False)
    saved = f"step-{trainer.total_steps - 1:08d}"
    named: list[str | None] = []
    evaluate = trainer.task.evaluate

    def long(forward: Callable[..., torch.Tensor], on_batch: Callable[[int, int], None]) -> object:
        batch = count(1)
        wait_until(lambda: on_batch(next(batch), 10**6) or not trainer.checkpoints.is_under_way)
        named.append(trainer.checkpoints.store.pointed("latest"))
        return evaluate(forward, on_batch)

    trainer.task.evaluate = long
    trainer._evaluate_if_due()
    assert named == [saved]
    assert trainer.state.evaluated_step == trainer.total_steps
    trainer.checkpoints.finish()
    trainer.task.close()


def test_the_speed_is_that_of_the_last_machine(small_recipe, world) -> None:
    trainer = make_trainer(small_recipe("data.workers=0", "train.max_steps=3"), world)
    trainer.state.timed_on, trainer.state.timed_samples, trainer.state.timed_seconds = "8 x H100", 8_000_000, 1.0
    trainer.run()
    assert trainer.state.timed_on.startswith("1 x CPU")
    assert trainer.state.timed_samples == 2 * 8  # the first step is not timed
    trainer.task.close()


def test_a_clock_that_jumps_neither_hastens_nor_stops_saving(small_recipe, world, monkeypatch, tmp_path) -> None:
    trainer = make_trainer(
        small_recipe("checkpoint.every_minutes=1000", "checkpoint.every_steps=2", "data.workers=0"), world
    )
    jumps = iter([3600.0, -7200.0, 86400.0] * 1000)
    now: Callable[[], float] = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    trainer.run()
    checkpoints, store = trainer.checkpoints, trainer.checkpoints.store
    assert not checkpoints.is_under_way
    assert store.names()[:2] == ["step-00000008", "step-00000006"]
    assert all(store.damage(name) is None for name in store.names())
    assert math.isfinite(trainer.state.images_per_second or math.nan)
    trainer.task.close()
