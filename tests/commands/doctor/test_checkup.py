"""`karat doctor RECIPE` from outside: every stage is timed, and the verdict follows from these times.

test_verdict checks which verdict follows from given times.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import karat_environment, karat_run_here

Doctor = Callable[..., tuple["subprocess.CompletedProcess[str]", dict[str, Any]]]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    def run(recipe: Path, *overrides: str, processes: int = 1) -> tuple[Any, dict[str, Any]]:
        file = tmp_path / "doctor.json"
        options = ("--seconds=0.5", f"--json={file}")
        done = karat_run_here("doctor", str(recipe), *overrides, *options, processes=processes)
        return done, json.loads(file.read_text()) if file.is_file() else {}

    return run


@pytest.mark.slow
def test_without_workers_the_slowest_of_all_stages_bounds(doctor, recipe_file, image_folder) -> None:
    folder = ("data.backend=folder", f"data.path={image_folder}", "data.workers=0", "data.decoder=pillow")
    done, report = doctor(recipe_file, *folder, "model.depth=1")
    assert done.returncode == 0, done.stdout + done.stderr
    rates = {stage: figures["images_per_second"] for stage, figures in report["stages"].items()}
    del rates["storage"]  # the page cache holds these few images
    assert report["bound"] == min(rates, key=rates.__getitem__)
    assert "take turns" in done.stdout


def test_shards_give_every_figure(doctor: Doctor, recipe_file: Path, tmp_path: Path) -> None:
    done, report = doctor(recipe_file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    keys = {"version", "problems", "machine", "recipe", "verdict", "advice", "data_images_per_second"}
    assert keys <= report.keys()
    assert {"name", "level", "value", "fix"} <= report["machine"][0].keys()
    assert "  ok       torch: " in done.stdout
    assert "\x1b" not in done.stdout
    names = {"storage", "decode", "augmentation", "transfer", "model", "optimizer"}
    assert set(report["stages"]) | {"augmentation"} == names  # on a loaded machine, noise may hide it
    assert all(stage["images_per_second"] > 0 for stage in report["stages"].values())
    assert report["bound"] in report["stages"]
    assert report["storage"]["random"] > 0
    assert report["loop"]["steps"] >= 2
    assert report["exit"] == 0
    assert f"bound: {report['bound']}: " in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_is_left_behind(recipe_file: Path, tmp_path: Path) -> None:
    code = (
        "import psutil; from karat_scale.commands.doctor.checkup import doctor\n"
        f"code = doctor({str(recipe_file)!r}, ['data.workers=2'], 0.5, None)\n"
        "print('left:', code, psutil.Process().children(recursive=True))"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**karat_environment(), "TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "left: 0 []", done.stdout + done.stderr
    assert not list(scratch.glob("karat-doctor*"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_time_their_communication(doctor: Doctor, recipe_file: Path) -> None:
    done, report = doctor(recipe_file, "data.backend=synthetic", "deepspeed.config=zero1", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["stages"]["communication"]["images_per_second"] > 0
    assert report["device"]["communication"]["bytes"] > 0
    assert report["storage"] is None  # of synthetic images
    assert "storage" not in report["stages"]
    assert done.stdout.count("what bounds training") == 1


@pytest.mark.slow
def test_missing_data_is_a_problem_among_others(doctor: Doctor, recipe_file: Path, tmp_path: Path) -> None:
    done, report = doctor(recipe_file, f"data.path={tmp_path / 'nowhere'}")
    assert done.returncode == report["exit"] == 1
    assert report["problems"] == ["data"]
    assert "nowhere" in done.stdout
    assert "room for checkpoints" in done.stdout
    assert done.stderr == ""
