import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.reporting.metrics import MetricsLog, open_trackers
from karat_scale.reporting.progress import PlainDisplay, Reporter


def test_each_event_is_a_line_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    log.write("train", 3, loss=1.5, grad_norm=float("nan"))
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["step"], record["loss"], record["grad_norm"]) == ("train", 3, 1.5, None)
    log.close()
    again = MetricsLog(file)
    again.write("end", 4)
    again.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["train", "end"]


def test_tensorboard_gets_the_scalars(small_recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "m.jsonl", open_trackers(tmp_path, small_recipe(), ["tensorboard"])[0])
    for step in (1, 2):
        log.write("train", step, loss=float(step), lr=0.1, grad_norm=None, images_per_second=None)
    log.write("eval", 2, top1=50.0, top5=100.0, loss=1.0)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 2.0]
    assert board.Scalars("eval/top1")[0].value == 50.0


def test_an_event_does_not_join_half_a_line(tmp_path: Path) -> None:
    """What a disk leaves that was full for a while."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    for step in (2, 3):
        log = MetricsLog(file)
        log.write("train", step)
        log.close()
    first, half, *others = file.read_text().splitlines()
    assert half == '{"event": "tra'
    assert [json.loads(line)["step"] for line in (first, *others)] == [1, 2, 3]


class Unreachable:
    """A tracker whose server is away."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, event: str, step: int, figures: Mapping[str, Any]) -> None:
        self.calls += 1
        raise ConnectionError("no route to host\nmore")

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.calls += 1

    def close(self) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(tmp_path: Path, capsys) -> None:
    tracker = Unreachable()
    file = tmp_path / "metrics.jsonl"
    reporter = Reporter(PlainDisplay(), MetricsLog(file, [tracker]))
    for step in (1, 2):
        reporter.train(step, 2, {"epoch": 0, "loss": 1.0, "lr": 0.1, "images_per_second": 5.0})
        reporter.histogram("W/0", torch.zeros(3), step)
    reporter.close()
    assert tracker.calls == 1
    assert len(file.read_text().splitlines()) == 2
    warning = "warning: Unreachable has failed, so it gets no more figures: no route to host"
    assert [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines() if "warning" in line] == [warning]


def test_tensorboard_on_a_full_disk_does_not_stop_training(
    small_recipe, small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", open_trackers(small_disk, small_recipe(), ["tensorboard"])[0])
    (small_disk / "filler").write_bytes(bytes(2_000_000))
    for step in range(400):
        log.histogram("W", torch.randn(2000), step)
        log.write("train", step, loss=1.0)
    log.close()
    assert [failure.partition(",")[0] for failure in log.failures()] == ["TensorBoard has failed"]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 400
    assert "Traceback" not in "".join(capfd.readouterr())
