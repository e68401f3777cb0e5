"""The command itself: starts the sections' processes in turn, reads their output, and never uses the card itself."""

import argparse
import json
import math
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import torch

from karat_scale.commands.bench.gpu.report import DEFAULT_FILE, SECTIONS, Report, Section
from karat_scale.commands.bench.gpu.worker import HUNG_SECONDS, late
from karat_scale.commands.doctor.machine import driver_version, no_gpu
from karat_scale.foundation.errors import UserError

# Seconds that a section may overrun, to finish the part that it has begun.
LONGEST_OVERRUN = 60.0
RANKS_ON_A_CPU = 2
WORKER = "karat_scale.commands.bench.gpu.worker"
# On SIGTERM, torchrun ends its ranks, which are in sessions of their own.
GRACE = 10.0
LINES_OF_LOG = 12
_POLL_SECONDS = 0.2
_STACK = "(most recent call first):"


def bench_gpu(options: argparse.Namespace) -> int:
    """Run the sections, print each figure as it comes, and keep JSON and Markdown up to date.

    A section stops when its share of `--minutes` is used, and is killed if it overruns that for too long. The Markdown
    goes next to the JSON, with the suffix `.md`.

    Returns:
        0, or 1 if something is wrong, failed or was interrupted. Parts left out for lack of time do not count.

    Raises:
        UserError: there is no CUDA device, or the files cannot be written.
    """
    device, minutes = options.device, options.minutes
    if device == "cuda" and not torch.cuda.is_available():
        reason = no_gpu(driver_version(), torch.version.cuda)
        raise UserError(f"karat bench gpu: {reason.value}; {reason.fix or 'run it on a machine with an NVIDIA GPU'}")
    chosen = [section for name, section in SECTIONS.items() if name in options.only]
    named = [] if len(chosen) == len(SECTIONS) else ["--only", *(section.name for section in chosen)]
    command = shlex.join(["karat", "bench", "gpu", "--device", device, "--minutes", f"{minutes:g}", *named])
    path = Path(options.json or DEFAULT_FILE)
    if path.suffix == ".md":
        raise UserError(f"{path}: the Markdown goes beside the JSON file; name that by --json, such as report.json")
    report = Report(path, command)
    try:
        report.write()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name another file by --json") from None
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

    def lack(section: Section) -> str:
        if lacking := [name for name in section.packages if find_spec(name) is None]:
            return f"it needs {', '.join(lacking)}"
        return "there is one card" if section.ranks and ranks < 2 else ""

    shares = {section.name: 0.0 if lack(section) else section.share for section in chosen}
    for section in chosen:
        report.begin(section)
        if why := lack(section):
            report.receive("left_out", {"what": "the section", "why": why})
        else:
            left = ends - time.monotonic()
            seconds = max(0.0, left - overrun) * section.share / sum(shares.values())
            _run(section, device, ranks, seconds, min(seconds + overrun, left), report)
        shares.pop(section.name)
        report.end()


def _run(section: Section, device: str, ranks: int, seconds: float, limit: float, report: Report) -> None:
    """Run a section in a process, and again with a smaller batch as long as it asks for that."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if section.ranks else []
    ends, batch = time.monotonic() + limit, None
    while True:
        left = ends - time.monotonic()
        heard: dict[str, Any] = {}

        def receive(kind: str, content: Any, heard: dict[str, Any] = heard) -> None:
            if kind in ("again", "ended"):
                heard.setdefault(kind, content)  # of several ranks, the first to end knows why
            else:
                report.receive(kind, content)

        trouble: str | None = None
        with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
            settings = {"device": device, "seconds": min(seconds, left), "batch": batch, "scratch": scratch}
            command = [sys.executable, *launcher, "-m", WORKER, section.name, json.dumps(settings)]
            try:
                trouble = run_process(command, receive, left)
            except TimeoutError as error:
                if not heard:
                    report.receive("left_out", late(report.running, str(error)))

        if "again" not in heard:
            if why := heard.get("ended", trouble):
                report.receive("failed", {"what": report.running, "why": why})
            return
        batch = int(heard["again"])
        report.receive("notice", f"out of memory, so the batch is {batch}")


def run_process(
    command: Sequence[str], receive: Callable[[str, Any], None], seconds: float, hung: float = HUNG_SECONDS
) -> str | None:
    """Run `command` for at most `seconds`; `receive` gets the kind and the content of each event as it comes.

    Returns why it failed, with the last lines of its standard error; None if it ended well. A process that has reported
    progress, but not for the last `hung` seconds, is killed, and the reason has its stack.

    Raises:
        TimeoutError: it was killed, as the time was up.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        assert process.stdout is not None
        pipe, ends, moved, told = process.stdout.fileno(), time.monotonic() + seconds, math.inf, b""
        is_late = is_hung = False
        try:
            while not (is_late or is_hung):
                if select.select([pipe], [], [], _POLL_SECONDS)[0]:
                    if not (more := os.read(pipe, 1 << 16)):
                        break
                    *lines, told = (told + more).split(b"\n")
                    for kind, content in (event for line in lines for event in _events(line)):
                        if kind == "moved":
                            moved = time.monotonic()
                        else:
                            receive(kind, content)
                is_hung, is_late = time.monotonic() - moved > hung, time.monotonic() > ends
            else:
                _end(process)
            code = process.wait()
        finally:
            _end(process)
            process.stdout.close()
        if code == 0:
            return None
        if is_hung:
            return f"hung: it has not moved for {hung:.0f} s\n{_stack(log)}".strip()
        if is_late:
            raise TimeoutError(f"it was stopped after {seconds:.0f} s")
        ending = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "\n".join([ending, *_lines(log)[-LINES_OF_LOG:]])


def _events(line: bytes) -> Iterable[tuple[str, Any]]:
    """Return the events of a line; none if a library wrote it."""
    try:
        event = json.loads(line)
    except ValueError:
        return ()
    return event.items() if isinstance(event, dict) else ()


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return


def _stack(log: IO[bytes]) -> str:
    """Return the last stack that faulthandler wrote, which is that of a main thread, with its last call at the end."""
    lines = _lines(log)
    begins = max((number for number, line in enumerate(lines) if line.endswith(_STACK)), default=len(lines))
    calls = list(takewhile(lambda line: line.startswith("  File "), lines[begins + 1 :]))
    return "\n".join(call.strip() for call in calls[:LINES_OF_LOG][::-1])


def _lines(log: IO[bytes]) -> list[str]:
    log.seek(0)
    return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
