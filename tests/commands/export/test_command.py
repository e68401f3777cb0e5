"""A checkpoint of any stage becomes one file that timm loads."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import karat_scale.timm_models  # noqa: F401
from tests.conftest import karat_refuses, karat_says
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
    karat_says("export", str(run), "--format", "safetensors")
    files = {kind: run / f"step-00000003-{kind}.safetensors" for kind in ("raw", "ema")}
    with safe_open(files["ema"], "pt") as file:
        about = file.metadata()
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())  # noqa: SIM118
    assert (about["checkpoint"], about["step"], about["weights"]) == ("step-00000003", "3", "ema")
    sections = {name: json.loads(about[name]) for name in ("model", "attention")}
    for kind, path in files.items():
        model = timm.create_model("karat", **sections)
        timm.models.load_checkpoint(model, str(path), strict=True)
        if kind == "ema":
            with ema.in_place_of_weights():
                expected = weights(engine)
        else:
            expected = weights(engine)
        assert all(torch.equal(p.to(w.dtype), w) for p, w in zip(model.parameters(), expected, strict=True))
    assert {path.name for path in run.iterdir() if "safetensors" in path.name} == {p.name for p in files.values()}


def test_what_cannot_be_exported_is_one_line(small_recipe, make_run, tmp_path: Path) -> None:
    run, *_ = make_run(small_recipe())
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    raw = ("--weights", "raw", "--out")
    for arguments, said in (
        (("--out", str(tmp_path / "one.safetensors")), "add --weights raw or ema"),
        (("--out", str(tmp_path / "one.onnx")), "one.onnx is a file of another format; add --format onnx"),
        (("--checkpoint", "step-00000009"), "--checkpoint step-00000009: "),
        ((*raw, "/proc/nowhere"), "/proc/nowhere"),
        ((*raw, str(full), "--format", "timm"), f"{full} exists already; remove it or choose another --out"),
        ((*raw, ".", "--format", "timm"), ". exists already; remove it or choose another --out"),
        ((*raw, f"{full}/v1.bin"), f"use {full}/v1.safetensors, or {full}/v1.bin/ for a directory"),
    ):
        assert said in karat_refuses("export", str(run), *arguments)
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    (run / "classes.json").write_text("[1")
    assert "classes.json: not a JSON list of names" in karat_refuses("export", str(run), "--format", "torch-export")


def test_a_run_without_averages_whose_classes_were_not_recorded(small_recipe, make_run, tmp_path, monkeypatch) -> None:
    run, *_ = make_run(small_recipe(), keep_ema=False)
    assert "has no EMA weights" in karat_refuses("export", str(run), "--weights", "ema")
    (run / "classes.json").unlink()
    karat_says("export", str(run), "--format", "timm")
    config = json.loads((run / "step-00000003-raw" / "config.json").read_text())
    assert "label_names" not in config["pretrained_cfg"]
    for directory in (f"{tmp_path}/v1.bin/", f"{tmp_path}/v1.bin", f"{tmp_path}/models"):  # the second exists by then
        karat_says("export", str(run), "--out", directory)
        (file,) = Path(directory).iterdir()
        assert file.name == "step-00000003-raw.safetensors"
        file.unlink()
    karat_says("export", str(run), "--out", f"{tmp_path}/v1.safetensors")
    assert (tmp_path / "v1.safetensors").is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = karat_refuses("export", str(run), "--format", "onnx")
    assert "needs onnx, onnxscript, onnxruntime; in the clone: pip install -e '.[export]'" in line
