"""What `karat status` shows of a run's files."""

import io
import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from karat_scale.commands.status.status import Standing, read_standing, render, show_status
from karat_scale.commands.submit.within_job import Watch
from karat_scale.engine.heartbeat import Sign, StallLimits
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.machine import this_node
from tests.commands.status.terminal import on_a_terminal
from tests.conftest import SMALL, karat_refuses, karat_says


def test_a_finished_run_is_shown_from_its_files(recipe_file: Path, tmp_path: Path) -> None:
    karat_says("train", str(recipe_file), *SMALL, "train.epochs=1")
    shown = karat_says("status", str(tmp_path / "run"))
    assert all(part in shown for part in ("finished (exit 0)", "8 of 8, epoch 1", "step-00000008, ", "best"))


def write_events(run: Path, *events: dict[str, object], tail: str = "") -> None:
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + tail)


def test_time_left_and_restarts_come_from_the_last_events(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = {"event": "train", "samples": 1000, "total_steps": 40, "epoch": 0, "loss": 2.0, "images_per_second": 50.0}
    write_events(
        run, {**train, "step": 10}, {"event": "end", "step": 10, "exit": 75, "reason": "stopped by SIGUSR2"},
        {"event": "resume", "step": 10, "restarts": 1}, tail='{"event": "tra',
    )  # fmt: skip
    standing = read_standing(run)
    assert (standing.step, standing.restarts, standing.ended) == (10, 1, None)
    assert standing.seconds_left == 60.0
    assert standing.checkpoint is None


def test_what_a_start_takes_back_is_not_shown(tmp_path: Path) -> None:
    start = {"event": "start", "began": 1.0, "anew": False, "last_sign": None, "submitted": None}
    train = {"event": "train", "samples": 1000, "total_steps": 40}
    write_events(
        tmp_path, {**start, "step": 0}, {**train, "step": 10, "loss": 2.0},
        {"event": "eval", "step": 10, "top1": 40.0}, {"event": "eval", "step": 15, "top1": None},
        {**train, "step": 20, "loss": 9.0}, {"event": "eval", "step": 20, "top1": 70.0},
        {"event": "end", "step": 20, "exit": 1, "reason": "killed"},
        {**start, "step": 10}, {"event": "resume", "step": 10, "restarts": 1},
    )  # fmt: skip
    standing = read_standing(tmp_path)
    assert (standing.step, standing.restarts, standing.losses, standing.ended) == (10, 1, [2.0], None)
    assert "top-1       40.00 %, best 40.00 %" in shown_text(standing)
    write_events(tmp_path, {**start, "step": 0})  # its checkpoints are gone
    standing = read_standing(tmp_path)
    assert (standing.step, standing.restarts, standing.losses, standing.damaged_lines) == (0, 0, [], 0)
    assert "top-1" not in shown_text(standing)


def test_what_a_new_start_does_not_know_yet_is_not_shown(tmp_path: Path) -> None:
    train = {"event": "train", "samples": 1000, "total_steps": 40, "images_per_second": 50.0, "step": 40}
    start = {"event": "start", "began": 1.0, "anew": False, "last_sign": None, "submitted": None, "step": 40}
    write_events(tmp_path, train, {"event": "end", "step": 40, "exit": 0, "reason": "finished"}, start)  # extended
    standing = read_standing(tmp_path)
    assert standing.seconds_left is None
    assert "of 40" not in shown_text(standing)
    assert "50" in shown_text(standing)
    write_events(tmp_path, {**start, "anew": True, "step": 0})
    assert read_standing(tmp_path).known == {}


def test_a_detectors_scores_are_its_average_precisions(tmp_path: Path) -> None:
    train = {"event": "train", "samples": 1000, "total_steps": 40, "step": 10, "loss": 2.0}
    write_events(tmp_path, train, {"event": "eval", "step": 10, "box_ap": 0.3, "mask_ap": 0.25})
    shown = shown_text(read_standing(tmp_path))
    assert "mask AP     0.25, best 0.25" in shown
    assert "top-1" not in shown


def test_a_directory_of_runs_is_told_with_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "sweep/c", "sweep/d", "e"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").touch()
    a, b, e = (tmp_path / name for name in "abe")
    said = f"(it has no recipe.yaml); it holds runs: name one of {a}, {b}, {e} or 2 more"
    assert karat_refuses("status", str(tmp_path)).endswith(said)
    assert "name one of" in karat_refuses("status", str(tmp_path / "sweep"))


def test_the_copy_at_a_url_is_shown(tmp_path: Path) -> None:
    write_events(tmp_path, {"event": "train", "step": 1})
    for content, shown in (
        ('{"url": "s3://b/r", "checkpoint": "step-00000003", "problem": ""}', "step-00000003 at s3://b/r"),
        ('{"url": "s3://b/r", "checkpoint": null, "problem": "it failed"}', "none yet at s3://b/r; it failed"),
        *((damaged, None) for damaged in ('{"url": "s3://b/r"}', "[]", "{")),
    ):
        (tmp_path / "copy.json").write_text(content)
        assert read_standing(tmp_path).copied == shown


def test_the_job_is_that_of_the_newest_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for age, start in enumerate(("812-1", "812-0", "77-0")):
        (tmp_path / "logs" / start).mkdir(parents=True)
        os.utime(tmp_path / "logs" / start, (1000 - age, 1000 - age))
    standing = read_standing(tmp_path)
    assert (standing.job, standing.job_state) == ("812", None)


def write_signs(run: Path, *fields: dict[str, object]) -> None:
    """Write the signs of life of ranks 0, 1, ..., each with its own values of some fields."""
    shutil.rmtree(run / "heartbeats", ignore_errors=True)
    (run / "heartbeats").mkdir()
    for rank, own in enumerate(fields):
        sign = {**asdict(Sign(rank, f"node{rank}", 1, "")), **own}
        (run / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(sign))


def test_ranks_of_an_earlier_start_and_lies_are_not_shown(tmp_path: Path) -> None:
    starts = [{"start": start, "written": written} for start, written in (("9-1", 20.0), ("9-1", 21.0), ("9-0", 10.0))]
    lies: list[dict[str, object]] = [{"written": "now"}, {"beats": None}, {"host": 3}, {"more": 1}]
    write_signs(tmp_path, *starts, *lies)
    (tmp_path / "logs" / "9-1").mkdir(parents=True)
    assert [sign.rank for sign in read_standing(tmp_path).signs] == [0, 1]


def test_a_sweep_is_no_run_although_it_has_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "lr=1e-3.log").touch()
    with pytest.raises(RunDirectoryError):
        read_standing(tmp_path)


def test_a_run_that_saved_on_a_signal_is_over_only_without_its_job(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    run = tmp_path / "run"
    write_events(run, {"event": "end", "step": 10, "exit": 75, "reason": "stopped by SIGUSR2"})
    assert read_standing(run).is_over
    (run / "logs" / "812-0").mkdir(parents=True)
    assert not read_standing(run).is_over
    assert replace(read_standing(run), job_state="CANCELLED").is_over
    assert replace(read_standing(run), exit_code=1).is_over


def test_memory_slow_ranks_and_silence_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = {"event": "train", "samples": 10, "total_steps": 40, "step": 2, "epoch": 0, "loss": 2.0}
    write_events(run, {**train, "images_per_second": 2.0, "peak_memory_mb": 40_321})
    write_signs(run, *({"written": 100.0, "device": "NVIDIA H100", "own_seconds": seconds} for seconds in (0.1, 0.4)))
    shown = shown_text(read_standing(run, now=400.0))
    assert "GPU memory  peak 40,321 MB" in shown
    assert "slow        rank 1 on node1 takes 0.4 s of its own per step" in shown
    (run / "slow_factor").write_text("5\n")  # may be written while the run trains
    assert "slow  " not in shown_text(read_standing(run, now=400.0))
    assert "outcome     not running: no sign of life for 5 min" in shown
    assert "time left" not in shown
    assert "2 of 40" in shown
    assert not any("━" in line and "step" in line for line in shown.splitlines())  # the bar has a line of its own
    write_signs(run, {"written": 100.0, "host": this_node(), "pid": os.getpid(), "step": 9})
    assert not read_standing(run, now=120.0).is_silent
    shown = shown_text(read_standing(run, now=120.0))
    assert "outcome     running " in shown
    assert "8 of 40" in shown  # the log has step 2, the heartbeat begins with step 9
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_signs(run, {"written": 100.0, "host": this_node(), "pid": ended.pid})
    assert read_standing(run, now=107.0).is_silent  # its process is gone
    alive = shown_text(read_standing(run, now=101.0))
    assert "no sign of life" not in alive
    assert "time left   about" in alive


def test_a_run_that_has_not_logged_a_step_shows_that_of_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step-00000003").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (run / "checkpoints/latest").write_text("step-00000003\n")
    (run / "checkpoints/step-00000003/manifest.json").write_text("{}")
    wrong = '{"step": 3, "peak_memory_mb": "much"}'
    for state, step in (('{"step": 3}', "step        3"), ("[1]", "step-00000003"), (wrong, "step        3")):
        (run / "checkpoints/step-00000003/state.json").write_text(state)
        assert step in shown_text(read_standing(run))
    assert "loss        none logged yet" in shown_text(read_standing(run))


def shown_text(standing: Standing) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(render(standing))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_on_a_terminal_it_follows_the_run_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = {"event": "train", "samples": 10, "total_steps": 40, "epoch": 0, "images_per_second": 5.0}
    write_events(run, {**train, "step": 1, "loss": 2.0})
    with on_a_terminal("status", str(run)) as terminal:
        terminal.wait_for("1 of 40")
        write_events(run, {**train, "step": 2, "loss": 1.5})
        terminal.wait_for("2 of 40")
        write_events(run, {"event": "end", "step": 2, "exit": 0, "reason": "finished"})
        terminal.wait_for("finished (exit 0)")
        assert terminal.process.wait(60) == 0


def test_what_events_hold_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run of another user may contain rich's markup or commands to a terminal, which must have no effect."""
    run = tmp_path / "[red]run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        '{"event": "train", "step": 3, "loss": 1.0}\n'
        '{"event": "end", "step": 3, "exit": 0, "reason": "[link=x]done[/no]\\u001b[2J"}\n'
    )
    show_status(str(run), once=True)
    shown = capsys.readouterr().out
    assert "[red]run" in shown
    assert "\x1b[2J" not in shown


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_events(run, {"event": "train", "step": 3, "samples": 24, "loss": 1.0}, tail='{"event": "tra\n')
    write_events(run, {"event": "train"}, {"event": "train", "step": None}, {"event": "train", "step": 1, "loss": [2]})
    for loss in ("NaN", "1e400", "-Infinity", "9" * 400):
        write_events(run, tail=f'{{"event": "train", "step": 4, "loss": {loss}, "samples": 32}}\n')
    write_events(run, {"event": "resume", "step": 3, "restarts": 1}, tail="[" * 100_000 + "\n\n" + '{"event": "tr')
    standing = read_standing(run)
    assert (standing.step, standing.restarts, standing.losses, standing.damaged_lines) == (3, 1, [1.0], 9)
    show_status(str(run), once=True)
    assert "9 damaged lines of metrics.jsonl skipped" in capsys.readouterr().out


STALL = StallLimits(60.0)


def signs(*beats: int, written: float = 0.0) -> list[Sign]:
    """Return signs of ranks 0, 1, ..., each on a node of its own."""
    return [Sign(rank, f"node{rank}", 100 + rank, "", n, "backward", 7, written) for rank, n in enumerate(beats)]


def test_ranks_that_get_on_or_wait_for_one_that_does_are_left_alone() -> None:
    watch = Watch(2, STALL, 0.0)
    assert all(watch.look(signs(t, t + 1, written=t), float(t)) is None for t in range(1000))
    watch = Watch(2, STALL, 0.0)  # rank 0 writes its share of a checkpoint to a slow disk, and the other has none
    assert all(watch.look(signs(10 + t, 5, written=t), float(t)) is None for t in range(1000))
    verdict = next(v for t in range(1000, 2000) if (v := watch.look(signs(1010, 1011, written=t), float(t))))
    assert verdict.startswith("rank 0 on node0")


def test_the_rank_that_others_wait_for_is_named() -> None:
    watch = Watch(3, STALL, 0.0)
    for t in range(61):
        assert watch.look(signs(9, 8, 9, written=t), float(t)) is None
    verdict = watch.look(signs(9, 8, 9, written=61), 61.0) or ""
    assert verdict.startswith("rank 1 on node1 (process 101) has made no progress for 61 s at 'backward' of step 7")
    assert "2 of 3 ranks wait for it" in verdict
    watch = Watch(2, STALL, 0.0)  # a process that writes no more comes before one that waits
    for t in range(80):
        living, stopped = signs(5, 5, written=t)
        verdict = watch.look([living, replace(stopped, written=0.0)], float(t)) or ""
    assert verdict.startswith("rank 1 on node1")
    assert "stopped or gone" in verdict
    watch = Watch(2, STALL, 0.0)
    assert watch.look(signs(1), 59.0) is None
    assert watch.look(signs(1), 61.0) == "rank 1 gave no sign of life in 60 s"
