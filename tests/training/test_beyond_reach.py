"""The share of scores beyond what the functions tell apart, in each report of training."""

from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from tests.compilers import needs_compiler
from tests.conftest import SMALL, events
from tests.small_engines import equal, whole_zero3
from tests.training.test_save_points import train_to_the_end

__all__ = ["whole_zero3"]
DROP = ("model.drop_path=0.5", "model.proj_drop=0.1")


@pytest.mark.parametrize("stage", [pytest.param("zero0", marks=pytest.mark.slow), "zero3"])
def test_scores_that_grow_too_large_are_reported_and_warned_of_once(tmp_path, whole_zero3, stage, capsys) -> None:
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text("data: {backend: synthetic, synthetic_samples: 64}\nattention: {kind: karat}\n")
    config = f"deepspeed.config={whole_zero3 if stage == 'zero3' else stage}"
    own = (f"run.dir={run}", config, "optim.lr=0.3", "optim.lr_batch=", "schedule.warmup_epochs=0", "log.every_steps=1")
    assert main(["train", str(recipe), *SMALL, *own, "log.trackers=[tensorboard]"]) == 0
    reports = events(run, "train")
    assert all(one["beyond_reach"] == max(one["beyond_reach_by_block"].values()) for one in reports)
    assert reports[-1]["beyond_reach"] > 0.05
    warned = events(run, "beyond_reach")
    assert len({event["block"] for event in warned}) == len(warned) > 0
    first = warned[0]
    at = next(one for one in reports if one["step"] == first["step"])
    assert at["beyond_reach_by_block"][str(first["block"])] == pytest.approx(first["share"], abs=1e-6)
    assert f"of the scores of block {first['block']} lie beyond +-3.14, where" in capsys.readouterr().out
    assert main(["status", str(run), "--once"]) == 0
    assert f"{reports[-1]['beyond_reach']:.1%} of a block's beyond" in capsys.readouterr().out


@pytest.mark.parametrize(
    "own",
    [
        (),
        pytest.param(("train.compile=true",), marks=(pytest.mark.slow, needs_compiler)),
        pytest.param(("deepspeed.config=zero2",), marks=pytest.mark.slow),
    ],
)
def test_looking_changes_no_bit_of_training(small_recipe, tmp_path, world, own) -> None:
    ends = [
        train_to_the_end(
            small_recipe(*DROP, *own, "train.epochs=1", f"log.every_steps={every}", f"run.dir={tmp_path / str(every)}"),
            world,
        )
        for every in (1, 100)
    ]
    assert equal(*({**end, "losses": {}} for end in ends))  # the lines of the two logs cover different steps


def test_a_model_of_softmax_has_nothing_to_report(tmp_path: Path) -> None:
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text("data: {backend: synthetic, synthetic_samples: 32}\n")
    assert main(["train", str(recipe), *SMALL, f"run.dir={run}", "schedule.warmup_epochs=0"]) == 0
    assert not any("beyond_reach" in event for event in events(run, "train"))
