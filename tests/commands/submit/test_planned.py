"""`karat submit --gpu` fills in what the plan recommends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main

Capture = pytest.CaptureFixture[str]
SHAPE = ("model.depth=1", "model.image_size=64", "train.global_batch=256", "--nodes=2", "--gpus-per-node=4")


def script_of(tmp_path: Path, *arguments: str, recipe: str = "imagenet_vit_tiny_g3b") -> str:
    run = tmp_path / "run"
    places = (f"run.dir={run}", f"data.path={tmp_path}")
    assert main(["submit", recipe, *places, *arguments]) == 0
    return (run / "submit.sh").read_text()


def partitioned(tmp_path: Path) -> str:
    """A recipe that says ZeRO stage 1."""
    recipe = tmp_path / "partitioned.yaml"
    recipe.write_text("extends: imagenet_vit_tiny_g3b\ndeepspeed: {config: zero1}\n")
    return str(recipe)


def test_stage_and_micro_batch_come_from_the_plan(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, *SHAPE, "--gpu=a100-40", recipe=partitioned(tmp_path))
    assert "recommended: deepspeed.config=zero0 train.micro_batch=32" in capsys.readouterr().out
    assert script.count("train.micro_batch=32") == 1
    assert script.count("deepspeed.config=zero0") == 1  # the recipe has zero1


@pytest.mark.slow
def test_what_the_user_names_is_left_alone(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, "train.micro_batch=8", "deepspeed.config=zero2", *SHAPE, "--gpu=a100-40")
    assert "recommended: deepspeed.config=zero2 train.micro_batch=8" in capsys.readouterr().out
    assert script.count("train.micro_batch=8") == 1
    assert script.count("deepspeed.config=zero2") == 1


@pytest.mark.slow
def test_a_stage_that_the_recipe_cannot_use_is_passed_over(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, "train.precision=fp16", *SHAPE, "--gpu=v100-32", recipe=partitioned(tmp_path))
    assert script.count("train.micro_batch=32") == 1
    assert "recommended: deepspeed.config=zero1" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_would_not_fit_gets_a_smaller_batch(tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text("extends: imagenet_vit_tiny_g3b\ntrain: {eval_batch: 1024000}\n")
    script = script_of(tmp_path, *SHAPE, "--gpu=a100-40", recipe=str(recipe))
    (batch,) = set(re.findall(r"train\.eval_batch=(\d+)", script))
    assert f"train.eval_batch = 1024000 does not fit; {batch} does" in capsys.readouterr().out


def test_without_a_gpu_it_says_that_it_did_not_plan(tmp_path: Path, capsys: Capture) -> None:
    assert "train.micro_batch" not in script_of(tmp_path, *SHAPE)
    assert "not planned: " in capsys.readouterr().out


def test_an_unknown_gpu_is_refused_before_anything_is_written(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    assert main(["submit", "imagenet_vit_tiny_g3b", f"run.dir={run}", *SHAPE, "--gpu=h1000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--gpu h1000: not in the table" in line
    assert not run.exists()


def test_a_world_that_does_not_divide_the_batch_is_refused(tmp_path: Path, capsys: Capture) -> None:
    arguments = ("submit", "imagenet_vit_tiny_g3b", f"run.dir={tmp_path / 'run'}", "--nodes=3", "--gpu=a100-40")
    assert main(list(arguments)) == 2
    assert "does not divide over 12 ranks" in capsys.readouterr().err


def test_submitting_without_a_plan_does_not_import_torch() -> None:
    code = "import sys, karat_scale.commands.submit.sbatch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
