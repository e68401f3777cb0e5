"""What `karat status` shows of a run's files."""

import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from karat_scale.commands.cli import main
from karat_scale.commands.status.status import Standing, read_standing, render, show_status, sparkline
from karat_scale.engine.heartbeat import Sign
from tests.commands.status.terminal import on_a_terminal
from tests.conftest import SMALL, karat


def test_a_finished_run_is_shown_from_its_files(recipe_file: Path, tmp_path: Path) -> None:
    done = karat("train", str(recipe_file), *SMALL, "train.epochs=1")
    assert done.returncode == 0, done.stderr
    shown = karat("status", str(tmp_path / "run"))
    assert shown.returncode == 0, shown.stderr
    assert "finished (exit 0)" in shown.stdout
    assert "8 of 8, epoch 0" in shown.stdout
    assert "step-00000008, " in shown.stdout
    assert "best" in shown.stdout


def test_no_run_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run's directory (it has no recipe.yaml)\n"


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


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ('{"url": "s3://b/r", "checkpoint": "step-00000003", "problem": ""}', "step-00000003 at s3://b/r"),
        (
            '{"url": "s3://b/r", "checkpoint": null, "problem": "it failed"}',
            "none yet at s3://b/r; it failed",
        ),
        ('{"url": "s3://b/r"}', None),
        ("[]", None),
        ("{", None),
    ],
)
def test_the_copy_at_a_url_is_shown(tmp_path: Path, content: str, shown: str | None) -> None:
    write_events(tmp_path, {"event": "train", "step": 1})
    (tmp_path / "copy.json").write_text(content)
    assert read_standing(tmp_path).copied == shown


def test_the_job_is_that_of_the_newest_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for age, start in enumerate(("812-1", "812-0", "77-0")):
        (tmp_path / "logs" / start).mkdir(parents=True)
        os.utime(tmp_path / "logs" / start, (1000 - age, 1000 - age))
    standing = read_standing(tmp_path)
    assert (standing.job, standing.job_state) == ("812", None)


def test_ranks_of_an_earlier_start_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "heartbeats").mkdir()
    for rank, (start, written) in enumerate([("9-1", 20.0), ("9-1", 21.0), ("9-0", 10.0)]):
        sign = Sign(rank, f"node{rank}", 1, start, written=written)
        (tmp_path / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(sign)))
    assert [sign.rank for sign in read_standing(tmp_path).signs] == [0, 1]


def test_a_run_that_saved_on_a_signal_is_over_only_without_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    train = {"event": "train", "samples": 10, "total_steps": 40, "step": 1, "epoch": 0, "loss": 2.0}
    write_events(run, {**train, "images_per_second": 2.0, "peak_memory_mb": 40_321})
    (run / "heartbeats").mkdir()
    for rank, own_seconds in enumerate((0.1, 0.4)):
        sign = Sign(rank, f"node{rank}", 1, "", written=100.0, device="NVIDIA H100", own_seconds=own_seconds)
        (run / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(sign)))
    shown = shown_text(read_standing(run, now=400.0))
    assert "GPU memory  peak 40,321 MB" in shown
    assert "slow        rank 1 on node1 takes 0.4 s of its own per step" in shown
    assert "outcome     not running: no sign of life for 5 min" in shown
    assert "time left" not in shown
    alive = shown_text(read_standing(run, now=101.0))
    assert "no sign of life" not in alive
    assert "time left   about" in alive


def test_a_run_that_has_not_logged_a_step_shows_that_of_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step-00000003").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (run / "checkpoints/latest").write_text("step-00000003\n")
    (run / "checkpoints/step-00000003/manifest.json").write_text("{}")
    (run / "checkpoints/step-00000003/state.json").write_text('{"step": 3}')
    shown = shown_text(read_standing(run))
    assert "step        3" in shown
    assert "loss        none logged yet" in shown


def test_the_bar_has_a_line_of_its_own(tmp_path: Path) -> None:
    write_events(tmp_path / "run", {"event": "train", "samples": 1, "total_steps": 4, "step": 2, "loss": 1.0})
    lines = shown_text(read_standing(tmp_path / "run")).splitlines()
    assert "step" not in lines[1]
    assert "2 of 4" in lines[2]


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
        assert terminal.process.wait(10) == 0


def test_a_sparkline_falls_with_its_values() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 100, width=4) == "▁▁▁▁"
    assert sparkline([]) == ""


def test_what_events_hold_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another's run may hold rich's markup and a terminal's commands in its names."""
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
    write_events(run, {"event": "train"}, {"event": "train", "step": "x"}, {"event": "train", "step": 1, "loss": [2]})
    write_events(run, {"event": "resume", "step": 3, "restarts": 1}, tail="[" * 100_000 + "\n\n" + '{"event": "tr')
    standing = read_standing(run)
    assert (standing.step, standing.restarts, standing.losses, standing.damaged_lines) == (3, 1, [1.0], 5)
    show_status(str(run), once=True)
    assert "5 damaged lines of metrics.jsonl skipped" in capsys.readouterr().out


def test_heartbeats_and_states_that_lie_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_events(run, {"event": "train", "step": 3, "samples": 24, "loss": 1.0})
    (run / "heartbeats").mkdir()
    for rank, lie in enumerate(({"written": "now"}, {"beats": None}, {"host": 3}, {"more": 1}, {})):
        sign = {**asdict(Sign(rank, "node", 1, "")), **lie}
        (run / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(sign))
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    (run / "checkpoints" / "step-00000003" / "manifest.json").touch()
    (run / "checkpoints" / "step-00000003" / "state.json").write_text("[1]")
    assert [sign.rank for sign in read_standing(run).signs] == [4]
    assert show_status(str(run), once=True) == 0
    assert "step-00000003" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["NaN", "1e400", "-Infinity", "9" * 400])
def test_a_loss_that_is_not_finite_is_a_damaged_line(loss: str, tmp_path: Path, capsys) -> None:
    write_events(tmp_path / "run", {"event": "train", "step": 1, "loss": 2.0, "samples": 8})
    write_events(tmp_path / "run", tail=f'{{"event": "train", "step": 2, "loss": {loss}, "samples": 16}}\n')
    assert show_status(str(tmp_path / "run"), once=True) == 0
    assert "1 damaged line of metrics.jsonl skipped" in capsys.readouterr().out
