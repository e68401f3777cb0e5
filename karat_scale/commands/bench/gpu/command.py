"""The command itself: starts the sections' processes in turn, and never takes the card up itself."""

import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.bench.gpu.process import HungError, late, run_process
from karat_scale.commands.bench.gpu.report import DEFAULT_FILE, SECTIONS, Report, Section
from karat_scale.commands.doctor.machine import driver_version, no_gpu
from karat_scale.foundation.errors import UserError

# Seconds that a section may overrun: what it has begun is to end.
LONGEST_OVERRUN = 60.0
RANKS_ON_A_CPU = 2
WORKER = "karat_scale.commands.bench.gpu.worker"


def bench_gpu(device: str, only: Sequence[str], minutes: float, json_file: str | None) -> int:
    """Run the sections, print each figure as it comes, and keep JSON and Markdown up to date.

    Args:
        device: "cuda", or "cpu" to try the command at toy sizes.
        only: names of sections, in any order.
        minutes: for everything. A section stops when its share is used, and is ended when it overruns that.
        json_file: where the figures go; the Markdown goes beside it, with the suffix `.md`.

    Returns:
        0, or 1 where something is wrong or failed. What the time did not suffice for is neither.

    Raises:
        UserError: there is no CUDA device, or the files cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        reason = no_gpu(driver_version(), torch.version.cuda)
        raise UserError(f"karat bench gpu: {reason.value}; {reason.fix or 'run it on a machine with an NVIDIA GPU'}")
    chosen = [section for name, section in SECTIONS.items() if name in only]
    named = [] if len(chosen) == len(SECTIONS) else ["--only", *(section.name for section in chosen)]
    command = shlex.join(["karat", "bench", "gpu", "--device", device, "--minutes", f"{minutes:g}", *named])
    path = Path(json_file or DEFAULT_FILE)
    report = _open_report(path, command)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and a section's process too
    try:
        _run_all(chosen, device, minutes, report)
    except KeyboardInterrupt:
        print(f"interrupted; {path} has what was found before")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return report.finish()


def _run_all(chosen: Sequence[Section], device: str, minutes: float, report: Report) -> None:
    ends = time.monotonic() + 60 * minutes
    overrun = min(LONGEST_OVERRUN, 6 * minutes)
    ranks = torch.cuda.device_count() if device == "cuda" else RANKS_ON_A_CPU
    shares = {section.name: 0.0 if _lack(section, ranks) else section.share for section in chosen}
    for section in chosen:
        report.begin(section)
        if why := _lack(section, ranks):
            report.receive("left_out", {"what": "the section", "why": why})
        else:
            left = ends - time.monotonic()
            seconds = max(0.0, left - overrun) * section.share / sum(shares.values())
            _run(section, device, ranks, seconds, min(seconds + overrun, left), report)
        shares.pop(section.name)
        report.end()


def _lack(section: Section, ranks: int) -> str:
    """Return why a section cannot run here, or nothing."""
    if lacking := section.lacks():
        return f"it needs {', '.join(lacking)}"
    return "there is one card" if section.ranks and ranks < 2 else ""


def _open_report(path: Path, command: str) -> Report:
    report = Report(path, command)
    try:
        report.write()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name another file by --json") from None
    return report


def _run(section: Section, device: str, ranks: int, seconds: float, limit: float, report: Report) -> None:
    ends, batch = time.monotonic() + limit, None
    while True:
        left = ends - time.monotonic()
        with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
            settings = {"device": device, "seconds": min(seconds, left), "batch": batch, "scratch": scratch}
            batch = _run_once(_worker(section, settings, ranks), left, report)
        if batch is None:
            return
        report.receive("notice", f"out of memory, so the batch is {batch}")


def _run_once(command: Sequence[str], limit: float, report: Report) -> int | None:
    """Returns the batch to try again with, where the process asks for that."""
    heard: dict[str, Any] = {}

    def receive(kind: str, content: Any) -> None:
        if kind in ("again", "ended"):
            heard.setdefault(kind, content)  # of several ranks, the first to end knows why
        else:
            report.receive(kind, content)

    trouble: str | None = None
    try:
        trouble = run_process(command, receive, limit)
    except TimeoutError as error:
        if not heard:
            report.receive("left_out", late(report.running, str(error)))
    except HungError as error:
        trouble = str(error)
    if "again" in heard:
        return int(heard["again"])
    if why := heard.get("ended", trouble):
        report.receive("failed", {"what": report.running, "why": why})
    return None


def _worker(section: Section, settings: dict[str, Any], ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if section.ranks else []
    return [sys.executable, *launcher, "-m", WORKER, section.name, json.dumps(settings)]
