"""`karat train` with trackers: killed, resumed, on two ranks, and with a tracker that is away."""

import os
from collections.abc import Callable

import pytest

from tests.conftest import ROOT, karat_done, karat_environment, karat_refuses, summary
from tests.engine.tracking.conftest import PLACE
from tests.training import runs
from tests.training.runs import STEPS, kill_all, losses, start, wait_for_step

Lines = Callable[[], list[dict]]
TRACKED = (f"log.trackers=[{PLACE}]", "checkpoint.every_steps=3")


def trained(told: list[dict]) -> list[int]:
    return [one["step"] for one in told if one.get("event") == "train"]


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_run_to_its_tracker(recipe_file, tmp_path, lines, monkeypatch) -> None:
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    monkeypatch.setattr(runs, "karat_environment", lambda: {**karat_environment(), **path})
    run = tmp_path / "run"
    process = start(recipe_file, run, *TRACKED)
    wait_for_step(run, 5, process)
    kill_all(process)
    done = karat_done("train", str(recipe_file), f"run.dir={run}", *TRACKED)
    assert f"{PLACE}: the run is at file://here" in done.stdout
    told = lines()
    assert trained(told) == list(range(1, STEPS + 1))
    assert {one["step"]: one["loss"] for one in told if one.get("event") == "train"} == losses(run)
    assert len({one["open"] for one in told if "open" in one}) == 1
    assert told[-1] == {"close": 0}
    assert [one["exit"] for one in told if one.get("event") == "end"] == [0]
    assert [one["upload"] for one in told if "upload" in one][-1] == "summary.json"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_rank_of_two_has_trackers_and_they_may_be_away(recipe_file, tmp_path, lines) -> None:
    run = tmp_path / "run"
    (tmp_path / "away").touch()
    done = karat_done("train", str(recipe_file), *TRACKED, "train.epochs=1", processes=2)
    assert summary(run)["exit"] == 0
    last = done.stdout.splitlines()[-1]
    assert f"warning: {PLACE}: has not got everything (no route to http://host); the run's next start" in last
    assert last.endswith(f", or: karat track {run}")
    assert "secret" not in done.stdout + done.stderr
    (tmp_path / "away").unlink()
    karat_done("track", str(run), "--trust")
    assert trained(lines()) == list(range(1, 9))
    assert len([one for one in lines() if "open" in one]) == 1


def test_a_tracker_that_is_not_installed_is_one_line_before_the_run_begins(recipe_file, tmp_path) -> None:
    line = karat_refuses("train", str(recipe_file), "log.trackers=[nowhere.at_all:Class]")
    assert line == (
        "error: log.trackers = nowhere.at_all:Class: no module nowhere.at_all; put its directory on PYTHONPATH"
    )
    assert not (tmp_path / "run" / "recipe.yaml").exists()
