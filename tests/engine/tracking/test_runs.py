"""`karat train` with trackers, killed and resumed, and `karat track`, which sends what they have not got."""

import os

import pytest

from karat_scale.foundation.tables import VARIABLE
from tests.conftest import ROOT, karat_done, karat_environment, karat_here, karat_refuses, summary
from tests.engine.tracking.conftest import PLACE, WrittenRun
from tests.training import runs
from tests.training.runs import STEPS, kill_all, losses, start, wait_for_step

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
    assert f"warning: {PLACE}: has not got everything (no route to http://host); `karat track" in last
    assert last.endswith(f" {run} --to {PLACE}` sends the rest")
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


def test_a_run_is_sent_to_a_tracker_that_its_recipe_does_not_name(written, lines, capsys) -> None:
    written.train(1, 2)
    away = written.path.parent / "away"
    away.touch()
    assert karat_here("track", str(written.path), "--to", PLACE) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{written.path}: warning: {PLACE}: has not got everything (no route to http://host); ")
    away.unlink()
    for _ in range(2):
        assert karat_here("track", str(written.path), "--to", PLACE) == 0
        assert f"{written.path}: {PLACE}: has everything" in capsys.readouterr().out.splitlines()
    assert [one["step"] for one in lines() if "event" in one] == [1, 2]


def test_a_class_in_the_recipe_of_a_run_needs_trust(tmp_path, lines, capsys, monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    run = WrittenRun(tmp_path / "foreign", f"log.trackers=[{PLACE}]")
    assert karat_here("track", str(run.path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"recipe.yaml: log.trackers = {PLACE} runs the code of the module lines_of_mine" in line
    assert "add --trust or set KARAT_TRUST=1" in line
    assert lines() == []
    monkeypatch.setenv(VARIABLE, "")  # --trust sets it for this process
    assert karat_here("track", str(run.path), "--trust") == 0


def test_mistakes_are_one_line(written, capsys) -> None:
    assert karat_here("track", str(written.path.parent)) == 2
    assert "not a run directory (it has no recipe.yaml)" in capsys.readouterr().err
    assert karat_here("track", str(written.path)) == 2
    assert "log.trackers is empty; name the trackers with --to" in capsys.readouterr().err
    assert karat_here("track", str(written.path), "--to", "wandbb") == 2
    assert "unknown tracker 'wandbb'; did you mean wandb?" in capsys.readouterr().err
    (written.path / "recipe.yaml").write_text("log: {trackers: [wandb, 3]}\n")
    assert karat_here("track", str(written.path)) == 2
    assert "recipe.yaml: log.trackers[1]: should be 'tensorboard', 'wandb'" in capsys.readouterr().err
