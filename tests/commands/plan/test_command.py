"""`karat plan` as a user types it, in this process."""

import json
import re
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.plan.command import Request, dry_run, make_plan
from karat_scale.foundation.console import gigabytes
from karat_scale.foundation.errors import UserError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from tests.conftest import karat_refuses

Capture = pytest.CaptureFixture[str]
SMALL_VIT = ("model.depth=1", "model.image_size=64", "train.precision=bf16", "train.global_batch=256")


def plan(*arguments: str) -> int:
    return main(["plan", "imagenet_vit_tiny_g3b", *SMALL_VIT, *arguments])


def test_a_plan_for_gpus_names_stage_and_micro_batch(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    assert plan("--gpus", "8", "--gpu", "h100-80", "--curve", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    assert "recommended: deepspeed.config=zero0 train.micro_batch=32 (1 a step)" in printed
    ours = [line for line in printed.splitlines() if "real_accelerator.py" not in line]  # DeepSpeed prints it once
    assert all(len(line) <= 100 for line in ours)
    found = json.loads(file.read_text())
    assert found["fits"]
    assert found["choice"]["stage"] == 0
    assert {choice["config"] for choice in found["candidates"]} == {"zero0", "zero1", "zero2", "zero3"}
    assert sum(found["choice"]["peak"]["parts"].values()) + found["choice"]["margin"] == found["choice"]["needed"]
    assert [point["gpus"] for point in found["curve"]] == [2**power for power in range(11)]
    assert found["curve"][0]["efficiency"] == 1


@pytest.mark.slow
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
    assert printed.count(": recommended: deepspeed.config=zero0 train.micro_batch=") == 2
    assert plan("imagenet_vit_tiny", "--curve", "--gpu", "h100-80") == 2
    assert "--curve takes one recipe" in capsys.readouterr().err
    assert plan("imagenet_vit_tiny", "--step-time", "0.1", "--memory", "40") == 2
    assert "--step-time is of one recipe" in capsys.readouterr().err


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


def test_a_card_older_than_ampere_has_no_triton_kernels(capsys: Capture) -> None:
    v100 = ("train.precision=fp32", "--gpu", "v100-32")
    assert plan(*v100, "attention.kind=karat", "attention.implementation=triton") == 2
    assert "attention.implementation = triton: v100-32 is older than Ampere" in capsys.readouterr().err
    assert plan(*v100, "attention.kind=karat") == 0
    assert "v100-32 is older than Ampere and cannot run the Triton kernels" in capsys.readouterr().out
    for kind in ("softmax", "static"):
        assert plan(*v100, f"attention.kind={kind}") == 0
        assert "Triton" not in capsys.readouterr().out


def test_too_few_images_for_one_batch_are_refused(capsys: Capture) -> None:
    assert plan("data.backend=synthetic", "data.synthetic_samples=40", "train.global_batch=64") == 2
    assert "an epoch has 40 samples, fewer than train.global_batch = 64;" in capsys.readouterr().err


def test_a_gpu_and_a_run_on_a_cpu_exclude_each_other() -> None:
    line = karat_refuses("plan", "imagenet_vit_tiny_g3b", "run.device=cpu", "--gpu", "h100")
    assert "--gpu h100-80 has no effect with run.device = cpu; remove one of them" in line


@pytest.mark.slow
def test_too_little_memory_is_told_and_is_no_success(capsys: Capture) -> None:
    assert plan("--memory", "0.5") == 1
    assert re.search(r"nothing fits into \S+ [GM]B; the least is \S+ GB, with deepspeed", capsys.readouterr().out)


@pytest.mark.slow
def test_a_measured_step_takes_the_place_of_the_estimate(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "plan.json"
    measured = ("train.micro_batch=64", "train.max_steps=100", "--memory", "80", "--step-time", "0.64")
    assert plan(*measured, "--json", str(file)) == 0
    assert " for 100 steps, without evaluations" in capsys.readouterr().out
    found = json.loads(file.read_text())["seconds"]
    assert found["image"] == pytest.approx(0.01)
    assert found["step"] == pytest.approx(2.56)
    assert found["training"] == pytest.approx(100 * 2.56)
    assert found["epoch"] == pytest.approx(2.56 * (1_281_167 // 256))


@pytest.mark.slow
def test_the_time_is_that_of_the_recomputation_that_the_plan_needs() -> None:
    recipe = load_recipe("imagenet_vit_tiny_g3b", [*SMALL_VIT, "train.micro_batch=256", "deepspeed.config=zero0"])
    wide = make_plan(recipe, Request(gpu="h100-80"))
    tight = make_plan(recipe, Request(gpu="h100-80", memory=wide.choice.needed / 1e9 - 0.01))
    assert (wide.choice.recompute, tight.choice.recompute) == ("none", "attention")
    assert tight.time is not None
    assert wide.time is not None
    assert tight.time.image > wide.time.image


@pytest.mark.slow
def test_a_rank_gets_its_share_of_what_the_control_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karat_scale.foundation.machine.memory_limit", lambda: 10**9)
    recipe = load_recipe("imagenet_vit_tiny", ["model.depth=1", "model.image_size=64"])
    assert make_plan(recipe, Request(gpus=2)).machine.memory == 5 * 10**8
    assert make_plan(recipe, Request(gpus=4, gpus_per_node=2)).machine.memory == 5 * 10**8


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


def changed(recipe: Recipe, section: str, **fields: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=fields)})


def test_a_right_recipe_is_right_on_four_ranks(recipe: Recipe) -> None:
    lines = list(dry_run(recipe, 4))
    assert "64 training and 28 validation images" in "\n".join(lines)
    assert "16 steps of 8 = 4 ranks x 1 x 2" in "\n".join(lines)
    assert "4 logits" in lines[-1]


def test_classes_that_are_never_seen_are_told(recipe: Recipe) -> None:
    lines = list(dry_run(changed(recipe, "model", num_classes=5), 1))
    assert "classes: the data has 4 classes, but model.num_classes = 5" in "\n".join(lines)


@pytest.mark.parametrize(
    ("section", "fields", "world", "message"),
    [
        ("train", {}, 3, "does not divide over 3 ranks"),
        ("train", {}, 8, "in even parts"),
        ("train", {"micro_batch": 6}, 1, "set train.micro_batch=4"),
        ("train", {"global_batch": 128}, 4, "fewer than train.global_batch"),
        ("model", {"num_classes": 2}, 1, "train with model.num_classes=4"),
        ("deepspeed", {"config": "zero7"}, 1, "no such file; use one of zero"),
        ("data", {"train_split": "test"}, 1, "no samples of split 'test'"),
        ("model", {"name": "vit_tinny"}, 1, "timm has no such model"),
        ("attention", {"transfer_from": "run"}, 1, "the teacher is not checked; add attention.transfer_from="),
    ],
)
def test_mistakes_are_found(recipe: Recipe, section: str, fields: dict[str, object], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(dry_run(changed(recipe, section, **fields), world))
