"""An emulated NVML library for processes that tests start, since a test machine has no unsound GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "emulated_nvml.c"


def nvml_environment(directory: Path, fault: str, node: str = "") -> dict[str, str]:
    """Build the library in `directory`; return the variables that let a process find it, with a fault.

    If `node` is given, only that node has the fault. Without a C compiler or nvidia-ml-py the test is skipped.
    """
    pytest.importorskip("pynvml")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", directory / "libnvidia-ml.so.1", SOURCE], check=True)
    paths = [str(directory), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    found = {"LD_LIBRARY_PATH": ":".join(paths), "NVML_FAULT": fault}
    return found | ({"NVML_NODE": node} if node else {})
