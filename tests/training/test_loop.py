"""What the loop does when the data, the loss or a gradient is not finite, and when the clock jumps."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import DivergedError
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import CONFIGS, equal, make_parts
from tests.training.nonfinite import KINDS, NonfiniteLoop

SAMPLE = {("zero0", "fp32"), ("zero1", "bf16"), ("zero2_offload", "fp32"), ("zero3", "bf16")}
CASES = [
    pytest.param(config, precision, marks=() if (config, precision) in SAMPLE else pytest.mark.slow)
    for config in CONFIGS
    for precision in ("fp32", "bf16")
]


def _learned(parts: Parts) -> list[object]:
    """Masters, optimizer states and averages."""
    engine = parts.engine.deepspeed
    assert parts.ema is not None
    states = [dict(state) for state in engine.basic_optimizer.state.values()]
    kept = (master_weights(engine), states, parts.ema.shards)
    return [torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), part) for part in kept]


@pytest.mark.parametrize(("config", "precision"), CASES)
def test_nothing_is_learned_from_what_is_not_finite(small_recipe, world: World, config: str, precision: str) -> None:
    own = (f"deepspeed.config={config}", f"train.precision={precision}", "data.workers=0", "train.micro_batch=4")
    parts = make_parts(small_recipe(*own, "train.epochs=3"), world)
    try:
        loop = NonfiniteLoop(parts, TrainState())
        batches = parts.task.backend.train_batches(parts.plan.slices(0, 12))
        loop.step([next(batches), next(batches)])
        for kind in KINDS:
            before = _learned(parts)
            loop.inject = kind
            loop.step([next(batches), next(batches)])
            assert equal(_learned(parts), before), kind
            assert loop.state.skipped_in_row == 1
            loop.step([next(batches), next(batches)])
            assert not equal(_learned(parts), before), kind
            assert loop.state.skipped_in_row == 0
            assert all(tensor.isfinite().all() for tensor in master_weights(parts.engine.deepspeed))
        assert loop.state.step == 1 + 2 * len(KINDS)  # the cursor and with it the schedule went on
    finally:
        parts.task.close()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_the_recipe_may_say_to_stop(small_recipe, world: World, log_every: int) -> None:
    own = ("train.on_nonfinite=stop", "data.workers=0", "checkpoint.every_steps=1", f"log.every_steps={log_every}")
    parts = make_parts(small_recipe(*own), world)
    loop = NonfiniteLoop(parts, TrainState(), inject_at=3)
    with pytest.raises(
        DivergedError,
        match=r"step 3 has a loss .*, train.on_nonfinite = stop; the last checkpoint is step-00000002; lower",
    ):
        loop.run()
    parts.task.close()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_run_that_skips_for_ever_ends(
    small_recipe, world: World, capsys: pytest.CaptureFixture[str], log_every: int
) -> None:
    parts = make_parts(
        small_recipe("train.max_skipped_steps=3", "data.workers=0", f"log.every_steps={log_every}"), world
    )
    loop = NonfiniteLoop(parts, TrainState(), inject_at=2, until=100)
    with pytest.raises(DivergedError, match=r"step 4 .*the last of train\.max_skipped_steps = 3; .* is none"):
        loop.run()
    assert loop.state.step == 4  # where it would be evaluated
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split("warning: ")[1][:6] for line in warnings] == ["step 2", "step 3"]
    parts.task.close()


def test_a_step_that_is_not_finite_is_found_between_log_lines(
    small_recipe, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe("data.workers=0", "log.every_steps=1000", "train.epochs=100", "train.eval_every_epochs=100")
    parts = make_parts(recipe, world)
    loop = NonfiniteLoop(parts, TrainState(), inject_at=2)
    batches = loop.feed(3)
    for _ in range(3):
        loop.step(loop.micro_batches(batches))
    assert loop.state.skipped_in_row == 0
    assert "warning" not in capsys.readouterr().out
    loop._save_points._agreement._next = 4
    loop.save_or_stop()
    assert "warning" not in capsys.readouterr().out
    loop._save_points._agreement._next = 3
    loop.save_or_stop()
    assert "warning: step 2 has a loss or gradients that are not finite; skipped" in capsys.readouterr().out
    assert loop.state.skipped_in_row == 0  # step 3 was good


def test_a_clock_that_jumps_neither_hastens_nor_stops_saving(
    small_recipe, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = make_parts(
        small_recipe("checkpoint.every_minutes=1000", "checkpoint.every_steps=2", "data.workers=0"), world
    )
    jumps = iter([3600.0, -7200.0, 86400.0] * 1000)
    now: Callable[[], float] = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    loop = Loop(parts, TrainState())
    loop.run()
    checkpoints, store = parts.checkpoints, parts.checkpoints.store
    assert not checkpoints.is_under_way
    assert store.names()[:2] == ["step-00000008", "step-00000006"]
    assert all(store.damage(name) is None for name in store.names())
    assert math.isfinite(loop.state.images_per_second or math.nan)
    parts.task.close()
