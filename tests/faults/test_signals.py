"""Signals to the processes of a run, in every phase, change none of its bits: tests/faults/signals.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, karat_environment


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "stage"), [(1, "0"), (1, "2"), (2, "0"), (2, "1"), (2, "3")])
def test_signals_change_no_bit(ranks: int, stage: str, share, record, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = {"--ranks": ranks, "--stage": stage, "--signals": share.of(3, 250), "--seed": share.seed, "--json": out}
    options = [str(part) for option in arguments.items() for part in option]
    subprocess.run([sys.executable, "-m", "tests.faults.signals", *options], env=karat_environment(), cwd=ROOT)
    outcome = json.loads(out.read_text())
    record(outcome)
    assert outcome["problems"] == []
    assert outcome["signals"] >= share.of(3, 250)
