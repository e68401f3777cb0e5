"""The command itself: starts the sections' processes in turn, and never takes the card up itself."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from karat_scale.bench.gpu.process import run_process
from karat_scale.bench.gpu.report import Report
from karat_scale.bench.gpu.sections import DEFAULT_FILE, SECTIONS, Section
from karat_scale.errors import UserError

# Seconds that a section may overrun: what it has begun is to end.
LONGEST_OVERRUN = 60.0
RANKS_ON_A_CPU = 2
WORKER = "karat_scale.bench.gpu.worker"


def bench_gpu(device: str, only: Sequence[str], minutes: float, json_file: str | None) -> int:
    """Run the sections, print each figure as it comes, and keep JSON and Markdown up to date.

    Args:
        device: "cuda", or "cpu" to try the command at toy sizes.
        only: names of sections, in any order.
        minutes: for everything. A section stops when its share is used, and is ended when it overruns that.
        json_file: where the figures go; the Markdown goes beside it, with the suffix `.md`.

    Returns:
        0, or 1 where a value, gradient or dtype is wrong or something that should have run did not.

    Raises:
        UserError: there is no CUDA device, or the files cannot be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("karat bench gpu: torch sees no CUDA device; run it on a machine with an NVIDIA GPU")
    chosen = [section for name, section in SECTIONS.items() if name in only]
    named = [] if len(chosen) == len(SECTIONS) else ["--only", *(section.name for section in chosen)]
    command = shlex.join(["karat", "bench", "gpu", "--device", device, "--minutes", f"{minutes:g}", *named])
    report = _open_report(Path(json_file or DEFAULT_FILE), command)
    ends = time.monotonic() + 60 * minutes
    overrun = min(LONGEST_OVERRUN, 6 * minutes)
    for number, section in enumerate(chosen):
        left = ends - time.monotonic()
        seconds = max(0.0, left - overrun) * section.share / sum(later.share for later in chosen[number:])
        report.begin(section)
        _run(section, device, seconds, min(seconds + overrun, left), report)
        report.end()
    return report.finish()


def _open_report(path: Path, command: str) -> Report:
    report = Report(path, command)
    try:
        report.write()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name another file by --json") from None
    return report


def _run(section: Section, device: str, seconds: float, limit: float, report: Report) -> None:
    if lacking := section.lacks():
        report.receive("left_out", {"what": "the section", "why": f"it needs {', '.join(lacking)}"})
        return
    ranks = torch.cuda.device_count() if device == "cuda" else RANKS_ON_A_CPU
    if section.ranks and ranks < 2:
        report.receive("left_out", {"what": "the section", "why": "there is one card"})
        return
    ends, batch = time.monotonic() + limit, None
    while True:
        left = ends - time.monotonic()
        settings = {"device": device, "seconds": min(seconds, left), "batch": batch}
        batch = _run_once(_worker(section, settings, ranks), left, report)
        if batch is None:
            return
        report.receive("notice", f"out of memory, so the batch is {batch}")


def _run_once(command: Sequence[str], limit: float, report: Report) -> int | None:
    """Returns the batch to try again with, where the process asks for that."""
    ended: dict[str, Any] = {}

    def receive(kind: str, content: Any) -> None:
        if kind in ("again", "failed"):
            ended[kind] = content
        else:
            report.receive(kind, content)

    trouble = run_process(command, receive, limit)
    if "again" in ended:  # what it failed of is out of memory
        return int(ended["again"])
    if "failed" in ended or trouble:
        report.receive("failed", ended.get("failed", {"what": "the section's process", "why": trouble}))
    return None


def _worker(section: Section, settings: dict[str, Any], ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if section.ranks else []
    return [sys.executable, *launcher, "-m", WORKER, section.name, json.dumps(settings)]
