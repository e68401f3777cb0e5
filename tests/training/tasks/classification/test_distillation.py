"""Distillation: the losses against their equations in float64, and students from end to end."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.flops import flops_per_image, forward_flops
from karat_scale.models.transfer import weights_digest
from karat_scale.recipe.loading import load_recipe
from karat_scale.recipe.train import DistillConfig
from karat_scale.training.tasks.classification.distillation_teacher import (
    FILE,
    Distillation,
    DistillationTeacher,
    distillation_loss,
    keep_distillation_teacher,
    read_distillation_teacher,
    use_distillation_token,
)
from karat_scale.training.weights_file import read_exported
from tests.conftest import SMALL, events, karat_done, karat_here, karat_refuses, summary
from tests.training.test_initial_weights import put_into_cache

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def teacher(command, recipe) -> Path:
    """Return a softmax run of 8 steps, at a larger image size and with another normalisation."""
    run = recipe.parent / "teacher"
    assert karat_here(*command(run, "model.image_size=20", "augment.mean=[0.5, 0.5, 0.5]")) == 0
    return run


@pytest.fixture(scope="module")
def student(command, teacher) -> Command:
    """Return a function that gives the arguments of `karat` to train a KArAt student."""
    return lambda run, *overrides: command(run, "attention.kind=karat", f"distill.from={teacher}", *overrides)


def losses(run: Path) -> list[tuple[float, float, float]]:
    return [(event["loss"], event["label_loss"], event["teacher_loss"]) for event in events(run, "train")]


def test_the_losses_are_those_of_the_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    s, t = student.numpy(), teacher.numpy()
    temperature = 2.5
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True) for x in (t, s))
    soft = distillation_loss(student, teacher, DistillConfig(temperature=temperature))
    assert float(soft) == pytest.approx(temperature**2 * (p * np.log(p / q)).sum(1).mean(), rel=1e-12)
    hard = distillation_loss(student, teacher, DistillConfig(kind="hard"))
    log_q = s - np.log(np.exp(s).sum(1, keepdims=True))
    assert float(hard) == pytest.approx(-log_q[np.arange(5), t.argmax(1)].mean(), rel=1e-12)
    assert float(distillation_loss(teacher, teacher, DistillConfig())) == pytest.approx(0, abs=1e-12)


class Recorder(nn.Module):
    """A teacher that keeps the images that it gets. Its logits are the means of their channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images.mean((2, 3))


def test_the_teacher_sees_the_students_pixels_as_it_was_trained() -> None:
    network = Recorder()
    teacher = DistillationTeacher(network, 16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "")
    recipe = load_recipe("cifar10_vit_tiny", ["data.path=x", "distill.from=y", "distill.weight=0.25"])
    distillation = Distillation(recipe, teacher, torch.device("cpu"))
    pixels = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
    logits = torch.randn(2, 3)
    found = distillation.losses(
        (logits, 2 * logits), (pixels - mean) / std, torch.eye(3)[:2], lambda output, targets: output.sum()
    )
    their_mean, their_std = (torch.tensor(x).view(1, 3, 1, 1) for x in (teacher.mean, teacher.std))
    assert torch.allclose(network.seen, (pixels - their_mean) / their_std, atol=1e-5)
    # The class token learns from the labels, the distillation token from the teacher.
    of_teacher = distillation_loss(2 * logits, network.seen.mean((2, 3)), recipe.distill)
    assert torch.equal(found["label_loss"], logits.sum())
    assert torch.allclose(found["teacher_loss"], of_teacher)
    assert torch.allclose(found["loss"], 0.75 * logits.sum() + 0.25 * of_teacher)
    distillation.losses(logits, torch.zeros(2, 3, 32, 32), torch.eye(3)[:2], lambda output, targets: output.sum())
    assert network.seen.shape == (2, 3, 16, 16)


def test_a_student_stops_resumes_and_is_evaluated_without_its_teachers_run(teacher, student, tmp_path, capsys) -> None:
    whole, parts, gone = tmp_path / "whole", tmp_path / "parts", tmp_path / "gone"
    assert karat_here(*student(whole)) == 0
    assert "parameters): its forward pass adds" in capsys.readouterr().out
    assert karat_here(*student(parts, "train.max_steps=3")) == 0
    teacher.rename(gone)
    try:
        assert karat_here(*student(parts, "train.max_steps=null", "resume.allow=[train.max_steps]")) == 0
        assert karat_here("eval", str(parts), "--json", str(tmp_path / "eval.json")) == 0
        taken = tmp_path / "taken.json"
        assert karat_here("replay", str(parts), "6", "--out", str(tmp_path / "6.png"), "--json", str(taken)) == 0
    finally:
        gone.rename(teacher)
    assert losses(parts) == losses(whole)
    assert json.loads(taken.read_text())["label_loss"] == pytest.approx(losses(parts)[5][1], rel=1e-6)
    assert all(loss == pytest.approx((label + soft) / 2, rel=1e-5) for loss, label, soft in losses(whole))
    assert json.loads((tmp_path / "eval.json").read_text())["top1"] == summary(parts)["best_top1"]
    assert summary(whole)["lineage"]["distill.from"]["name"] == "small"
    with safe_open(whole / FILE, "pt") as file:
        digest = file.metadata()["weights_sha256"]
    assert json.loads((whole / "checkpoints/step-00000008/state.json").read_text())["distilled_from"] == digest


def test_the_student_follows_its_teacher(student, tmp_path) -> None:
    """With all weight on the teacher, the divergence falls."""
    assert karat_here(*student(tmp_path / "run", "distill.weight=1", "train.epochs=4", "optim.lr=0.02")) == 0
    divergence = [soft for _, _, soft in losses(tmp_path / "run")]
    assert np.mean(divergence[-8:]) < 0.5 * np.mean(divergence[:8])


def test_a_distillation_token_learns_from_the_teacher(student, tmp_path) -> None:
    run = tmp_path / "run"
    token = ("model.name=deit_tiny_distilled_patch16_224", "distill.kind=hard")
    assert karat_here(*student(run, *token)) == 0
    assert all(math.isfinite(loss) for event in losses(run) for loss in event)
    assert karat_here("eval", str(run)) == 0
    assert use_distillation_token(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24))
    assert not use_distillation_token(timm.create_model("test_vit"))


def test_an_exported_file_and_a_timm_model_are_teachers(recipe, teacher, tmp_path, monkeypatch) -> None:
    assert karat_here("export", str(teacher), "--out", str(tmp_path / "exported")) == 0
    exported = next((tmp_path / "exported").rglob("*.safetensors"))
    own = load_recipe(recipe, [*SMALL, "schedule.warmup_epochs=0", f"distill.from={exported}"])
    keep_distillation_teacher(own, tmp_path)
    read = read_distillation_teacher(own, [], tmp_path)
    assert (read.image_size, read.mean) == (20, (0.5, 0.5, 0.5))
    snapshot = tmp_path / "step-00000001.safetensors"  # it has no digest
    with safe_open(exported, "pt") as file:
        facts = {name: text for name, text in file.metadata().items() if name != "weights_sha256"}
    save_file(load_file(exported), snapshot, facts)
    keep_distillation_teacher(own.changed(distill__from_=str(snapshot)), tmp_path)
    assert read_distillation_teacher(own, [], tmp_path).digest == read.digest
    kept = put_into_cache(tmp_path / "hub", "test_vit.r160_in1k", monkeypatch)
    of_timm = own.changed(distill__from_="timm:test_vit.r160_in1k", model__num_classes=1000)
    keep_distillation_teacher(of_timm, tmp_path)
    read = read_distillation_teacher(of_timm, [], tmp_path)
    assert read.digest == weights_digest(kept)
    assert read.image_size == kept.pretrained_cfg["input_size"][-1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_stage_and_world_gives_the_same_losses(student, tmp_path) -> None:
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    karat_done(*student(alone))
    for steps in ("4", "null"):  # stopped and resumed
        own = ("deepspeed.config=zero3", f"train.max_steps={steps}")
        karat_done(*student(ranks, *own), processes=2)
    assert np.allclose(losses(ranks), losses(alone), rtol=1e-4)


def test_another_teacher_is_noticed_on_resuming(student, tmp_path) -> None:
    run = tmp_path / "run"
    assert karat_here(*student(run, "train.max_steps=2")) == 0
    on = student(run)
    whole = (run / FILE).read_bytes()
    with safe_open(run / FILE, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["head.bias"][0] += 1
    save_file(tensors, run / FILE, about)
    assert "its weights are not those that were written" in karat_refuses(*on)
    (run / FILE).write_bytes(whole[:100])
    assert f"{run / FILE}: not a whole file of karat export" in karat_refuses(*on)
    del about["weights_sha256"]
    save_file(tensors, run / FILE, about)
    save_file(tensors, run / FILE, {**about, "weights_sha256": weights_digest(read_exported(run / FILE))})
    assert "learned from another teacher" in karat_refuses(*on)
    (run / FILE).write_bytes(whole)
    assert karat_here(*on) == 0


def test_a_branch_of_a_run_without_a_teacher_learns_from_none(student, teacher, tmp_path) -> None:
    assert karat_here(*student(tmp_path / "trunk", "train.max_steps=1", "distill.from=")) == 0
    branch = (f"resume.from={tmp_path / 'trunk'}", "resume.allow=[distill, train.max_steps]", "train.max_steps=2")
    error = karat_refuses(*student(tmp_path / "branch", *branch, f"distill.from={teacher}"))
    assert "learned from no teacher; remove distill.from" in error


def test_what_nobody_can_learn_from_is_one_line(student, tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"hello")
    about = {
        "model": '{"name": "vit_tiny_patch16_224"}',
        "attention": '{"transfer_from": "run"}',
        "preprocessing": '{"input_size": [3, 16, 16], "mean": [0, 0, 0], "std": [1, 1, 1]}',
        "karat_scale": "0.2.0",
    }
    save_file({"x": torch.zeros(1)}, tmp_path / "student.safetensors", about)
    cases = {
        "distill.from=nowhere": "distill.from = nowhere: neither a run's directory",
        f"distill.from={tmp_path / 'weights.safetensors'}": "the weights lack ",
        f"distill.from={tmp_path / 'damaged.safetensors'}": "not a file of weights that is safe to read: ",
        f"distill.from={tmp_path / 'student.safetensors'}": "its attention comes from a teacher of its own",
        "distill.from=timm:vit_tiny_patch16_225": "timm has no weights of that name",
        "model.num_classes=5": "has 4 classes, but model.num_classes = 5",
        "distill.weight=0": "distill.weight",
        "distill.temperature=0": "distill.temperature",
        "distill.kind=medium": "distill.kind",
    }
    for override, message in cases.items():
        assert message in karat_refuses(*student(tmp_path / "run", override))


def test_other_classes_are_named(student, tmp_path) -> None:
    _, path, *overrides = student(tmp_path / "run")
    recipe = load_recipe(path, overrides)
    keep_distillation_teacher(recipe, tmp_path)
    with pytest.raises(RecipeError, match=r"its class 0 is .* but this data's is 'zebra'"):
        read_distillation_teacher(recipe, ["zebra", "a", "b", "c"], tmp_path)


def test_the_cost_of_a_teacher_is_its_forward_pass() -> None:
    recipe = load_recipe("cifar10_vit_tiny", ["data.path=x"])
    network = create_model(recipe.model, recipe.attention)
    assert forward_flops(network, recipe.model.image_size) == flops_per_image(recipe.model, recipe.attention).forward
