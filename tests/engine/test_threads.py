"""A machine that allows too few threads, found by starting runs under smaller and smaller limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, karat_environment

# Root has no such limit. Another user has, who may read all that the tests read.
AS_ANOTHER = (
    *("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"),
    *("--inh-caps=+dac_override,+dac_read_search", "--ambient-caps=+dac_override,+dac_read_search"),
)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2, 4, 8, 12])
def test_too_few_threads_are_one_line_and_no_hang(limit: int, tmp_path: Path) -> None:
    if os.getuid() != 0 or subprocess.run([*AS_ANOTHER, "true"], capture_output=True).returncode:
        pytest.skip("changing the user needs root and setpriv")
    tmp_path.chmod(0o777)
    train = (
        *(sys.executable, "-m", "karat_scale", "train", "fashion_mnist_demo", "data.backend=synthetic"),
        *("data.synthetic_samples=64", "train.global_batch=32", "train.max_steps=2", f"run.dir={tmp_path / 'run'}"),
    )
    command = [*AS_ANOTHER, "bash", "-c", f'ulimit -u {limit}; exec "$@"', "bash", *train]
    environment = {**karat_environment(), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "OpenBLAS" not in line]
    assert line.startswith("error: no more processes or threads; raise `ulimit -u`")
