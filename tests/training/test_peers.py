"""When a rank fails, is killed or never starts, the other one ends soon, with one line that says so."""

import json
import os
import re
import sys
from typing import Any

import pytest

from karat_scale.foundation.errors import EXIT_LOST_PEER, EXIT_STOPPED
from tests.conftest import karat_environment, output_of
from tests.training.peers import DISKS, STAGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    """Return the exit codes and the output of two ranks, by case."""
    scratch = tmp_path_factory.mktemp("peers")
    environment = {**karat_environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    output_of(sys.executable, "-m", "tests.training.peers", scratch, env=environment, timeout=900)
    found: dict[str, Any] = json.loads((scratch / "outcomes.json").read_text())
    return found


def errors(said: str) -> list[str]:
    """Return the error lines of ranks, without the names of the ranks."""
    assert "Traceback" not in said, said
    assert "frame #" not in said, said
    return [line.partition("error: ")[2] for line in said.splitlines() if "error: " in line]


@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_is_left_says_that_it_lost_another(outcomes, victim) -> None:
    found = outcomes[f"killed {victim}"]
    assert found["ended"], found["said"]
    assert found["codes"][victim] == -9
    assert found["codes"][1 - victim] == EXIT_LOST_PEER
    (line,) = errors(found["said"])
    assert line.startswith("another rank has ended (")


@pytest.mark.multiprocess
def test_a_rank_that_waits_for_another_stops_on_a_signal(outcomes) -> None:
    found = outcomes["stopped"]
    assert found["ended"], found["said"]
    assert found["codes"] == [EXIT_STOPPED], found["said"]
    assert "stopped before training began; run the same command to resume" in found["said"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_are_starting_stop_together_on_a_signal_to_one(outcomes, rank) -> None:
    found = outcomes[f"stopped alone {rank}"]
    assert found["ended"], found["said"]
    assert found["codes"] == [EXIT_STOPPED, EXIT_STOPPED], found["said"]
    assert found["said"].count("stopped before training began; run the same command to resume") == 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_fails_alone_in_an_evaluation_ends_with_its_error(outcomes, stage) -> None:
    found = outcomes[f"evaluation {stage}"]
    assert found["ended"], found["said"]
    assert found["codes"] == [EXIT_LOST_PEER, 2], found["said"]
    assert "that shard is gone" in errors(found["said"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named_and_waited_for_as_long_as_the_recipe_says(outcomes, rank) -> None:
    found = outcomes[f"absent {rank}"]
    assert found["ended"], found["said"]
    assert found["codes"] == [2]
    assert re.search(rf"has waited \d+ s for rank {rank}", found["said"])
    (line,) = errors(found["said"])
    assert line.startswith(f"rank {rank} ")
    assert "did not come in 0.2 minutes (run.peer_timeout_minutes)" in line


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a size-limited tmpfs needs root")
@pytest.mark.parametrize("case", [f"disk {size}" for size in DISKS])
def test_a_full_disk_ends_both_ranks_with_the_same_line_and_code(outcomes, case) -> None:
    found = outcomes[case]
    assert found["ended"], found["said"]
    assert found["codes"] == [2, 2], found["said"]
    lines = errors(found["said"])
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert re.search("No space left|no room", lines[0]), lines


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a size-limited tmpfs needs root")
def test_a_disk_that_fills_ends_the_rank_that_writes_and_the_other_loses_it(outcomes) -> None:
    found = outcomes["disk that fills"]
    assert found["ended"], found["said"]
    assert found["codes"][0] == 2, found["said"]
    assert found["codes"][1] in (2, EXIT_LOST_PEER), found["said"]  # 2 where it fills before training
