"""A student, which computes nothing without its teacher, takes it along or is refused."""

from pathlib import Path

import pytest
import torch

from karat_scale.checkpoint.weights import load_weights
from karat_scale.commands.cli import main
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.distillation_teacher import build_model
from tests.conftest import SMALL, karat

QUICK = ("train.max_steps=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null", "data.backend=synthetic")


@pytest.mark.slow
def test_a_student_takes_its_teacher_along(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("{}")
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    kinds = {teacher: "attention.kind=karat", student: f"attention.transfer_from={teacher}"}
    for run, kind in kinds.items():
        done = karat("train", str(recipe), *SMALL, *QUICK, kind, f"run.dir={run}")
        assert done.returncode == 0, done.stderr
    directory = RunDirectory(student)
    name = directory.store.names()[0]
    model = build_model(directory.recipe(), student)
    load_weights(model, directory.store.root / name, directory.store.state(name), ema=True)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(images)
    options = ["export", str(student), "--checkpoint", "latest", "--weights", "ema", "--format"]
    assert main([*options, "torch-export", "--out", str(tmp_path / "own.pt2")]) == 0
    torch.testing.assert_close(torch.export.load(tmp_path / "own.pt2").module()(images), expected)
    pytest.importorskip("onnx", reason="needs the extra `export`")
    from karat_scale.commands.export.formats import onnx_session

    assert main([*options, "onnx", "--out", str(tmp_path / "own.onnx")]) == 0
    torch.testing.assert_close(onnx_session(str(tmp_path / "own.onnx"))(images), expected)
    assert main([*options, "hub-folder", "--out", str(tmp_path / "own")]) == 2
    assert "it uses its teacher's attention matrices" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()
