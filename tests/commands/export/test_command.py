"""A checkpoint of any stage becomes one file that timm loads."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models import load_checkpoint

from karat_scale.commands.cli import main
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.small_engines import weights


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
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--format", "timm", "--weights", "raw", "--out", str(full)]) == 2
    (run / "classes.json").write_text("[1")
    assert main(["export", str(run), "--format", "torch-export"]) == 2
    errors = capsys.readouterr().err
    assert f"{full} exists already; remove it or choose another --out" in errors
    assert (full / "notes.txt").read_text() == "mine"
    assert "classes.json: not a JSON list of names" in errors
    assert "no checkpoint 'step-00000009'" in errors
    assert "not a run directory" in errors
    assert "/proc/nowhere" in errors
    assert "Traceback" not in errors


def test_two_kinds_do_not_go_into_one_file(small_recipe, make_run, tmp_path: Path, capsys) -> None:
    run, *_ = make_run(small_recipe())
    assert main(["export", str(run), "--out", str(tmp_path / "one.safetensors")]) == 2
    assert "add --weights raw or ema" in capsys.readouterr().err


def test_a_file_of_another_suffix_is_no_directory(make_run, small_recipe, tmp_path, capsys) -> None:
    run, *_ = make_run(small_recipe(), keep_ema=False)
    path, meant = tmp_path / "v1.bin", "v1.safetensors"
    arguments = ["export", str(run), "--out"]
    assert main([*arguments, str(path)]) == 2
    assert f"use {tmp_path / meant}, or {path}/ for a directory" in capsys.readouterr().err
    assert not path.exists()
    for directory in (f"{path}/", str(path), str(tmp_path / "models")):  # the second is there by then
        assert main([*arguments, directory]) == 0
        (file,) = Path(directory).iterdir()
        assert file.name == f"step-00000003-raw{Path(meant).suffix}"
        file.unlink()
    assert main([*arguments, str(tmp_path / meant)]) == 0
    assert (tmp_path / meant).is_file()


def test_a_run_whose_classes_were_not_recorded(small_recipe, make_run, monkeypatch, capsys) -> None:
    run, *_ = make_run(small_recipe(), keep_ema=False)
    (run / "classes.json").unlink()
    assert main(["export", str(run), "--format", "timm"]) == 0
    config = json.loads((run / "step-00000003-raw" / "config.json").read_text())
    assert "label_names" not in config["pretrained_cfg"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert "needs onnx, onnxscript, onnxruntime; in the clone: pip install -e '.[export]'" in capsys.readouterr().err
