"""Runs a file of tests in a process of its own, where Triton's kernels run in its interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(file: str, *options: str) -> None:
    """Run the tests of a file of this directory; pytest must pass."""
    pytest.importorskip("triton")
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
