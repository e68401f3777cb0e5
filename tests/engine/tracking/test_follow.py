"""A tracker in a process of its own gets each figure once, whatever happens to it, to the run and to the network."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest

from karat_scale.engine.tracking import follow
from karat_scale.engine.tracking.follow import Cursor, Trackers, check_trackers, cursor_file
from karat_scale.engine.tracking.trackers import figures
from karat_scale.foundation import tables
from karat_scale.foundation.errors import UserError
from tests.conftest import wait_until
from tests.engine.tracking.conftest import LINES, PLACE, WrittenRun

Lines = Callable[[], list[dict]]


def steps(told: list[dict], kind: str = "train") -> list[int]:
    return [one["step"] for one in told if one.get("event") == kind]


def test_the_figures_of_an_event() -> None:
    event = {"event": "eval", "step": 3, "time": 1.5, "top1": 50, "loss": None, "weights": "ema", "content": {"s": [1]}}
    assert figures(event) == {"eval/top1": 50, "content, s/block 0": 1}
    assert figures({"event": "checkpoint", "step": 3, "seconds": 1.0}) == {}


def test_everything_is_sent_once_over_several_starts(written, lines) -> None:
    written.train(1, 2, evaluate=(2,))
    assert written.send(PLACE) == ([], [f"{PLACE}: the run is at file://here"])
    written.train(3)
    written.finish()
    assert written.send(PLACE)[0] == []
    told = lines()
    assert steps(told) == [1, 2, 3]
    assert steps(told, "eval") == [2]
    first, second = [one for one in told if "open" in one]
    assert (first["open"], first["name"]) == (second["open"], "written owls")
    assert [one["upload"] for one in told if "upload" in one] == ["recipe.yaml", "summary.json"]
    assert [one["close"] for one in told if "close" in one] == [None, 0]


def test_a_finished_run_that_is_trained_on_and_killed_has_not_finished(written, lines) -> None:
    written.train(1)
    written.finish()
    written.send(PLACE)
    written.event("resume", 1, restarts=1)
    written.train(2)
    written.send(PLACE)
    assert [one["close"] for one in lines() if "close" in one] == [0, None]


def test_a_copied_run_without_its_histograms_goes_on(written, lines) -> None:
    written.train(1)
    written.histogram(1)
    written.send(PLACE)
    (written.path / "histograms.jsonl").unlink()
    written.train(2)
    assert written.send(PLACE) == ([], [f"{PLACE}: the run is at file://here"])
    assert steps(lines()) == [1, 2]


def test_a_restart_at_an_older_checkpoint_repeats_nothing_and_a_run_that_begins_anew_is_another(written, lines) -> None:
    written.train(1, 2, 3, 4, evaluate=(2, 4))
    written.send(PLACE)
    written.event("resume", 2, restarts=1)
    written.train(3, 4, 5, 6, evaluate=(4, 6))
    written.send(PLACE)
    assert steps(lines()) == [1, 2, 3, 4, 5, 6]
    assert steps(lines(), "eval") == [2, 4, 6]
    assert steps(lines(), "resume") == [2]
    trackers = Trackers(written.path, [PLACE], anew=True)
    written.train(1, 2)
    assert trackers.finish(60) == []
    assert steps(lines()) == [1, 2, 3, 4, 5, 6, 1, 2]
    assert len({one["open"] for one in lines() if "open" in one}) == 2


def test_a_tracker_whose_process_cannot_start_has_not_got_everything(written, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(follow.subprocess, "Popen", refuse)
    trackers = Trackers(written.path, [PLACE])
    assert trackers.finish(1) == [PLACE]
    assert f"{PLACE}: cannot be started" in trackers.messages()[0]


def test_it_follows_while_the_run_writes_and_waits_for_the_end_of_a_line(written, lines) -> None:
    trackers = Trackers(written.path, [PLACE])
    written.train(1)
    wait_until(lambda: steps(lines()) == [1])
    with (written.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 2')
        file.flush()
        assert trackers.finish(60) == []
        assert steps(lines()) == [1]
        file.write('}\nno event\n{"event": "train", "step": 3}\n')
    written.send(PLACE)
    assert steps(lines()) == [1, 2, 3]


@pytest.mark.slow
def test_a_tracker_that_is_away_for_a_while_has_no_gap_and_is_told_once(written, lines) -> None:
    away = written.path.parent / "away"
    away.touch()
    written.train(1, 2)
    late, said = written.send(PLACE)
    assert late == [PLACE]
    hint = f"`karat track {written.path} --to {PLACE}` sends the rest"
    assert said[-1] == f"warning: {PLACE}: has not got everything (no route to http://host); {hint}"
    assert lines() == []

    trackers = Trackers(written.path, [PLACE])
    messages: list[str] = []
    wait_until(lambda: bool(messages.extend(trackers.messages()) or messages))
    away.unlink()
    written.train(3)
    wait_until(lambda: steps(lines()) == [1, 2, 3])
    assert trackers.finish(60) == []
    messages += trackers.messages()
    why = "gets no figures for now (no route to http://host); they stay in metrics.jsonl, and it tries again"
    assert messages[0] == f"warning: {PLACE}: {why}"
    assert messages[-1] == f"{PLACE}: gets the figures again, without a gap"
    assert len([one for one in messages if "warning" in one]) == 1


@pytest.mark.slow
def test_a_tracker_that_hangs_is_ended_in_time_and_goes_on_later(written, lines) -> None:
    module = written.path.parent / "lines_of_mine.py"
    quick = module.read_text()
    module.write_text(quick + "\n    def write(self, events):\n        import time\n        time.sleep(10_000)\n")
    written.train(1, 2)
    trackers = Trackers(written.path, [PLACE])
    (process,) = trackers._processes.values()
    assert trackers.finish(2) == [PLACE]
    assert "has not got everything in time; `karat track " in trackers.messages()[-1]
    assert not psutil.pid_exists(process.pid)
    module.write_text(quick)
    assert written.send(PLACE)[0] == []
    assert steps(lines()) == [1, 2]


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.exit(3)", "exit code 3"),
        ("os.fork() or time.sleep(600); os._exit(0)", "exit code 0"),  # the fork holds the pipe
    ],
)
def test_a_tracker_that_dies_is_told_at_once_and_is_late(written, lines, end, how) -> None:
    module = written.path.parent / "lines_of_mine.py"
    module.write_text(f"{LINES}\n    def write(self, events):\n        import os, signal, sys, time\n        {end}\n")
    written.train(1, 2)
    trackers = Trackers(written.path, [PLACE])
    (process,) = trackers._processes.values()
    said: list[str] = []
    if "fork" in end:
        process.wait(60)
    else:
        wait_until(lambda: bool(said.extend(trackers.messages()) or said[1:]))  # while the run goes on
    assert trackers.finish(60) == [PLACE]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    said += trackers.messages()
    hint = f"`karat track {written.path} --to {PLACE}` sends the rest"
    assert said[1:] == [f"warning: {PLACE}: its process has ended ({how}), so it gets no more figures; {hint}"]


def test_what_a_killed_trainer_has_written_is_sent(written, lines) -> None:
    trackers = Trackers(written.path, [PLACE])
    written.train(1, 2)
    (process,) = trackers._processes.values()
    process.stdin.close()  # the tracker sees the same when the trainer is killed
    assert process.wait(60) == 0
    assert steps(lines()) == [1, 2]


def test_two_processes_never_send_the_same(written, lines) -> None:
    first = Trackers(written.path, [PLACE])
    wait_until(lambda: bool(lines()))
    late, said = written.send(PLACE)
    assert late == [PLACE]
    assert said == [f"warning: {PLACE}: another process sends to it now"]
    written.train(1)
    assert first.finish(60) == []
    assert steps(lines()) == [1]


def test_checkpoints_go_only_where_the_recipe_asks_for_them_and_what_links_lead_to_never(tmp_path, lines) -> None:
    (tmp_path / "secret.json").write_text("{}")
    for name, wanted in (("plain", "false"), ("asked", "true")):
        run = WrittenRun(tmp_path / name, f"log.track_checkpoints={wanted}")
        for step in (1, 2, 3):
            folder = run.path / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "weights.pt").write_text(f"{name}{step}")
        (run.path / "checkpoints" / "latest").write_text("step-00000003")
        (run.path / "checkpoints" / "best").write_text("step-00000002")
        (run.path / "analysis").mkdir()
        (run.path / "analysis" / "numbers.json").symlink_to(tmp_path / "secret.json")
        (run.path / "analysis" / "report.html").write_text("<p>")
        run.finish()
        run.send(PLACE)
    sent = [one["upload"] for one in lines() if "upload" in one and "checkpoints" in one["upload"]]
    assert sent == [f"checkpoints/step-0000000{step}/weights.pt" for step in (2, 3)]
    sent = [one["upload"] for one in lines() if "upload" in one and "checkpoints" not in one["upload"]]
    assert sorted(sent) == sorted(2 * ["recipe.yaml", "analysis/report.html", "summary.json"])


def test_a_damaged_cursor_and_a_shorter_file_are_read_from_the_start(tmp_path) -> None:
    file = cursor_file(tmp_path, "a.b:C")
    assert file == tmp_path / "trackers" / "a.b.C.json"
    file.parent.mkdir()
    file.write_text('{"id": 3}')
    cursor = Cursor.load(file)
    assert len(cursor.id) == 16
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"event": "train", "step": 1}\n')
    found, after = Cursor(offsets={"metrics.jsonl": 1000}).take(metrics)
    assert ([one["step"] for one in found], after.offsets) == ([1], {"metrics.jsonl": 30})
    after.save(file)
    assert Cursor.load(file) == after


def test_many_events_are_read_in_pieces(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step, "text": "x" * 50_000}) for step in range(50)]
    metrics.write_text("\n".join(lines) + "\n")
    cursor, found, pieces = Cursor(), [], 0
    while True:
        events, after = cursor.take(metrics)
        if after.offsets == cursor.offsets:
            break
        cursor, pieces = after, pieces + 1
        found += [event["step"] for event in events]
    assert found == list(range(50))
    assert pieces > 1


def test_progress_is_told_while_much_is_sent_and_not_of_half_a_line(written, lines, monkeypatch):
    seconds = itertools.count(0.0, 6.0)  # six pass between any two looks at the clock
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    said: list[str] = []
    follower = follow.Follower(written.path, PLACE, PLACE, said.append)
    metrics = written.path / "metrics.jsonl"
    for step in range(4):  # a run that trains for long
        with metrics.open("a") as file:
            file.write(f'{{"event": "train", "step": {step}}}\n' + " " * 20)
        follower.advance()
    assert steps(lines()) == [0, 1, 2, 3]
    assert not [text for text in said if "left to send" in text]
    with metrics.open("a") as file:
        file.writelines(json.dumps({"event": "train", "step": 4, "text": "x" * 100_000}) + "\n" for _ in range(60))
    follower.advance()
    assert [text for text in said if "MB of metrics.jsonl are left to send" in text]


def test_what_is_not_installed_is_one_line_and_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(tables.TRACKERS, "absent", tables.TrackerRow("absent:Absent", "absent"))
    monkeypatch.setitem(tables.EXTRAS, "absent", tables.Extra("absent_module", ("absent",), "log.trackers=absent"))
    for name, said in {
        "nowhere.at_all:Class": "log.trackers = nowhere.at_all:Class: no module nowhere.at_all",
        "absent": "log.trackers = absent: absent is not installed; in the clone: pip install -e '.[absent]'",
    }.items():
        with pytest.raises(UserError) as error:
            check_trackers([name])
        assert str(error.value).startswith(said)
    # W&B writes to a folder `wandb` in the working directory.
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not tables.is_installed("only_a_folder")
    assert tables.is_installed("json")
