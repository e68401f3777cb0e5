"""`karat track`: what was not sent is sent later, and a class that a run names needs trust."""

from collections.abc import Callable

from karat_scale.foundation.tables import VARIABLE
from tests.conftest import karat_here
from tests.engine.tracking.conftest import PLACE, WrittenRun

Lines = Callable[[], list[dict]]


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
