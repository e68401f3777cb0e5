"""`schedule.image_sizes`: exact steps, digests and restarts, and what is carried from one size to the next."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karat_scale.checkpoint.restore import read_state
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.checkpoint.weights import fit_state
from karat_scale.models import create_model
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL, events, karat_done, karat_here, karat_refuses, summary

GROWS = "schedule.image_sizes=[[0, 8], [1, 12], [2, 16]]"
QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "train.epochs=3", "attention.kind=karat", GROWS)
ALL = ("checkpoint.every_steps=3", "checkpoint.keep_last=99")
Command = Callable[..., list[str]]
SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


@pytest.fixture(scope="module")
def command(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The arguments that train 8 steps at each of 8, 12 and 16 pixels."""
    recipe = tmp_path_factory.mktemp("recipes") / "small.yaml"
    recipe.write_text(f"data: {{path: {shards}}}\n")

    def arguments(run: Path, *overrides: str) -> list[str]:
        return ["train", str(recipe), *SMALL, *QUICK, f"run.dir={run}", *overrides]

    return arguments


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, with a checkpoint each third step."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert karat_here(*command(run, *ALL)) == 0
    return run


def figures(run: Path) -> dict[str, object]:
    losses = {event["step"]: event["loss"] for event in events(run, "train")}
    return {"losses": losses, **{key: summary(run)[key] for key in ("steps", "data_digest", "last_top1", "restarts")}}


def test_a_run_grows_and_sees_the_same_samples(command: Command, whole: Path, tmp_path: Path) -> None:
    constant = tmp_path / "constant"
    assert karat_here(*command(constant, "schedule.image_sizes=[]")) == 0
    found, other = figures(whole), figures(constant)
    assert (found["steps"], found["data_digest"], found["restarts"]) == (24, other["data_digest"], 0)
    assert len(found["losses"]) == 24  # type: ignore[arg-type]
    assert [event["step"] for event in events(whole, "eval")] == [8, 16, 24]
    assert (
        summary(whole)["seconds_to_first_step"]
        == CheckpointStore(whole / "checkpoints").state("step-00000003")["seconds_to_first_step"]
    )  # of the start
    sizes = {name: CheckpointStore(whole / "checkpoints").state(name)["image_size"] for name in names(whole)}
    assert [sizes[f"step-{step:08d}"] for step in (3, 8, 9, 16, 18, 24)] == [8, 8, 12, 12, 16, 16]


def names(run: Path) -> list[str]:
    return sorted(CheckpointStore(run / "checkpoints").names())


@pytest.mark.parametrize("stopped", [*(pytest.param(step, marks=pytest.mark.slow) for step in (3, 15)), 8, 12])
def test_a_run_that_resumes_in_any_phase_ends_in_the_same_bits(
    command: Command, whole: Path, tmp_path: Path, stopped: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in names(run):
        if name > f"step-{stopped:08d}":
            shutil.rmtree(run / "checkpoints" / name)
    (run / "metrics.jsonl").unlink()
    assert karat_here(*command(run, *ALL)) == 0
    last = "step-00000024/mp_rank_00_model_states.pt"
    ours, theirs = (load_tensors(each / "checkpoints" / last)["module"] for each in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert summary(run)["data_digest"] == summary(whole)["data_digest"]


@pytest.mark.slow
def test_a_damaged_checkpoint_at_the_border_falls_back_to_the_size_before(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in names(run):
        if name > "step-00000009":
            shutil.rmtree(run / "checkpoints" / name)
    for name in ("step-00000009", "step-00000008"):
        (run / "checkpoints" / name / "state.json").write_text("{}")
    assert karat_here(*command(run, *ALL)) == 0
    assert summary(run)["data_digest"] == summary(whole)["data_digest"]
    losses = {event["step"]: event["loss"] for event in events(run, "train")}
    assert losses == figures(whole)["losses"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_grow_alike(command: Command, whole: Path, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "run"
    for steps in ("11", "null"):
        own = (f"deepspeed.config=zero{stage}", f"train.max_steps={steps}")
        karat_done(*command(run, *own), processes=2)
    losses = {event["step"]: event["loss"] for event in events(run, "train")}
    expected = figures(whole)["losses"]
    assert losses == pytest.approx(expected, rel=2e-4)
    assert summary(run)["data_digest"] == summary(whole)["data_digest"]


def test_shared_functions_grow(command: Command, tmp_path: Path) -> None:
    assert karat_here(*command(tmp_path / "run", "attention.mode=universal")) == 0
    assert summary(tmp_path / "run")["steps"] == 24


def test_moments_and_averages_are_carried(whole: Path) -> None:
    recipe = load_recipe(whole / "recipe.yaml").changed(model__image_size=12)
    checkpoint = whole / "checkpoints" / "step-00000008"
    saved = read_state(checkpoint, json.loads((checkpoint / "state.json").read_text()))
    fitted = fit_state(saved, create_model(recipe.model, recipe.attention))
    name = "blocks.0.attn.operator.cos_coef"
    assert saved.shapes[name] != fitted.shapes[name]
    assert fitted.elementwise.keys() == saved.elementwise.keys()
    for pieces in (fitted.masters, fitted.ema, *fitted.elementwise.values()):
        assert pieces is not None
        for key, shape in fitted.shapes.items():
            assert pieces.covers(key, torch.Size(shape).numel())
    second = torch.empty(fitted.shapes[name])
    fitted.elementwise["exp_avg_sq"].copy_into(name, second.view(-1))
    assert float(second.min()) >= 0
    assert float(second.max()) > 0
    same = "blocks.1.mlp.fc1.weight"  # what does not depend on the tokens keeps its bits
    before, after = torch.empty(saved.shapes[same]), torch.empty(saved.shapes[same])
    for old, new in zip((saved.masters, saved.ema), (fitted.masters, fitted.ema), strict=True):
        assert old is not None
        assert new is not None
        old.copy_into(same, before.view(-1))
        new.copy_into(same, after.view(-1))
        assert torch.equal(before, after)


def test_a_checkpoint_of_a_smaller_size_is_read_at_the_last_size(whole: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "weights.safetensors"))
    assert karat_here("eval", str(whole), "--checkpoint", "step-00000003") == 0
    assert karat_here("export", str(whole), "--checkpoint", "step-00000003", "--weights", "raw", *out) == 0
    picture = ("--out", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json"))
    assert karat_here("replay", str(whole), "11", *picture) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["grad_norm"] == next(e["grad_norm"] for e in events(whole, "train") if e["step"] == 11)


def test_a_step_whose_size_has_no_checkpoint_is_not_replayed_at_another(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in names(run):
        if name > "step-00000003":
            shutil.rmtree(run / "checkpoints" / name)
    assert "no checkpoint with the same image size before it is left" in karat_refuses("replay", str(run), "11")


CONVIT = ("model.name=convit_tiny", "model.image_size=32", *(f"model.{key}=null" for key in SIZES))


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        ("[[0, 8], [1, 12]]", (), "ends with 12, but model.image_size = 16"),
        ("[[1, 8], [2, 16]]", (), "should begin with epoch 0"),
        ("[[0, 8], [2, 12], [1, 16]]", (), "its epochs should increase"),
        ("[[0, 8], [3, 16]]", (), "its last epoch is 3, but train.epochs = 3"),
        ("[[0, 9], [1, 16]]", (), "9 is not a multiple of model.patch_size = 4"),
        ("[[0, 16], [1, 24], [2, 32]]", CONVIT, "24 is not a multiple of the patch size of convit_tiny, 16"),
    ],
)
def test_sizes_that_cannot_be_are_told_at_the_start_in_one_line(
    command: Command, tmp_path: Path, sizes: str, more: tuple[str, ...], message: str
) -> None:
    assert message in karat_refuses(*command(tmp_path / "run", f"schedule.image_sizes={sizes}", *more))
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or '"train"' not in log.read_text()
