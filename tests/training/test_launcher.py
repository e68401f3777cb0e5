"""Ranks whose launcher is killed save, stop, and leave the run to its next start."""

import os
import signal

import psutil
import pytest

from tests.conftest import karat_done, summary
from tests.training.runs import start, wait_for_checkpoint


@pytest.mark.slow
@pytest.mark.multiprocess
def test_ranks_stop_with_a_checkpoint_when_their_launcher_is_killed(recipe_file, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=5000", "checkpoint.every_steps=4", processes=2)
    wait_for_checkpoint(run, 4, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    output, _ = process.communicate()
    assert not alive, output
    assert output.count("the launcher has ended; this rank stops, too") == 2
    assert "Traceback" not in output
    assert summary(run)["exit"] == 75
    steps = summary(run)["steps"]
    karat_done("train", str(recipe_file), f"run.dir={run}", "train.epochs=5000", f"train.max_steps={steps}")
