"""What a person sees of a run, and the events that its files hold."""

import errno
import io
import json
import os
import re
import sys

import pytest
from rich.console import Console

from karat_scale.data.batch import BadSample
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter, TerminalDisplay, choose_display
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import RunDirectoryError
from tests.conftest import run_to_end

FIGURES = {"epoch": 0, "samples": 3210, "loss": 1.25, "lr": 1e-3, "images_per_second": 321.0}


def test_a_pipe_gets_plain_lines(capsys) -> None:
    reporter = Reporter(PlainDisplay(), None)
    reporter.train(5, 10, FIGURES)
    reporter.event("eval", 5, "eval at step 5: top-1 12.35 %", {"top1": 12.345})
    reporter.checkpoint(RunState(step=5), "step-00000005", 0.5, 0.1)
    reporter.bad_samples([BadSample(3, "n01/x", "train-000001.tar", "truncated")])
    Reporter(choose_display(True, "run"), None).train(5, 10, {**FIGURES, "tflops": 412.0, "mfu": 0.4164})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step 5/10 epoch 1 loss 1.2500 lr 1.00e-03 321 img/s, about 10 s left")
    assert lines[1].endswith("eval at step 5: top-1 12.35 %")
    assert lines[2].endswith("saved step-00000005 in 0.5 s, of which training paused 0.1 s")
    assert all(part in lines[3] for part in ("warning", "n01/x", "train-000001.tar", "truncated"))
    assert lines[4].endswith("321 img/s MFU 41.6%, about 10 s left")


UNREAD = """
import os
from karat_scale.engine.reporting.progress import PlainDisplay
reader, writer = os.pipe()
os.close(reader)
for output in (writer, os.open("/dev/full", os.O_WRONLY)):
    os.dup2(output, 1)
    for text in "ab":
        PlainDisplay().line(text)
"""


def test_a_run_goes_on_where_its_lines_are_not_read_or_find_no_room() -> None:
    done = run_to_end(sys.executable, "-c", UNREAD)
    said = [f"({os.strerror(number)})" for number in (errno.EPIPE, errno.ENOSPC)]
    assert [word in line for word, line in zip(said, done.stderr.splitlines(), strict=True)] == [True, True]
    assert done.returncode == 0


def test_a_terminal_gets_a_live_bar_with_lines_above_it() -> None:
    screen = io.StringIO()
    display = TerminalDisplay(Console(file=screen, force_terminal=True, width=120), "run")
    reporter = Reporter(display, None)
    reporter.train(5, 10, FIGURES)
    display.evaluate(1, 2)
    display.evaluate(2, 2)
    display.verify(10, 20)  # too small to be shown
    display.verify(10**8, 2 * 10**8)
    display._bars._progress.refresh()
    reporter.info("text with [brackets]")
    reporter.close()
    shown = screen.getvalue()
    assert "text with [brackets]" in shown
    assert "5/10" in shown
    assert "100/200" in shown
    assert "verify" not in shown.rpartition("\x1b[2K")[2]  # what was cut off does not stay
    assert "left" in shown


def test_a_narrow_terminal_keeps_the_step_the_loss_and_the_time_left() -> None:
    screen = io.StringIO()
    display = TerminalDisplay(
        Console(file=screen, force_terminal=True, width=80), "quickstart_karat_with_a_longer_name"
    )
    for step in (500, 501):
        display.train(step, 1404, "epoch 0 loss 0.5329 lr 1.39e-04 1,455 img/s")
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"quickstart_karat_wit \S+ +501/1404 epoch 0 loss 0.5329 .* \d:\d\d:\d\d left", shown), shown


def test_other_ranks_say_only_warnings_on_standard_error(capsys) -> None:
    reporter = Reporter(choose_display(False, "run"), None, rank=3)
    reporter.info("hello")
    reporter.train(5, 10, FIGURES)
    reporter.warn("trouble")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[rank 3] warning: trouble\n"


def test_each_event_is_a_line_on_disk_at_once(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    log.write("train", 3, loss=1.5, grad_norm=float("nan"), content={"by_query": [float("inf"), 0.5]})
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["step"], record["loss"], record["grad_norm"]) == ("train", 3, 1.5, None)
    assert record["content"] == {"by_query": [None, 0.5]}
    log.close()
    again = MetricsLog(file)
    again.write("end", 4)
    again.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["train", "end"]


def test_an_event_does_not_join_half_a_line(tmp_path) -> None:
    """An event begins a new line after the half line that a full disk has left."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    for step in (2, 3):
        log = MetricsLog(file)
        log.write("train", step)
        log.close()
    first, half, *others = file.read_text().splitlines()
    assert half == '{"event": "tra'
    assert [json.loads(line)["step"] for line in (first, *others)] == [1, 2, 3]


def test_a_log_that_the_disk_does_not_take_is_named(small_disk) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: No space left"):
        log.write("train", 1, losses=[0.0] * 1_000_000)
    log.close()


def test_histograms_are_lines_of_a_file_of_their_own_that_a_full_disk_only_stops(small_disk, capsys) -> None:
    file = small_disk / "metrics.jsonl"
    reporter = Reporter(PlainDisplay(), MetricsLog(file))
    reporter.histograms(1, {"W": {"counts": [1, 2]}})
    (line,) = (small_disk / "histograms.jsonl").read_text().splitlines()
    assert json.loads(line)["histograms"] == {"W": {"counts": [1, 2]}}
    for step in range(2, 40):
        reporter.histograms(step, {"W": {"counts": [0] * 30_000}})
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "histograms.jsonl" in warning
    assert warning.endswith("no further histograms are written")
    (small_disk / "histograms.jsonl").unlink()
    reporter.end(RunState(), 0, "finished")
    reporter.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["end"]


def test_a_slow_run_without_a_bar_says_after_a_minute_how_far_it_is(capsys, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr("karat_scale.engine.reporting.progress.time.monotonic", lambda: now)
    display = PlainDisplay()
    for step in range(1, 6):
        now += 25.0
        display.advance(step, 20)
    now += 9.0
    display.evaluate(1, 8)
    now += 1.0
    display.evaluate(2, 8)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said == ["step 3/20, about 7 min 5 s left", "evaluated 2 of 8 batches"]
