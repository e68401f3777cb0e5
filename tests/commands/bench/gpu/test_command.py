"""`karat bench gpu` itself, on the CPU at toy sizes: the same code checks and times a card."""

import json
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from karat_scale.commands.bench.gpu import command
from karat_scale.commands.bench.gpu.report import SECTIONS
from karat_scale.commands.doctor.machine import driver_version, no_gpu
from tests.compilers import needs_compiler
from tests.conftest import ROOT, karat_command, karat_environment, karat_refuses, output_of, wait_until
from tests.data.backends.helpers import running

HEAVY = ("timm", "rich", "deepspeed", "torchvision", "pydantic", "yaml", "psutil", "webdataset")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("names", "right"),
    [
        (["attention", "loader", "ranks"], None),
        pytest.param(["losses"], True, marks=needs_compiler),
        pytest.param(["training"], None, marks=needs_compiler),
    ],
)
def test_sections_run_and_both_files_hold_their_figures(names: list[str], right: bool | None, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["bench", "gpu", "--device", "cpu", "--minutes", "10", "--only", *names, "--json", str(out)]
    output_of(*karat_command(arguments))
    result = json.loads(out.read_text())
    sections = result["sections"]
    assert list(sections) == names
    assert all(section["rows"] and not section["failed"] for section in sections.values())
    assert all(row["right"] for section in sections.values() for row in section["rows"] if "right" in row)
    assert not any("late" in one for section in sections.values() for one in section["left_out"])
    assert (result["finished"], result["right"]) == (True, right)
    markdown = (tmp_path / "gpu.md").read_text()
    assert result["verdict"] in markdown.splitlines()[0]
    assert all(f"#### {SECTIONS[name].title}" in markdown for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    line = karat_refuses("bench", "gpu", "--json", str(tmp_path / "gpu.json"))
    assert no_gpu(driver_version(), torch.version.cuda).value in line
    line = karat_refuses("bench", "gpu", "--device", "cpu", "--json", str(tmp_path / "gpu.md"))
    assert "the Markdown goes beside the JSON file; name that by --json, such as report.json" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torch_alone_is_enough_for_the_first_sections(tmp_path: Path) -> None:
    lacking = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"
    (tmp_path / "sitecustomize.py").write_text(lacking)
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--only", "loader", "kernels", "attention", "--json", str(out)]
    environment = {**karat_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    output_of(sys.executable, "-m", "karat_scale.commands.bench.gpu", *arguments, env=environment)
    sections = json.loads(out.read_text())["sections"]
    assert sections["kernels"]["rows"]
    assert sections["attention"]["rows"]
    assert "it needs timm, deepspeed" in sections["loader"]["left_out"][0]["why"]


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs sections with another program as worker, and returns exit code and report."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "other_worker")

    def run(worker: str, *only: str, minutes: float = 1.0) -> tuple[int, dict[str, Any]]:
        (tmp_path / "other_worker.py").write_text(f"import json, os, signal, sys, time\n{TELL}{worker}")
        options = Namespace(device="cpu", only=list(only), minutes=minutes, json=str(tmp_path / "gpu.json"))
        code = command.bench_gpu(options)
        return code, json.loads((tmp_path / "gpu.json").read_text())

    return run


TELL = """
def tell(**event):
    print(json.dumps(event), flush=True)

"""
CRASH = """
if sys.argv[1] == 'kernels':
    print('an illegal memory access', file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
tell(row={'case': 'ViT-Tiny', 'attention': 'SDPA'})
"""
HUNG = "hung: it has not moved for 0 s"
RANKS = "tell(begin='zero2'); tell(ended='ValueError: rank 1'); tell(ended='connection closed'); sys.exit(1)"
HUNGRY = """
batch = json.loads(sys.argv[2])['batch'] or 128
tell(**({'again': batch // 2} if batch > 32 else {'row': {'case': batch}}))
if batch > 32:
    tell(ended='OutOfMemoryError')
sys.exit(batch > 32)
"""


def test_a_section_that_crashes_is_told_and_the_others_still_run(run: Run) -> None:
    code, report = run(CRASH, "kernels", "attention")
    assert code == 1
    assert report["sections"]["kernels"]["failed"][0]["why"] == "ended by SIGSEGV\nan illegal memory access"
    assert report["sections"]["attention"]["rows"] == [{"case": "ViT-Tiny", "attention": "SDPA"}]


def test_a_section_that_cannot_run_takes_no_time_from_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RANKS_ON_A_CPU", 1)
    worker = "tell(row={'case': json.loads(sys.argv[2])['seconds']})"
    code, report = run(worker, "attention", "ranks", minutes=10.0)
    assert code == 0
    assert report["sections"]["attention"]["rows"][0]["case"] == pytest.approx(540, abs=30)
    assert report["sections"]["ranks"]["left_out"] == [{"what": "the section", "why": "there is one card"}]


IT = "the section"
HALVED = [f"out of memory, so the batch is {batch}" for batch in (64, 32)]
LATE = {"what": "ViT-Small, graphs", "why": "it was stopped after 3 s; give more by --minutes", "late": True}


@pytest.mark.parametrize(
    ("worker", "minutes", "code", "found"),
    [
        ("for what in 'ab': tell(failed={'what': what, 'why': 'it'})", 1, 1, {"failed": [("a", "it"), ("b", "it")]}),
        (RANKS, 1, 1, {"failed": [("zero2", "ValueError: rank 1")]}),  # of several ranks, the first to fail says why
        ("print('reason', file=sys.stderr); sys.exit(3)", 1, 1, {"failed": [(IT, "exit code 3\nreason")]}),
        ("tell(begin='ZeRO 3'); tell(moved=None); time.sleep(100)", 1, 1, {"failed": [("ZeRO 3", HUNG)]}),
        ("tell(begin='ViT-Small, graphs'); time.sleep(100)", 0.05, 0, {"failed": [], "left_out": [LATE]}),
        (HUNGRY, 1, 0, {"rows": [{"case": 32}], "notices": HALVED}),
    ],
)
def test_what_ends_a_section_is_reported(run, monkeypatch, worker, minutes, code, found) -> None:
    monkeypatch.setattr(command, "run_process", partial(command.run_process, hung=0.5))
    got, report = run(worker, "attention", minutes=minutes)
    section = report["sections"]["attention"]
    section["failed"] = [(one["what"], one["why"]) for one in section["failed"]]
    assert (got, {key: section[key] for key in found}) == (code, found)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_process_is_left_by_a_command_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["bench", "gpu", "--device", "cpu", "--only", "kernels", "--json", str(tmp_path / "gpu.json")]
    with subprocess.Popen(
        karat_command(arguments), stdout=subprocess.PIPE, text=True, env=karat_environment()
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline().startswith("CPU with")  # told by its process
        (worker,) = psutil.Process(bench.pid).children()
        bench.send_signal(number)
        said = bench.stdout.read()
    wait_until(lambda: not running(worker.pid))
    assert bench.returncode == (1 if number == signal.SIGTERM else -number)
    assert number == signal.SIGKILL or said.splitlines()[-1].startswith("interrupted; ")


def test_events_are_heard_among_other_lines() -> None:
    heard: list[tuple[str, Any]] = []
    code = """print('{"row": {"a": 1}}\\nchatter\\n12\\n{"notice": "half the batch"}')"""
    assert command.run_process([sys.executable, "-c", code], lambda *event: heard.append(event), 60) is None
    assert heard == [("row", {"a": 1}), ("notice", "half the batch")]


WATCHED = """
import threading, time
from karat_scale.commands.bench.gpu.worker import Channel, watch

def lock_twice():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def compute():
    ends = time.monotonic() + 6
    while time.monotonic() < ends:
        sum(range(10**5))

watch(Channel(1), "cpu", 3)
"""


def watched(does: str) -> str | None:
    return command.run_process([sys.executable, "-c", f"{WATCHED}{does}()"], lambda *_: None, 60, hung=3)


def test_a_process_that_waits_for_ever_is_hung_and_its_stack_is_told(monkeypatch) -> None:
    end = command._end

    def end_once_told(process: subprocess.Popen[bytes]) -> None:
        log = Path(f"/proc/{process.pid}/fd/2")
        wait_until(lambda: process.poll() is not None or "in lock_twice" in log.read_text())
        end(process)

    monkeypatch.setattr(command, "_end", end_once_told)
    assert re.fullmatch(r"hung: it has not moved for 3 s\n(.|\n)*in lock_twice", watched("lock_twice"))


@pytest.mark.slow
def test_a_process_that_works_is_not_hung() -> None:
    assert watched("compute") is None
