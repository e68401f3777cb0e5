"""A rank that fails, is killed or never comes: the other one ends soon, with one line that says so."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT, karat_environment
from tests.training.peers import DISKS, GROUPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Any]:
    """The exit codes and the words of two ranks, by case."""
    scratch = tmp_path_factory.mktemp("peers")
    environment = {**karat_environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.training.peers", str(scratch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((scratch / "outcomes.json").read_text())
    return found


def errors(said: str) -> list[str]:
    """The lines with which ranks end, without the name of the rank."""
    assert "Traceback" not in said, said
    assert "frame #" not in said, said
    return [line.partition("error: ")[2] for line in said.splitlines() if "error: " in line]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["", *(f" at {place}" for place in GROUPS)])
def test_the_rank_that_is_left_names_the_one_that_was_killed(outcomes, victim, when) -> None:
    found = outcomes[f"killed {victim}{when}"]
    assert found["ended"], found["said"]
    assert found["codes"][victim] == -9
    assert found["codes"][1 - victim] == 1
    (line,) = errors(found["said"])
    assert line.startswith(f"rank {victim} on ")
    assert "has ended without a word" in line


@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named_and_waited_for_as_long_as_the_recipe_says(outcomes, rank) -> None:
    found = outcomes[f"absent {rank}"]
    assert found["ended"], found["said"]
    assert found["codes"] == [2]
    assert f"has waited 10 s for rank {rank}" in found["said"]
    (line,) = errors(found["said"])
    assert line.startswith(f"rank {rank} ")
    assert "did not come in 0.2 minutes (run.peer_timeout_minutes)" in line


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a size-limited tmpfs needs root")
@pytest.mark.parametrize("case", [*(f"disk {size}" for size in DISKS), "disk that fills"])
def test_a_full_disk_ends_both_ranks_with_the_same_line_and_code(outcomes, case) -> None:
    found = outcomes[case]
    assert found["ended"], found["said"]
    assert found["codes"] == [2, 2], found["said"]
    lines = [line.removeprefix("rank 0: ") for line in errors(found["said"])]
    assert len(lines) == 2
    assert lines[0] == lines[1]
