"""Runs that are killed before a call that changes a file, or get signals in any phase, end in the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import karat_environment, run_to_end

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="session")
def calls_library(tmp_path_factory) -> Path:
    """Compile calls.c, and return the library."""
    library = tmp_path_factory.mktemp("calls") / "calls.so"
    source = Path(__file__).with_name("calls.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.fixture
def campaign(share, record, tmp_path):
    """Return a function that plays a campaign of this directory, and returns its outcome.

    It asserts that there are no problems.
    """

    def play(program: str, *options: str, **environment: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        command = (sys.executable, "-m", f"tests.faults.{program}", "--seed", share.seed, *options, "--json", out)
        done = run_to_end(*command, env={**karat_environment(), **environment}, timeout=None)
        assert out.is_file(), done.stdout + done.stderr
        outcome = json.loads(out.read_text())
        record(outcome)
        assert outcome["problems"] == []
        return outcome

    return play


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_killed_before_a_call_it_ends_in_the_same_bits(ranks, stage, calls_library, share, campaign) -> None:
    which = [] if share.is_all else ["--tries", "3"]
    outcome = campaign("kill_calls", "--ranks", ranks, "--stage", stage, *which, LD_PRELOAD=str(calls_library))
    assert sum(outcome["kills"].values()) + outcome["not_reached"] == share.of(3, sum(outcome["calls"]))


@pytest.mark.parametrize(("ranks", "stage"), [("1", "0"), ("1", "2"), ("2", "0"), ("2", "1"), ("2", "3")])
def test_signals_change_no_bit(ranks, stage, share, campaign) -> None:
    count = share.of(3, 250)
    assert campaign("signals", "--ranks", ranks, "--stage", stage, "--signals", str(count))["signals"] >= count
