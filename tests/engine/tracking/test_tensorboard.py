"""TensorBoard's event files, read back with its own reader."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from karat_scale.engine.reporting.interval import _histogram
from karat_scale.engine.reporting.progress import MetricsLog
from karat_scale.engine.tracking.follow import Follower

TENSORBOARD = "karat_scale.engine.tracking.trackers:TensorBoard"


def board_of(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    return board


def test_scalars_of_two_starts(written) -> None:
    assert written.send_two_starts("tensorboard") == []
    board = board_of(written.path)
    # Sorted, because files that one process writes in one second are read in any order.
    found = sorted((event.step, round(event.value, 4)) for event in board.Scalars("train/loss"))
    assert found == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    assert board.Scalars("eval/top1")[0].value == 3.0
    assert board.Scalars("content, by_query/block 2")[0].value == 0.25
    assert "train/grad_norm" not in board.Tags()["scalars"]


def test_a_copied_run_without_its_event_files_gets_all_figures_again(written) -> None:
    written.train(1, 2)
    assert written.send("tensorboard")[0] == []
    shutil.rmtree(written.path / "tensorboard")
    written.train(3)
    assert written.send("tensorboard")[0] == []
    assert [event.step for event in board_of(written.path).Scalars("train/loss")] == [1, 2, 3]


def test_histograms(written) -> None:
    values = torch.tensor([0.5, -1.0, 2.0, float("nan")])
    log = MetricsLog(written.path / "metrics.jsonl")
    assert log.histograms(7, {"block 0, W/head 1": _histogram(values)}) == ""
    log.close()
    written.send("tensorboard")
    (event,) = board_of(written.path).Histograms("block 0, W/head 1")
    found = event.histogram_value
    assert (event.step, found.num, found.min, found.max, found.sum) == (7, 3, -1.0, 2.0, 1.5)


def test_a_full_disk_is_a_failure_that_leaves_no_half_record(written, small_disk, request) -> None:
    (written.path / "tensorboard").mkdir()
    subprocess.run(["mount", "--bind", str(small_disk), str(written.path / "tensorboard")], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", str(written.path / "tensorboard")], check=True))
    follower = Follower(written.path, "tensorboard", TENSORBOARD, print)
    written.train(1)
    follower.advance()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    with contextlib.suppress(OSError):
        filler.open("ab").write(bytes(200_000))
    written.train(*range(2, 500))
    failed = False
    try:
        follower.advance()
    except OSError as error:
        failed = "No space left" in str(error)
    follower.drop()
    filler.unlink()
    assert failed
    follower.advance()
    follower.finish()
    assert [event.step for event in board_of(written.path).Scalars("train/loss")] == list(range(1, 500))
