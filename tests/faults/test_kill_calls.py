"""A run is killed before a rename, a flush or a removal, and resumes to the same bits. See kill_calls.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, karat_environment


@pytest.fixture(scope="session")
def calls_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calls.c, compiled."""
    library = tmp_path_factory.mktemp("calls") / "calls.so"
    source = Path(__file__).with_name("calls.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_killed_before_a_call_it_ends_in_the_same_bits(ranks, stage, calls_library, share, record, tmp_path):
    out = tmp_path / "out.json"
    which = [] if share.is_all else ["--tries", "3", "--seed", str(share.seed)]
    command = [sys.executable, "-m", "tests.faults.kill_calls", "--ranks", str(ranks), "--stage", stage]
    environment = {**karat_environment(), "LD_PRELOAD": str(calls_library)}
    subprocess.run([*command, "--json", str(out), *which], env=environment, cwd=ROOT)
    outcome = json.loads(out.read_text())
    record(outcome)
    assert outcome["problems"] == []
    assert sum(outcome["kills"].values()) + outcome["not_reached"] == share.of(3, sum(outcome["calls"]))
