"""Tests of the C++ built with AddressSanitizer and UBSan by `KARAT_SANITIZE`, on damaged JPEGs and random calls."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.foundation import native_build
from tests.conftest import karat_environment, run_to_end

SETS = (*native_build._available_instruction_sets(), native_build.PLAIN)
# A fault ends the process. Python allocates by malloc, so that a read beyond a JPEG's end is seen.
OPTIONS = {
    "KARAT_SANITIZE": "address,undefined",
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONMALLOC": "malloc",
    "CXX": "g++",
}


def _runtime(name: str) -> str:
    """Return the path of one of the compiler's libraries, or an empty text without it."""
    try:
        done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return path if (path := done.stdout.strip()) and Path(path).is_file() else ""


RUNTIMES = [_runtime("libasan.so"), _runtime("libstdc++.so")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(RUNTIMES) or len(SETS) < 2, reason="no g++ with AddressSanitizer, or no AVX2"),
]


def sanitized(*arguments: str, isa: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python program that has the C++ built with sanitizers."""
    environment = {**karat_environment(), **OPTIONS, "LD_PRELOAD": " ".join(RUNTIMES), "KARAT_CPU_ISA": isa}
    return run_to_end(sys.executable, *arguments, env=environment, timeout=None)


def tried(program: str, count: int, seed: int, isa: str, last: Path) -> dict[str, int]:
    """Run a program of this directory; return what it counted. A sanitizer's report fails the test."""
    done = sanitized("-m", f"tests.faults.{program}", str(count), str(seed), str(last), isa=isa)
    fault = re.search(r"runtime error|AddressSanitizer|Traceback", done.stderr)
    kept = Path(last).read_bytes()[:2000] if last.is_file() else b""
    assert done.returncode == 0, f"{last}: {kept!r}\n{done.stderr[-4000:]}"
    assert not fault, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


FAULT = """
// Build with: portable
#include <cstdint>
extern "C" int find(const uint8_t* data, int at, int by) { return data[at] + at * by; }
"""


@pytest.mark.parametrize(
    ("at", "by", "said"), [(1, 1, ""), (64, 1, "heap-buffer-overflow"), (3, 2**30, "signed integer overflow")]
)
def test_a_fault_is_seen(at, by, said, tmp_path):
    """The sanitizers report a fault in compiled code, which the other tests rely on."""
    (tmp_path / "fault.cpp").write_text(FAULT)
    code = (
        "import ctypes, pathlib\n"
        "from karat_scale.foundation.native_build import load\n"
        f"library = load(pathlib.Path({str(tmp_path / 'fault.cpp')!r}), 'it')\n"
        f"library.find(ctypes.create_string_buffer(64), {at}, {by})\n"
    )
    done = sanitized("-c", code, isa=native_build.PLAIN)
    assert (done.returncode == 0) == (said == "")
    assert said in done.stderr


@pytest.mark.parametrize("isa", SETS)
def test_damaged_jpegs(isa, share, record, tmp_path):
    count = share.of(1000, 100_000 // len(SETS) + 1)
    # Each instruction set gets other files; tests/data/decoders checks that all of them give the same pixels.
    counts = tried("jpegs", count, share.seed * len(SETS) + SETS.index(isa), isa, tmp_path / "last.jpg")
    record(counts)
    assert min(counts["decoded"], counts["refused"], counts["recoded"], counts["not recoded"]) > count // 20


@pytest.mark.parametrize("isa", SETS[:-1])
def test_attention_of_any_shape(isa, share, record, tmp_path):
    count = share.of(60, 5000)
    counts = tried("attention_shapes", count, share.seed, isa, tmp_path / "last.txt")
    record(counts)
    assert counts["problems"] == []
    assert counts["right"] == count
