"""Attention transfer from end to end: a short teacher, students of it, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from karat_scale.commands.cli import main
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models.transfer import Teacher
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.distillation_teacher import TEACHER_FILE as FILE
from karat_scale.training.tasks.classification.distillation_teacher import keep_teacher
from karat_scale.training.weights_file import read_exported
from tests.conftest import karat_done, karat_refuses, karat_says, summary
from tests.small_engines import make_trainer, weights
from tests.training.runs import losses


@pytest.fixture(scope="module")
def teacher(command, recipe) -> Path:
    """Return a KArAt run of 8 steps."""
    run = recipe.parent / "teacher"
    karat_says(*command(run, "attention.kind=karat"))
    return run


@pytest.fixture(scope="module")
def student_command(command, teacher) -> Callable[..., list[str]]:
    """Return a function that gives the arguments of `karat` to train a student."""
    return lambda run, *overrides: command(run, f"attention.transfer_from={teacher}", *overrides)


@pytest.fixture(scope="module")
def stopped(student_command, tmp_path_factory) -> Path:
    """Return a student's run after 3 of its 8 steps; tests copy it before they change it."""
    run = tmp_path_factory.mktemp("students") / "stopped"
    karat_says(*student_command(run, "train.max_steps=3"))
    return run


def test_a_student_trains_stops_resumes_and_is_evaluated_without_the_teachers_run(
    teacher, stopped, student_command, tmp_path
) -> None:
    whole, parts, gone = tmp_path / "whole", tmp_path / "parts", tmp_path / "gone"
    karat_says(*student_command(whole))
    shutil.copytree(stopped, parts)
    teacher.rename(gone)  # the run keeps all it needs
    try:
        karat_says(*student_command(parts))
        karat_says("eval", str(parts), "--json", str(tmp_path / "eval.json"))
        assert main(["export", str(parts), "--weights", "raw", "--checkpoint", "latest", "--out", str(tmp_path)]) == 0
    finally:
        gone.rename(teacher)
    assert losses(parts) == losses(whole)
    assert losses(whole)[1] != losses(whole)[8]
    assert summary(whole)["parameters"] < summary(teacher)["parameters"]
    assert json.loads((tmp_path / "eval.json").read_text())["top1"] == summary(parts)["best_top1"]
    digest = Teacher(read_exported(parts / FILE)).digest
    for run in (parts, whole):
        assert json.loads((run / "checkpoints/step-00000008/state.json").read_text())["teacher"] == digest
    with safe_open(tmp_path / "step-00000008-raw.safetensors", "pt") as file:
        assert file.metadata()["teacher"] == digest
        assert not any("qkv" in name or "operator" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_a_larger_student_trains_and_is_evaluated(student_command, tmp_path) -> None:
    run = tmp_path / "larger"
    larger = ("model.embed_dim=64", "model.num_heads=4")
    assert "use attention.transfer_heads=repeat, cycle or interpolate" in karat_refuses(*student_command(run, *larger))
    karat_says(*student_command(run, *larger, "attention.transfer_heads=interpolate"))
    assert losses(run)[1] != losses(run)[8]
    assert main(["eval", str(run), "--json", str(tmp_path / "eval.json")]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["top1"] == summary(run)["best_top1"]
    assert main(["analyze", str(run), "--only", "spectrum", "--images", "2"]) == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_stage_and_world_gives_the_same_losses(student_command, tmp_path) -> None:
    alone, ranks, bf16 = tmp_path / "alone", tmp_path / "ranks", tmp_path / "bf16"
    own = "deepspeed.config=zero3"
    karat_says(*student_command(alone))
    for steps in ("4", "null"):  # stopped and resumed
        karat_done(*student_command(ranks, own, f"train.max_steps={steps}"), processes=2)
    assert losses(ranks) == pytest.approx(losses(alone), rel=1e-5)
    karat_says(*student_command(bf16, own, "train.precision=bf16"))
    assert losses(bf16) == pytest.approx(losses(alone), rel=0.05)
    karat_says("eval", str(bf16))


@pytest.mark.slow
def test_another_teacher_is_noticed_whoever_reads_the_checkpoint(stopped, student_command, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    with safe_open(run / FILE, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["blocks.0.attn.operator.proj"][0, 0, 0] += 1
    save_file(tensors, run / FILE, about)
    with pytest.raises(RunDirectoryError, match="its weights are not those that were written"):
        read_exported(run / FILE)
    del about["weights_sha256"]
    save_file(tensors, run / FILE, about)
    for error in (karat_refuses(*student_command(run)), karat_refuses("eval", str(run))):
        assert "it was trained with the teacher with digest" in error
        assert error.startswith("error: checkpoint ")
    (run / FILE).unlink()
    assert f"{run / FILE} is missing" in karat_refuses("eval", str(run))
    karat_says(*student_command(run))


def test_what_cannot_be_transferred_is_one_line(stopped, student_command, tmp_path) -> None:
    cases = {
        "attention.transfer_from=nowhere": "attention.transfer_from = nowhere: nowhere: there is no such directory",
        f"attention.transfer_from={stopped}": "it has its matrices from",
        "attention.kind=karat": "use attention.kind=softmax or remove transfer_from",
        "model.depth=3": "its depth is 2, this model's is 3; they must be the same",
        "model.image_size=20": "its image size is 16x16, this model's is 20x20",
        "augment.mean=[0.5, 0.5, 0.5]": "it was trained with augment.mean = [0.485, 0.456, 0.406]",
    }
    for override, message in cases.items():
        assert message in karat_refuses(*student_command(tmp_path / "run", override))


def test_a_run_that_has_not_begun_takes_its_teacher_anew(stopped, tmp_path) -> None:
    """A run that has not begun with its recipe copies the teacher again: a refused start may have left another."""
    recipe = load_recipe(stopped / "recipe.yaml")
    for began_with in (None, recipe.changed(optim__lr=1.0)):
        if began_with is not None:
            RunDirectory(tmp_path).begin(began_with)
        (tmp_path / FILE).write_bytes(b"of another attempt")
        keep_teacher(recipe, tmp_path)
        assert Teacher(read_exported(tmp_path / FILE)).digest == Teacher(read_exported(stopped / FILE)).digest
    RunDirectory(tmp_path).begin(recipe)
    (tmp_path / FILE).write_bytes(b"which the run began with")
    keep_teacher(recipe, tmp_path)
    assert (tmp_path / FILE).read_bytes() == b"which the run began with"


def test_a_file_that_is_no_export_is_one_line(tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(RunDirectoryError, match="not a whole file of karat export: it does not say what its model is"):
        read_exported(tmp_path / FILE)


def test_copying_the_teacher_does_not_change_the_initial_weights(student_command, world, tmp_path) -> None:
    _, path, *overrides = student_command(tmp_path / "run", "data.workers=0")
    student = load_recipe(path, overrides)
    first = make_trainer(student, world)
    RunDirectory(student.run.dir).begin(student, first.task.classes)
    second = make_trainer(student, world)  # the teacher is there already
    assert all(map(torch.equal, weights(first.engine), weights(second.engine)))
    first.task.close()
    second.task.close()
