"""`karat plan` as a user types it, in this process."""

import json
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.plan.command import Request, make_plan
from karat_scale.foundation.console import gigabytes
from karat_scale.recipe.loading import load_recipe

Capture = pytest.CaptureFixture[str]
SMALL_VIT = ("model.depth=1", "model.image_size=64", "train.precision=bf16", "train.global_batch=256")


def plan(*arguments: str) -> int:
    return main(["plan", "imagenet_vit_tiny_g3b", *SMALL_VIT, *arguments])


def test_a_plan_for_gpus_names_stage_and_micro_batch(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    assert plan("--gpus", "8", "--gpu", "h100-80", "--curve", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "recommended: deepspeed.config=zero0 train.micro_batch=32 (1 a step)" in printed
    ours = [line for line in printed.splitlines() if "real_accelerator.py" not in line]  # DeepSpeed says its piece once
    assert all(len(line) <= 100 for line in ours)
    found = json.loads(file.read_text())
    assert found["fits"]
    assert found["choice"]["stage"] == 0
    assert {choice["config"] for choice in found["candidates"]} == {"zero0", "zero1", "zero2", "zero3"}
    assert sum(found["choice"]["peak"]["parts"].values()) + found["choice"]["margin"] == found["choice"]["needed"]
    assert [point["gpus"] for point in found["curve"]] == [2**power for power in range(11)]
    assert found["curve"][0]["efficiency"] == 1


def test_two_recipes_are_shown_side_by_side(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plans.json"
    assert plan("imagenet_vit_tiny", "--gpu", "h100-80", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    ours, theirs = json.loads(file.read_text())["plans"]
    assert (ours["recipe"], theirs["recipe"]) == ("imagenet_vit_tiny_g3b", "imagenet_vit_tiny")
    assert ours["parameters"] > theirs["parameters"]
    share = theirs["flops_per_image"]["training"] / ours["flops_per_image"]["training"]
    (row,) = [row for row in printed.splitlines() if "GFLOPs of an image, training" in row]
    assert row.endswith(f"({share:.2f})")
    (row,) = [row for row in printed.splitlines() if "memory of a rank" in row]
    assert gigabytes(ours["choice"]["needed"]) in row
    assert "time of a step" in printed
    assert plan("imagenet_vit_tiny", "--curve", "--gpu", "h100-80") == 2
    assert "--curve is of one recipe" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_that_the_recipe_cannot_use_are_told(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    fp16 = ("train.precision=fp16", "deepspeed.config=zero2", "checkpoint.url=s3://bucket/run")
    assert plan(*fp16, "--gpus", "8", "--gpu", "v100-32", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "zero0 passed over: train.precision = fp16 needs ZeRO stage 1 or higher" in printed
    assert "recommended: deepspeed.config=zero1" in printed
    found = json.loads(file.read_text())
    assert list(found["refused"]) == ["zero0"]
    assert found["checkpoint_bytes"] == 18 * found["parameters"]
    assert f"checkpoint.url: each checkpoint copies about {gigabytes(found['checkpoint_bytes'])} there" in printed


@pytest.mark.slow
def test_too_little_memory_is_told_and_is_no_success(capsys: Capture) -> None:
    assert plan("--memory", "0.5") == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measured_step_takes_the_place_of_the_estimate(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert plan("train.micro_batch=64", "--memory", "80", "--step-time", "0.64", "--json", str(file)) == 0
    found = json.loads(file.read_text())["seconds"]
    assert found["image"] == pytest.approx(0.01)
    assert found["step"] == pytest.approx(2.56)
    assert found["epoch"] == pytest.approx(2.56 * (1_281_167 // 256))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h1000"), "h100-80"),
        (("--gpu", "v100-32"), "no such matrix units"),
        (("--curve",), "--step-time"),
        (("train.precision=fp16",), "needs a GPU; name it by --gpu"),
        (("--gpus", "3"), "does not divide over 3 ranks"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, capsys: Capture) -> None:
    assert plan(*arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line


@pytest.mark.slow
def test_a_rank_gets_its_share_of_what_the_control_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karat_scale.foundation.machine.memory_limit", lambda: 10**9)
    recipe = load_recipe("imagenet_vit_tiny", ["model.depth=1", "model.image_size=64"])
    assert make_plan(recipe, Request(gpus=2)).machine.memory == 5 * 10**8
