"""`schedule.image_sizes`: exact steps, digests and restarts, and what is carried from one size to the next."""

import json
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from karat_scale.checkpoint.restore import read_state
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.weights import fit_state
from karat_scale.engine.shards import Fragment
from karat_scale.foundation.files import file_sha256
from karat_scale.models import create_model
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.agreement import StoppedError
from karat_scale.training.trainer import Trainer
from karat_scale.training.weights_file import read_facts
from tests.conftest import SMALL, events, karat_done, karat_here, karat_refuses, summary
from tests.training.runs import assert_same_run, losses

GROWS = "schedule.image_sizes=[[0, 8], [1, 12], [2, 16]]"
QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "train.epochs=3", "attention.kind=karat", GROWS)
ALL = ("checkpoint.every_steps=3", "checkpoint.keep_last=99")
Command = Callable[..., list[str]]
SIZES = ("patch_size", "embed_dim", "depth", "num_heads")


@pytest.fixture(scope="module")
def command(shards, tmp_path_factory) -> Command:
    """Return a function that gives the arguments to train 8 steps at each of 8, 12 and 16 pixels."""
    recipe = tmp_path_factory.mktemp("recipes") / "small.yaml"
    recipe.write_text(f"data: {{path: {shards}}}\n")

    def arguments(run: Path, *overrides: str) -> list[str]:
        return ["train", str(recipe), *SMALL, *QUICK, f"run.dir={run}", *overrides]

    return arguments


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    """Return a run that was never stopped. It saves every third step, and at the end of each epoch."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert karat_here(*command(run, *ALL)) == 0
    return run


def test_a_run_grows_and_sees_the_same_samples(command, whole, tmp_path) -> None:
    constant = tmp_path / "constant"
    assert karat_here(*command(constant, "schedule.image_sizes=[]")) == 0
    found, other = summary(whole), summary(constant)
    assert (found["steps"], found["data_digest"], found["restarts"]) == (24, other["data_digest"], 0)
    assert len(losses(whole)) == 24
    assert [event["step"] for event in events(whole, "eval")] == [8, 16, 24]
    states = {name: CheckpointStore(whole / "checkpoints").state(name) for name in names(whole)}
    assert found["seconds_to_first_step"] == states["step-00000003"]["seconds_to_first_step"]  # measured once
    assert [states[f"step-{step:08d}"]["image_size"] for step in (3, 8, 9, 16, 18, 24)] == [8, 8, 12, 12, 16, 16]


def names(run: Path) -> list[str]:
    return sorted(CheckpointStore(run / "checkpoints").names())


def cut_after(whole: Path, step: int, run: Path) -> Path:
    """Return a copy of the run without the checkpoints after a step."""
    shutil.copytree(whole, run)
    for name in names(run):
        if name > f"step-{step:08d}":
            shutil.rmtree(run / "checkpoints" / name)
    return run


@pytest.mark.parametrize("stopped", [*(pytest.param(step, marks=pytest.mark.slow) for step in (3, 15)), 8, 12])
def test_a_run_that_resumes_in_any_phase_ends_in_the_same_bits(command, whole, tmp_path, stopped) -> None:
    run = cut_after(whole, stopped, tmp_path / "run")
    assert karat_here(*command(run, *ALL)) == 0
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_at_the_border_falls_back_to_the_size_before(command, whole, tmp_path) -> None:
    run = cut_after(whole, 9, tmp_path / "run")
    for name in ("step-00000009", "step-00000008"):
        (run / "checkpoints" / name / "state.json").write_text("{}")
    assert karat_here(*command(run, *ALL)) == 0
    assert_same_run(run, whole)


def test_a_stop_in_the_evaluation_at_a_border_is_evaluated_at_the_size_before(
    command, whole, tmp_path, monkeypatch
) -> None:
    run = tmp_path / "run"

    def stop(trainer: Trainer, done: int, total: int) -> None:
        trainer.signals.received = signal.SIGTERM
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_during_evaluation", stop)
        assert karat_here(*command(run, *ALL)) == 75
    assert (names(run)[-1], events(run, "eval")) == ("step-00000008", [])
    assert karat_here(*command(run, *ALL)) == 0
    found, expected = ([(one["step"], one["loss"]) for one in events(each, "eval")] for each in (run, whole))
    assert found == expected
    assert_same_run(run, whole)


def test_a_stop_in_the_last_evaluation_is_not_the_end(command, tmp_path, monkeypatch, capsys) -> None:
    def stop(trainer: Trainer, done: int, total: int) -> None:
        if trainer.state.step == 24:
            trainer.signals.received = signal.SIGTERM
            raise StoppedError

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_during_evaluation", stop)
        assert karat_here(*command(run)) == 75
    capsys.readouterr()
    assert karat_here(*command(run)) == 0
    said = capsys.readouterr().out
    assert "nothing is left to do" not in said
    assert "finished, best top-1 " in said


def test_a_teacher_of_plain_weights_has_the_last_size(command, tmp_path) -> None:
    whole = load_recipe(command(tmp_path / "run")[1], [*SMALL, *QUICK, "attention.kind=softmax"])
    torch.save(create_model(whole.model, whole.attention).state_dict(), tmp_path / "softmax.pth")
    given = (f"distill.from={tmp_path / 'softmax.pth'}", "train.max_steps=1")
    assert karat_here(*command(tmp_path / "run", *given)) == 0
    seen = read_facts(tmp_path / "run" / "distill.safetensors").preprocessing
    assert seen is not None
    assert seen.input_size[-1] == 16


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_grow_alike(command, whole, tmp_path, stage) -> None:
    run = tmp_path / "run"
    for steps in ("11", "null"):
        karat_done(*command(run, f"deepspeed.config=zero{stage}", f"train.max_steps={steps}"), processes=2)
    assert losses(run) == pytest.approx(losses(whole), rel=2e-4)
    assert summary(run)["data_digest"] == summary(whole)["data_digest"]


def test_each_checkpoint_names_the_runs_own_recipe(whole) -> None:
    recipe = file_sha256(whole / "recipe.yaml")
    store = CheckpointStore(whole / "checkpoints")
    assert {store.state(name)["recipe_sha256"] for name in store.names()} == {recipe}


def test_a_disk_of_the_node_that_fails_is_left_alone_at_the_next_size(command, tmp_path, monkeypatch, capsys) -> None:
    near, usage = tmp_path / "near", shutil.disk_usage
    full = usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if near in Path(path).parents else usage(path))
    local = ("checkpoint.every_steps=20", "checkpoint.asynchronous=false", f"checkpoint.local={near}")
    assert karat_here(*command(tmp_path / "run", *local)) == 0
    assert capsys.readouterr().out.count("this start saves nothing there any more") == 1
    assert list(near.iterdir()) == []


@pytest.mark.parametrize(("window", "traced"), [([7, 10], ["7-8", "9-10"]), ([23, 99], [])], ids=["border", "beyond"])
def test_a_profile_ends_at_a_border_and_the_next_size_goes_on_with_it(command, tmp_path, window, traced) -> None:
    """Before the fix, the second size's profiler could not start, and steps beyond the end were traced into memory."""
    assert karat_here(*command(tmp_path / "run", f"log.profile_steps={window}")) == 0
    assert [path.stem.partition("steps-")[2] for path in sorted((tmp_path / "run").glob("profile/*.txt"))] == traced


@pytest.mark.slow
def test_shared_functions_grow(command, tmp_path) -> None:
    assert karat_here(*command(tmp_path / "run", "attention.mode=universal")) == 0
    assert summary(tmp_path / "run")["steps"] == 24


def test_moments_and_averages_are_carried(whole) -> None:
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


@pytest.mark.parametrize("form", ["modular", "smooth"])
def test_moments_follow_the_gradients_when_the_images_grow(command, whole, tmp_path, form) -> None:
    """Scaling them like the weights, by the ratio of patches, made the next updates more than twice too large."""
    run = tmp_path / "run"
    assert karat_here(*command(run, *ALL, f"attention.form={form}", "attention.modes=4", "train.max_steps=8")) == 0
    small = load_recipe(run / "recipe.yaml").changed(model__image_size=8)
    large = small.changed(model__image_size=16)
    checkpoint = run / "checkpoints" / "step-00000008"
    saved = read_state(checkpoint, json.loads((checkpoint / "state.json").read_text()))
    models = [create_model(recipe.model, recipe.attention) for recipe in (small, large)]
    states = [fit_state(saved, create_model(recipe.model, recipe.attention)) for recipe in (small, large)]
    torch.manual_seed(0)
    images = torch.rand(64, 3, 4, 4)  # the same patterns at both sizes
    seen = []
    for model, state in zip(models, states, strict=True):
        for name, parameter in model.named_parameters():
            state.masters.fill([Fragment.whole(name, parameter)], parameter.data)
        pixels = functional.interpolate(images, model.patch_embed.img_size, mode="bicubic")
        functional.cross_entropy(model(pixels), torch.arange(64) % 4).backward()
        for name, parameter in model.named_parameters():
            if ".operator." in name:
                assert parameter.grad is not None
                squares = torch.empty(parameter.shape)
                state.elementwise["exp_avg_sq"].copy_into(name, squares.view(-1))
                seen.append(float(parameter.grad.square().mean() / squares.mean()) ** 0.5)
    half = len(seen) // 2
    before, after = (statistics.geometric_mean(part) for part in (seen[:half], seen[half:]))
    assert 0.6 < after / before < 1.6


def test_a_checkpoint_of_a_smaller_size_is_read_at_the_last_size(whole, tmp_path) -> None:
    out = ("--out", str(tmp_path / "weights.safetensors"))
    assert karat_here("eval", str(whole), "--checkpoint", "step-00000003") == 0
    assert karat_here("export", str(whole), "--checkpoint", "step-00000003", "--weights", "raw", *out) == 0
    picture = ("--out", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json"))
    assert karat_here("replay", str(whole), "11", *picture) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["grad_norm"] == next(e["grad_norm"] for e in events(whole, "train") if e["step"] == 11)


def test_a_step_whose_size_has_no_checkpoint_is_not_replayed_at_another(whole, tmp_path) -> None:
    run = cut_after(whole, 3, tmp_path / "run")
    assert "no checkpoint of its image size is left before it" in karat_refuses("replay", str(run), "11")


CONVIT = ("model.name=convit_tiny", "model.image_size=32", *(f"model.{key}=null" for key in SIZES))


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        ("[[0, 8], [1, 12]]", (), "ends with 12, but model.image_size = 16"),
        ("[[1, 8], [2, 16]]", (), "should begin with epoch 0"),
        ("[[0, 8], [2, 12], [1, 16]]", (), "its epochs should increase"),
        ("[[0, 8], [3, 16]]", (), "the last size begins at epoch 3, but train.epochs = 3"),
        ("[[0, 9], [1, 16]]", (), "9 is not a multiple of model.patch_size = 4"),
        ("[[0, 16], [1, 24], [2, 32]]", CONVIT, "24 is not a multiple of the patch size of convit_tiny, 16"),
    ],
)
def test_sizes_that_cannot_be_are_told_at_the_start_in_one_line(command, tmp_path, sizes, more, message) -> None:
    assert message in karat_refuses(*command(tmp_path / "run", f"schedule.image_sizes={sizes}", *more))
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or '"train"' not in log.read_text()
