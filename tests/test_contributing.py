"""The examples of CONTRIBUTING.md, applied to a copy of the package; their commands run as they are written."""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, karat_environment, output_of, run_to_end

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (Add .*?)\n(.*?)(?=^## |\Z)", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE))
# One process imports torch and DeepSpeed once. `karat prepare` becomes another program, so it has a process of its own.
IN_TURN = (
    "import shlex, sys; from karat_scale.commands.cli import main; "
    "sys.exit(max(main(shlex.split(a)) for a in sys.argv[1:]))"
)


def blocks(section: str, language: str) -> list[tuple[str, str]]:
    """Return the title and the text of each of a section's code blocks in a language."""
    return re.findall(rf'^```{language}(?: title="(.*?)")?\n(.*?)^```', section, flags=re.DOTALL | re.MULTILINE)


def apply(section: str, copy: Path) -> None:
    """Write the section's modules and add its lines."""
    for title, text in blocks(section, "python"):
        (copy / title).write_text(text)
    for _, text in blocks(section, "diff"):
        command = ["git", "apply", "--recount", "--unidiff-zero", "-"]
        done = run_to_end(*command, cwd=copy, input=text)
        assert done.returncode == 0, f"{done.stderr}CONTRIBUTING.md has lines that the files no longer have:\n{text}"


def karat(copy: Path, *arguments: str) -> None:
    """Run Python in the copy, which is the only karat_scale that it can import."""
    output_of(sys.executable, *arguments, cwd=copy, env={**karat_environment(), "PYTHONPATH": str(copy)})


def png(brightness: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), (brightness,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def make_data(data: Path) -> None:
    """Write what the examples read: zip files of images, and a small file like MedMNIST's."""
    (data / "zipped").mkdir(parents=True)
    for split in ("train", "val"):
        with zipfile.ZipFile(data / "zipped" / f"{split}.zip", "w") as archive:
            for number in range(16):
                archive.writestr(f"class{number % 2}/{number}.png", png(number))
    (data / "medmnist").mkdir()
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.integers(0, 256, (18, 28, 28, 3), np.uint8) for split in ("train", "val", "test")}
    arrays |= {f"{split}_labels": np.arange(18).reshape(-1, 1) % 9 for split in ("train", "val", "test")}
    np.savez(data / "medmnist" / "pathmnist.npz", **arrays)


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with all examples applied."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in ("karat_scale", "data_prep", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)  # else git takes the paths from a repository around it
    for section in SECTIONS.values():
        apply(section, copy)
    return copy


@pytest.fixture(scope="module")
def copy(applied: Path) -> Path:
    """Return the copy after all commands of the examples have run."""
    make_data(applied / "data")
    commands = [
        line for section in SECTIONS.values() for _, text in blocks(section, "bash") for line in text.splitlines()
    ]
    words = [line.removeprefix("karat ") for line in commands]
    for line in words:
        if line.startswith("prepare "):
            karat(applied, "-m", "karat_scale", *shlex.split(line))
    karat(applied, "-c", IN_TURN, *(line for line in words if line.startswith("train ")))
    return applied


def test_each_example_has_a_module_its_row_and_a_command() -> None:
    parts = ("a basis", "an attention", "a data backend", "a model family", "a tracker", "a data set")
    assert list(SECTIONS) == [f"Add {part}" for part in parts]
    for section in SECTIONS.values():
        ((title, _),) = blocks(section, "python")
        assert Path(title).suffix == ".py"
        assert blocks(section, "diff")
        assert len(blocks(section, "bash")) == 1


def test_each_example_still_applies(applied: Path) -> None:
    for section in SECTIONS.values():
        ((title, text),) = blocks(section, "python")
        assert (applied / title).read_text() == text
        for _, diff in blocks(section, "diff"):
            path = re.search(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)[1]
            added = re.findall(r"^\+(?!\+\+ )(.*)$", diff, flags=re.MULTILINE)
            assert set(added) <= set((applied / path).read_text().splitlines())


@pytest.mark.slow(together=True)
@pytest.mark.parametrize("run", ["gaussian", "mean", "zip", "relpos", "csv", "pathmnist"])
def test_each_example_trains_two_steps(copy: Path, run: str) -> None:
    summary = json.loads((copy / "runs" / run / "summary.json").read_text())
    assert (summary["exit"], summary["steps"]) == (0, 2)


@pytest.mark.slow(together=True)
def test_the_added_tracker_has_written_each_step(copy: Path) -> None:
    with (copy / "runs" / "csv" / "loss.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(float(loss) > 0 and float(lr) > 0 for _, loss, lr in rows)


@pytest.mark.slow(together=True)
def test_the_added_modules_pass_the_checks(copy: Path) -> None:
    added = [title for section in SECTIONS.values() for title, _ in blocks(section, "python")]
    for check in (["check"], ["format", "--check"]):
        karat(copy, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), *added)
