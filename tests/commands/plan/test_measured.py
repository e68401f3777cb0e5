"""When what a run has logged takes the place of an estimate, and what of it is computation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.commands.plan.command import Request, make_plan
from karat_scale.commands.plan.report import show
from karat_scale.commands.plan.time import Measured, find_measured
from karat_scale.foundation.machine import find_gpu
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import dump_recipe

Load = Callable[..., Recipe]
H100 = "NVIDIA H100 80GB HBM3"
RATE = 80_000.0


def leave_a_run(recipe: Recipe, world: int, device: str = H100, rate: float = RATE) -> None:
    """What a finished run of `recipe` leaves in its directory, of what the plan reads."""
    run = Path(recipe.run.dir)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "metrics.jsonl").write_text(json.dumps({"event": "train", "images_per_second": rate}) + "\n")
    (run / "summary.json").write_text(json.dumps({"device": device, "world_size": world}))


def test_no_run_is_none(small_recipe: Load) -> None:
    assert find_measured(small_recipe(), find_gpu("h100-80")) is None


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (("model.depth=3",), "it ran with model.depth = 2"),
        (("attention.implementation=streaming",), "it ran with attention.implementation = auto"),
        (("train.precision=bf16",), "it ran with train.precision = fp32"),
        (("distill.from=timm:vit_tiny_patch16_224",), "it ran with distill.from = (empty)"),
        (("train.recompute.policy=all", "augment.run_on=device"), "it ran with augment.run_on = workers, and 1 more"),
    ],
)
def test_a_run_of_another_speed_is_not_used_and_says_why(
    small_recipe: Load, keys: tuple[str, ...], reason: str
) -> None:
    leave_a_run(small_recipe(), 1)
    found = find_measured(small_recipe(*keys), find_gpu("h100-80"))
    assert isinstance(found, str)
    assert "is not used: " in found
    assert reason in found


def test_what_does_not_set_the_speed_may_differ(small_recipe: Load) -> None:
    leave_a_run(small_recipe("optim.lr=1e-4", "data.synthetic_samples=64"), 1)
    assert isinstance(find_measured(small_recipe(), find_gpu("h100-80")), Measured)


def test_another_device_and_a_damaged_recipe_are_told(small_recipe: Load) -> None:
    leave_a_run(small_recipe(), 1)
    assert "it ran on NVIDIA H100" in str(find_measured(small_recipe(), None))
    (Path(small_recipe().run.dir) / "recipe.yaml").write_text("model: 3\n")
    assert "model = 3" in str(find_measured(small_recipe(), find_gpu("h100-80")))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_a_measured_rate_holds_its_own_collectives_already(small_recipe: Load, config: str, tmp_path: Path) -> None:
    own = tmp_path / "own.json"  # a name of its own keeps the plan from choosing another stage
    own.write_text(json.dumps({"zero_optimization": {"stage": int(config[-1])}, "zero_allow_untested_optimizer": True}))
    keys = (f"deepspeed.config={own}", "model.embed_dim=256", "train.global_batch=256")
    leave_a_run(small_recipe(*keys), 4, rate=256 / 0.01)
    same, alone, more = (make_plan(small_recipe(*keys), Request(gpus=gpus, gpu="h100-80")) for gpus in (4, 1, 16))
    assert same.communication > 0
    assert same.step == pytest.approx(0.01)
    if config == "zero0":
        assert alone.step == pytest.approx(4 * (0.01 - same.communication))
        assert more.step == pytest.approx((0.01 - same.communication) / 4 + more.communication)


def test_the_plan_says_why_it_estimates(small_recipe: Load, capsys: pytest.CaptureFixture[str]) -> None:
    leave_a_run(small_recipe(), 1)
    plan = make_plan(small_recipe("model.depth=1"), Request(gpu="h100-80"))
    show(plan)
    printed = capsys.readouterr().out
    assert "is not used: it ran with model.depth = 2" in printed
    assert "(estimated from operations, bytes and launches)" in printed
