"""Run a file of tests in its own process, where Triton's interpreter runs the kernels on the CPU."""

import sys
from pathlib import Path

import pytest

from tests.conftest import karat_environment, output_of


def run_interpreted(file: str, *options: str) -> None:
    """Run the tests of a file of this directory in Triton's interpreter, and fail if pytest fails."""
    pytest.importorskip("triton")
    path = Path(__file__).with_name(file)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, *options)
    output_of(*command, env={**karat_environment(), "TRITON_INTERPRET": "1"}, timeout=None)
