"""A step on a CPU does not get its memory from the kernel anew."""

import platform
import subprocess
import sys

import pytest

from tests.conftest import karat_environment

STEPS = """
import resource, sys
import torch
from karat_scale.engine.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(keep_freed_memory())
for step in range(35):
    if step == 15:
        before = faults()
    tensors = [torch.ones(2**21) for _ in range(8)]
    del tensors
print(faults() - before)
"""


def steps(**settings: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of 20 steps that write 64 MB each."""
    environment = {name: value for name, value in karat_environment().items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env={**environment, **settings}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    kept, faults = steps()
    assert kept
    for settings in ({"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}):
        given_back, more = steps(**settings)
        assert not given_back
        assert more > 10 * faults
