"""`examples/quickstart.ipynb` from its first cell to its last, on a few pictures."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, karat_done, karat_environment

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_every_cell_runs_and_the_last_one_names_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra dev")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra dev")
    for number in range(300):
        split, label = ("val" if number % 2 else "train"), number // 2 % 10
        picture = tmp_path / "pictures" / split / f"class{label}" / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), (number % 256, 20 * label, 99)).save(picture)
    karat_done("prepare", "webdataset", "--src", str(tmp_path / "pictures"), "--out", str(tmp_path / "shards"))
    for name, value in karat_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)

    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")  # as an earlier pass leaves it

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    # As papermill sets parameters: the cell's names, with other values.
    given = {"IMAGES_OF_A_CLASS": 10, "EPOCHS": 1, "DATA": str(tmp_path / "shards"), "RUN": str(tmp_path / "run")}
    assert {line.partition(" = ")[0] for line in parameters.source.splitlines()} == given.keys()
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.get("text", "").strip().startswith("class") for output in notebook.cells[-1].outputs)
