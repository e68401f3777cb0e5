"""A checkpoint of any stage becomes one file that timm loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models import load_checkpoint

from karat_scale.cli import main
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe_io import dump_recipe
from karat_scale.train.checkpoint import Checkpoints
from karat_scale.train.ema import Ema
from karat_scale.train.progress import PlainDisplay, Reporter
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.state import TrainState
from tests.train.conftest import train_once, weights


@pytest.fixture
def make_run(world, make_engine):
    """A run directory with one checkpoint, as training leaves it, and the parts it came from."""

    def make(recipe, keep_ema: bool = True):
        directory = RunDirectory(recipe.run.dir)
        directory.store.root.mkdir(parents=True)
        directory.recipe_file.write_text(dump_recipe(recipe))
        engine = make_engine(recipe)
        ema = Ema(engine.deepspeed, recipe.train)
        for step in (1, 2, 3):
            train_once(engine, step)
            ema.update(step)
        reporter = Reporter(PlainDisplay(), None)
        checkpoints = Checkpoints(directory.store, engine, ema if keep_ema else None, world, recipe, reporter)
        assert checkpoints.save(TrainState(step=3, samples=24))
        return directory.path, engine, ema

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        ("deepspeed.config=zero0",),
        ("deepspeed.config=zero2", "train.precision=bf16"),
        ("deepspeed.config=zero3", "attention.mode=universal", "attention.residual=true"),
    ],
    ids=["zero0", "zero2-bf16", "zero3-universal-residual"],
)
def test_timm_loads_the_weights_raw_and_averaged(small_recipe, make_run, overrides: tuple[str, ...]) -> None:
    run, engine, ema = make_run(small_recipe(*overrides))
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    files = {kind: run / f"step-00000003-{kind}.safetensors" for kind in ("raw", "ema")}
    with safe_open(files["ema"], "pt") as file:
        about = file.metadata()
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())  # noqa: SIM118
    assert (about["checkpoint"], about["step"], about["weights"]) == ("step-00000003", "3", "ema")
    sections = ModelConfig(**json.loads(about["model"])), AttentionConfig(**json.loads(about["attention"]))
    for kind, path in files.items():
        model = create_model(*sections)
        load_checkpoint(model, str(path), strict=True)
        if kind == "ema":
            with ema.in_place_of_weights():
                expected = weights(engine)
        else:
            expected = weights(engine)
        assert all(torch.equal(p.to(w.dtype), w) for p, w in zip(model.parameters(), expected, strict=True))
    assert {path.name for path in run.iterdir() if "safetensors" in path.name} == {p.name for p in files.values()}


def test_what_cannot_be_exported_is_one_line(small_recipe, make_run, tmp_path: Path, capsys) -> None:
    run, *_ = make_run(small_recipe(), keep_ema=False)
    assert main(["export", str(run), "--weights", "ema"]) == 2
    assert "has no EMA weights" in capsys.readouterr().err
    assert main(["export", str(run)]) == 0
    assert (run / "step-00000003-raw.safetensors").is_file()
    assert not (run / "step-00000003-ema.safetensors").exists()
    own = tmp_path / "own.safetensors"
    assert main(["export", str(run), "--weights", "raw", "--out", str(own)]) == 0
    assert own.is_file()
    assert main(["export", str(run), "--checkpoint", "step-00000009"]) == 2
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert main(["export", str(run), "--out", "/proc/nowhere"]) == 2
    errors = capsys.readouterr().err
    assert "no checkpoint 'step-00000009'" in errors
    assert "not a run directory" in errors
    assert "/proc/nowhere" in errors
    assert "Traceback" not in errors


def test_two_kinds_do_not_go_into_one_file(small_recipe, make_run, tmp_path: Path, capsys) -> None:
    run, *_ = make_run(small_recipe())
    assert main(["export", str(run), "--out", str(tmp_path / "one.safetensors")]) == 2
    assert "add --weights raw or ema" in capsys.readouterr().err
