"""A command that finds a named pipe in place of a file says so in one line; opening the pipe would wait for ever."""

import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from karat_scale.commands.evaluate.test_set import OtherLabels
from karat_scale.commands.sweep.command import last_step
from karat_scale.data.indexing import open_tar
from karat_scale.foundation.errors import DataError, UserError
from tests.conftest import karat_here, made_once
from tests.faults.conftest import TooLongError, no_longer_than
from tests.faults.runs import tiny_recipe

SECONDS = 120  # far more than any of these commands takes, on a busy machine too


def replaced(file: Path) -> None:
    """Put a pipe in a file's place."""
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def said_by(*arguments: str) -> tuple[int, list[str]]:
    """Run a command; return its exit code and the lines that it wrote."""
    said = io.StringIO()
    with no_longer_than(SECONDS), redirect_stderr(said), redirect_stdout(said):
        code = karat_here(*arguments)
    return code, said.getvalue().splitlines()


@pytest.fixture(scope="module")
def made(tmp_path_factory, image_folder) -> Path:
    """Return a directory with a finished run, what was exported from it, and an image."""

    def make(root: Path) -> None:
        recipe = tiny_recipe(root, "0", "log.trackers=[tensorboard]", "checkpoint.keep_last=2")
        run = root / "run"
        assert karat_here("train", str(recipe), f"run.dir={run}") == 0
        assert (
            karat_here("export", str(run), "--format", "timm", "--weights", "raw", "--out", str(root / "folder")) == 0
        )
        assert karat_here("export", str(run), "--weights", "raw", "--out", str(root / "weights.safetensors")) == 0
        shutil.copy(next(image_folder.rglob("*.jpg")), root / "image.jpg")

    return made_once(tmp_path_factory, "pipes", make)


def trains(root: Path, *overrides: str) -> list[str]:
    return ["train", str(root / "tiny.yaml"), *overrides]


Command = Callable[[Path], list[str]]
COMMANDS: dict[str, Command] = {
    "eval": lambda root: ["eval", str(root / "run")],
    "eval latest": lambda root: ["eval", str(root / "run"), "--checkpoint", "latest"],
    "export": lambda root: ["export", str(root / "run"), "--weights", "raw", "--out", str(root / "other.safetensors")],
    "predict": lambda root: ["predict", str(root / "run"), str(root / "image.jpg")],
    "predict by the folder": lambda root: ["predict", str(root / "folder"), str(root / "image.jpg")],
    "predict by the file": lambda root: ["predict", str(root / "weights.safetensors"), str(root / "image.jpg")],
    "status": lambda root: ["status", str(root / "run"), "--once"],
    "compare": lambda root: ["compare", str(root / "run"), str(root / "run"), "--out", str(root / "compared")],
    "track": lambda root: ["track", str(root / "run")],
    "replay": lambda root: ["replay", str(root / "run"), "3", "--out", str(root / "x.png")],
    "verify": lambda root: ["verify", str(root / "run")],
    "analyze": lambda root: ["analyze", str(root / "run"), "--only", "training", "distributions"],
    "resume": lambda root: trains(root, f"run.dir={root / 'run'}", "train.epochs=3", "resume.allow=[train.epochs]"),
    "init_from": lambda root: trains(root, f"run.dir={root / 'new'}", f"init_from={root / 'run'}"),
    "init_from a file": lambda root: trains(
        root, f"run.dir={root / 'new'}", f"init_from={root / 'weights.safetensors'}"
    ),
}


# What a command reads, if not the run.
READS = {
    "predict by the folder": ("folder",),
    "predict by the file": ("weights.safetensors",),
    "init_from a file": ("weights.safetensors", "tiny.yaml"),
    "resume": ("run", "tiny.yaml"),
}


def files_of(name: str, root: Path) -> list[Path]:
    """Return all files that a command may read, relative to `root`."""
    places = [root / place for place in READS.get(name, ("run",))]
    found = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return [path.relative_to(root) for path in found if path.is_file()]


def with_pipe(made: Path, root: Path, file: Path, name: str) -> tuple[int, list[str]]:
    """Run a command on a copy with a pipe in place of this file; return its exit code and lines."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made, root)
    replaced(root / file)
    return said_by(*COMMANDS[name](root))


# What each command cannot do without.
NEEDED = {
    "predict": ("run/recipe.yaml", "run/classes.json"),
    "predict by the folder": ("folder/model.safetensors",),
    "predict by the file": ("weights.safetensors",),
    "resume": ("tiny.yaml",),
    "init_from a file": ("weights.safetensors",),
    "compare": ("run/recipe.yaml",),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_pipe_in_place_of_a_file_is_named(name, made, tmp_path) -> None:
    for file in NEEDED[name]:
        code, lines = with_pipe(made, tmp_path / "work", Path(file), name)
        assert code == 2, (file, lines)
        assert any(Path(file).name in line for line in lines), lines


def test_a_checkpoint_with_a_pipe_is_damaged(made, tmp_path) -> None:
    """The checkpoint is reported as damaged, and the command falls back to another one or ends."""
    checkpoint = made / "run" / "checkpoints" / (made / "run" / "checkpoints" / "best").read_text().strip()
    for file in sorted(checkpoint.iterdir()):
        code, lines = with_pipe(made, tmp_path / "work", file.relative_to(made), "predict")
        assert code in (0, 2), (file, lines)
        assert any(f"{checkpoint.name} cannot be used: {file.name} " in line for line in lines), lines


def test_a_tracker_names_a_pipe_in_place_of_its_lock(made, tmp_path) -> None:
    code, lines = with_pipe(made, tmp_path / "work", Path("run/trackers/tensorboard.lock"), "track")
    assert code == 1
    assert "tensorboard.lock: not a regular file" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_waits_at_a_pipe_in_place_of_any_file(name, made, tmp_path) -> None:
    problems = {}
    for file in files_of(name, made):
        try:
            code, lines = with_pipe(made, tmp_path / "work", file, name)
        except TooLongError as error:
            problems[str(file)] = str(error)
            continue
        is_said = any("not a regular file" in line or file.name in line for line in lines)
        if code != 0 and not (is_said and code in (1, 2)):  # 1: a tracker that does not get everything
            problems[str(file)] = f"exit code {code}: {lines[-1:]}"
    assert not problems


@pytest.mark.parametrize("file", ["dataset.json", "train-000000.tar", "train-000000.index.npz"])
def test_a_pipe_in_a_data_set_is_named(file, shards, tmp_path) -> None:
    shutil.copytree(shards, tmp_path / "data")
    replaced(tmp_path / "data" / file)
    code, lines = said_by("data", str(tmp_path / "data"), "--out", str(tmp_path / "page.html"))
    assert code == 2
    assert file in lines[-1]


def test_a_pipe_in_place_of_a_tar_that_others_made_or_a_file_that_the_user_names_is_named(tmp_path) -> None:
    for name in ("a.tar", "labels.json", "metrics.jsonl"):
        os.mkfifo(tmp_path / name)
    with no_longer_than(SECONDS):
        said = pytest.raises(DataError, match=r"a\.tar cannot be read: not a regular file")
        with said, open_tar(tmp_path, "a.tar"):
            pass
        with pytest.raises(UserError, match=r"labels\.json"):
            OtherLabels(tmp_path / "labels.json", ("cat",))
        assert last_step(tmp_path) is None  # as for a run of a sweep that has logged nothing yet
