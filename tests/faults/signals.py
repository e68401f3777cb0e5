"""Signals to any process of a run, in any phase of it: the same command must end in the bits of an undisturbed run.

    python -m tests.faults.signals --ranks 2 --stage 1 --signals 100 [--seed S] --json FILE

A run gets up to three signals, each in another start; then it is left to finish. A signal goes to a rank or to a data
worker, a moment after the start, a wait for data, a step, a save, an evaluation or the end has begun.
"""

import argparse
import faulthandler
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from karat_scale.commands.cli import EXIT_USAGE
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.foundation.errors import EXIT_STOPPED
from tests.faults.runs import TINY, differing, imported, left_by, torn
from tests.torture import prepare
from tests.training.forked_ranks import ForkedRanks

# What the ranks' heartbeats say in each phase; the first and the last have none.
PHASES = {
    "start": (),
    "data": ("waiting for data",),
    "step": ("forward", "backward", "optimizer"),
    "save": ("saving", "snapshot"),
    "evaluate": ("evaluating",),
    "end": (),
}
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGHUP")
WORKERS = ("data.workers=1", "train.global_batch=32", "train.eval_batch=8")
TOO_LATE = "none: the run had ended"
MOMENT, STOPPED_FOR = 0.03, 1.5
FINISHES_WITHIN, SURVIVORS_END_WITHIN = 180.0, 5.0


@dataclass
class Outcome:
    """What was tried and found; `problems` is empty when all is well."""

    ranks: int
    stage: str
    signals: int = 0
    runs: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    """The ranks' exit codes after each kind of signal."""
    survivors_ended: int = 0
    """Starts in which another rank had to be ended, as a launcher does, after one died."""
    tracebacks: Counter[str] = field(default_factory=Counter)
    """Starts with one in the log, by the kind of signal."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Runs of one recipe in one directory."""

    def __init__(self, recipe: Path, directory: Path, outcome: Outcome, seed: int) -> None:
        self._recipe, self._directory, self._outcome = recipe, directory, outcome
        self._random = random.Random(seed)
        self._finish(directory / "whole")
        self._expected = left_by(directory / "whole")

    def run(self) -> None:
        """One run with its signals."""
        run = self._directory / f"run-{self._outcome.runs}"
        self._outcome.runs += 1
        problems = []
        for _ in range(self._random.randint(1, 3)):
            self._disturb(run)
            problems += torn(run)
        problems += self._finish(run) or [f"{part} differ" for part in differing(left_by(run), self._expected)]
        if problems:
            said = self._log(run).read_text()[-3000:]
            self._outcome.problems.append(f"{run.name}: {'; '.join(problems)}\n{said}")
        shutil.rmtree(run, ignore_errors=True)

    def _finish(self, run: Path) -> list[str]:
        ranks = self._start(run, lambda rank: None)
        ended = ranks.wait(FINISHES_WITHIN)
        return (
            [] if ended and not any(ranks.codes.values()) else [f"the last start ends with {[*ranks.codes.values()]}"]
        )

    def _disturb(self, run: Path) -> None:
        """One start and one signal."""
        phase, name = self._random.choice(list(PHASES)), self._random.choice(SIGNALS)
        read, write = os.pipe()
        begun = self._log(run).stat().st_size if self._log(run).is_file() else 0
        times = self._random.choice((1, 1, 2, 3, 7))
        ranks = self._start(run, lambda rank: _tell(phase, times, write))
        while ranks.all_run() and not select.select([read], [], [], 0.005)[0]:
            pass
        time.sleep(self._random.random() * MOMENT)
        kind = self._send(ranks, name) or TOO_LATE
        deadly, ended = self._wait(ranks)
        os.close(read)
        os.close(write)
        outcome = self._outcome
        outcome.signals += kind != TOO_LATE
        outcome.by_kind[kind] += 1
        outcome.by_phase[phase] += kind != TOO_LATE
        codes = [ranks.codes[pid] for pid in ranks.ranks]
        outcome.codes.setdefault(kind, Counter())[" ".join(map(str, codes))] += 1
        outcome.survivors_ended += deadly and not ended
        with self._log(run).open(errors="replace") as log:
            log.seek(begun)
            outcome.tracebacks[kind] += "Traceback" in log.read()
        if not ended and not deadly:
            outcome.problems.append(f"{kind} in {phase}: a start did not end in {FINISHES_WITHIN} s")
        # A worker that is killed is one line, of which all ranks hear.
        allowed = {0, EXIT_STOPPED, *((EXIT_USAGE,) if "worker" in kind else ())}
        if not deadly and not set(codes) <= allowed:
            outcome.problems.append(f"{kind} in {phase}: exit codes {codes}")

    def _wait(self, ranks: ForkedRanks) -> tuple[bool, bool]:
        """Until all have ended. Returns whether a signal killed a rank, and whether the others then ended in time."""
        deadline, deadly = time.monotonic() + FINISHES_WITHIN, False
        while ranks.running() and time.monotonic() < deadline:
            if not deadly and any(code < 0 for code in ranks.codes.values()):
                deadline, deadly = time.monotonic() + SURVIVORS_END_WITHIN, True
            time.sleep(0.005)
        deadly = deadly or any(code < 0 for code in ranks.codes.values())
        return deadly, ranks.wait(0)

    def _send(self, ranks: ForkedRanks, name: str) -> str:
        """Send a signal to one process of the tree; returns its name and whom it went to."""
        try:
            victim = psutil.Process(self._random.choice(ranks.running() or [0]))
            workers = victim.children(recursive=True)
            whom = "a rank"
            if workers and self._random.random() < 0.4:
                victim, whom = self._random.choice(workers), "a worker"
            victim.send_signal(signal.Signals[name])
            if name == "SIGSTOP":
                time.sleep(self._random.random() * STOPPED_FOR)
                victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return ""
        return f"{name} to {whom}"

    def _start(self, run: Path, first: Any) -> ForkedRanks:
        arguments = ["train", str(self._recipe), f"run.dir={run}"]
        return ForkedRanks(arguments, self._outcome.ranks, self._log(run), first)

    def _log(self, run: Path) -> Path:
        return self._directory / f"{run.name}.log"


def _tell(phase: str, times: int, pipe: int) -> None:
    """In a rank: write to the pipe when the phase has begun so many times."""
    faulthandler.unregister(signal.SIGUSR1)
    left = [times]

    def begun() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(pipe, b".")

    if phase == "start":
        left[0] = 1
        begun()
    elif phase == "end":
        left[0] = 1
        end = Reporter.end
        Reporter.end = lambda *what: (begun(), end(*what))[1]  # type: ignore[method-assign]
    else:
        beat = Reporter.beat

        def noted(self: Reporter, doing: str, step: int = 0) -> None:
            if doing in PHASES[phase]:
                begun()
            beat(self, doing, step)

        Reporter.beat = noted  # type: ignore[method-assign]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Send signals to the processes of a run in every phase.")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", default="0", help="a file of ds_configs, such as 3_offload")
    parser.add_argument("--signals", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of signals, moments and victims")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the outcome there")
    options = parser.parse_args()
    outcome, begun = Outcome(options.ranks, options.stage), time.monotonic()
    imported()
    with tempfile.TemporaryDirectory(prefix="karat-faults-") as name:
        recipe = prepare(Path(name), options.stage, [*TINY, *WORKERS])
        campaign = Campaign(recipe, Path(name), outcome, options.seed)
        while outcome.signals < options.signals and len(outcome.problems) < 20:
            campaign.run()
            outcome.seconds = round(time.monotonic() - begun, 1)
            options.json.write_text(json.dumps(vars(outcome), indent=2) + "\n")
            print(f"{outcome.signals} signals, {len(outcome.problems)} problems, {outcome.seconds} s", flush=True)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
