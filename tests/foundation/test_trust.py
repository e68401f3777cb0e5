"""Looking at a run never runs the code that its recipe names, unless the user trusts it."""

import os
import sys
from pathlib import Path

import pytest

from karat_scale.foundation.tables import VARIABLE
from tests.conftest import SMALL, karat_here

BASIS = """
from pathlib import Path
import karat_scale.attention.bases.fourier as fourier

Path(__file__).with_name("it_ran").touch()


class Foreign(fourier.Fourier):
    pass
"""


@pytest.fixture
def foreign_run(tmp_path, monkeypatch, capsys) -> Path:
    """A run whose basis is a class of a module beside it, as if it had been downloaded: the module is not loaded."""
    (tmp_path / "foreign_basis.py").write_text(BASIS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    sys.modules.pop("foreign_basis", None)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: {backend: synthetic, synthetic_samples: 16}\n"
        "attention: {kind: karat, basis: foreign_basis:Foreign}\nschedule: {warmup_epochs: 0}\n"
    )
    run = tmp_path / "run"
    assert karat_here("train", str(recipe), *SMALL, f"run.dir={run}", "train.max_steps=1") == 0
    forget(tmp_path)
    capsys.readouterr()
    return run


def forget(folder: Path) -> None:
    sys.modules.pop("foreign_basis", None)
    (folder / "it_ran").unlink()


LOOKS = [
    ("eval",),
    ("export",),
    ("analyze", "--only", "maps"),
    ("predict", "photo.jpg"),
    ("train", "init_from"),
    ("train", "attention.transfer_from"),
    ("plan", "distill.from"),
]


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_a_class_that_a_run_names_needs_trust(command, foreign_run, capsys) -> None:
    name, *more = command
    if name in ("train", "plan"):
        recipe = foreign_run.parent / "plain.yaml"
        recipe.write_text("data: {backend: synthetic, synthetic_samples: 16}\nschedule: {warmup_epochs: 0}\n")
        arguments = [name, str(recipe), *SMALL, f"{more[0]}={foreign_run}", f"run.dir={foreign_run.parent / 'other'}"]
    else:
        arguments = [name, str(foreign_run), *more]
    assert karat_here(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{foreign_run}/recipe.yaml: attention.basis = foreign_basis:Foreign runs the code" in line
    assert "add --trust or set KARAT_TRUST=1" in line
    assert not (foreign_run.parent / "it_ran").exists()


@pytest.mark.parametrize("by", ["option", "variable"])
def test_with_trust_it_runs(by, foreign_run, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, VARIABLE, "1" if by == "variable" else "")
    assert karat_here("eval", str(foreign_run), *(["--trust"] if by == "option" else [])) == 0
    assert (foreign_run.parent / "it_ran").exists()


def test_an_exported_folder_needs_trust_too(foreign_run, monkeypatch, capsys) -> None:
    import timm

    import karat_scale.timm_models  # noqa: F401

    folder = foreign_run.parent / "folder"
    monkeypatch.setenv(VARIABLE, "1")
    assert karat_here("export", str(foreign_run), "--format", "timm", "--weights", "raw", "--out", str(folder)) == 0
    forget(foreign_run.parent)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(Exception, match="foreign_basis:Foreign runs the code of the module foreign_basis"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    capsys.readouterr()
    assert karat_here("predict", str(folder), "photo.jpg") == 2
    refused = f"{folder}/model.safetensors: attention.basis = foreign_basis:Foreign runs the code"
    assert refused in capsys.readouterr().err
    assert not (foreign_run.parent / "it_ran").exists()
