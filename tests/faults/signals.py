"""Send signals to any process of a run, in any phase. The same command must end in the bits of an undisturbed run.

    python -m tests.faults.signals --ranks 2 --stage 1 --signals 100 [--only SIGKILL] [--seed S] --json FILE

A run gets up to three signals, each in another start; then it is left to finish. A signal goes to a rank, to a data
worker, or to all ranks, a moment after the start, a wait for data, a step, a save, an evaluation or the end has begun,
or at any moment.
"""

import argparse
import faulthandler
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from karat_scale.commands.cli import EXIT_USAGE
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.foundation.errors import EXIT_INTERRUPTED, EXIT_LOST_PEER, EXIT_STOPPED
from tests.conftest import make_image_folder, run_script
from tests.faults import runs
from tests.faults.runs import FINISHES_WITHIN, Campaign, command_line, tiny_recipe, torn
from tests.training.forked_ranks import ForkedRanks

# What the ranks' heartbeats say in each phase; some phases have no heartbeats.
PHASES = {
    "start": (),
    "data": ("waiting for data",),
    "step": ("forward", "backward", "optimizer"),
    "save": ("saving", "snapshot"),
    "evaluate": ("evaluating",),
    "end": (),
    "any moment": (),
}
SIGNALS = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGSTOP", "SIGHUP")
TOO_LATE = "none: the run had ended"
MOMENT, STOPPED_FOR = 0.03, 1.5
SURVIVORS_END_WITHIN = 5.0


@dataclass
class Outcome(runs.Outcome):
    """The outcome of a campaign of signals, with what was tried."""

    signals: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[str]] = field(default_factory=dict)
    """The ranks' exit codes after each kind of signal."""
    survivors_ended: int = 0
    """Starts in which another rank had to be ended, as a launcher does, after one died."""
    tracebacks: Counter[str] = field(default_factory=Counter)
    """Starts with one in the log, by the kind of signal."""


class Signals(Campaign):
    outcome: Outcome

    def play(self, options: argparse.Namespace) -> Iterator[None]:
        self._random, self._names = random.Random(options.seed), options.only or SIGNALS
        number = 0
        while self.outcome.signals < options.signals and len(self.outcome.problems) < 20:
            number += 1
            run, problems = self.directory / f"run-{number}", []
            for _ in range(self._random.randint(1, 3)):
                self._disturb(run)
                problems += torn(run)
            self.end(run, "disturbed", problems)
            yield

    def _disturb(self, run: Path) -> None:
        """Start the run, send one signal, and note how the start ended."""
        outcome = self.outcome
        phase, name = self._random.choice(list(PHASES)), self._random.choice(self._names)
        read, write = os.pipe()
        begun = self.log(run).stat().st_size if self.log(run).is_file() else 0
        times = self._random.choice((1, 1, 2, 3, 7))
        ranks = self.start(run, lambda rank: _tell(phase, times, write))
        while ranks.all_run() and not select.select([read], [], [], 0.005)[0]:
            pass
        time.sleep(self._random.random() * (self.whole_seconds if phase == "any moment" else MOMENT))
        kind = self._send(ranks, name) or TOO_LATE
        deadly, ended = self._wait(ranks)
        os.close(read)
        os.close(write)
        outcome.signals += kind != TOO_LATE
        outcome.by_kind[kind] += 1
        outcome.by_phase[phase] += kind != TOO_LATE
        codes = [ranks.codes[pid] for pid in ranks.ranks]
        outcome.codes.setdefault(kind, Counter())[" ".join(map(str, codes))] += 1
        outcome.survivors_ended += deadly and not ended
        with self.log(run).open(errors="replace") as log:
            log.seek(begun)
            outcome.tracebacks[kind] += "Traceback" in log.read()
        if not ended and not deadly:
            outcome.problems.append(f"{kind} in {phase}: a start did not end in {FINISHES_WITHIN} s")
        # A rank with a killed worker ends with one line, and the other ranks lose that rank.
        allowed = {0, EXIT_STOPPED, *((EXIT_USAGE, EXIT_LOST_PEER) if "worker" in kind else ())}
        if not deadly and not set(codes) <= allowed:
            outcome.problems.append(f"{kind} in {phase}: exit codes {codes}")

    def _wait(self, ranks: ForkedRanks) -> tuple[bool, bool]:
        """Wait until all have ended. Return whether a signal ended one at once, and whether the others were in time."""
        deadline, deadly = time.monotonic() + FINISHES_WITHIN, False
        while ranks.running() and time.monotonic() < deadline:
            if not deadly and any(map(_is_deadly, ranks.codes.values())):
                deadline, deadly = time.monotonic() + SURVIVORS_END_WITHIN, True
            time.sleep(0.005)
        deadly = deadly or any(map(_is_deadly, ranks.codes.values()))
        return deadly, ranks.wait(0)

    def _send(self, ranks: ForkedRanks, name: str) -> str:
        """Send a signal to one process of the tree, or to all ranks.

        Return its name and where it went, or an empty text if the process had ended.
        """
        running, choice = ranks.running(), self._random.random()
        try:
            victims = [psutil.Process(self._random.choice(running or [0]))]
            workers = victims[0].children(recursive=True)
            whom = "a rank"
            if workers and choice < 0.4:
                victims, whom = [self._random.choice(workers)], "a worker"
            elif len(running) > 1 and choice > 0.7:
                victims, whom = [psutil.Process(pid) for pid in running], "all ranks"
            for victim in victims:
                victim.send_signal(signal.Signals[name])
            if name == "SIGSTOP":
                time.sleep(self._random.random() * STOPPED_FOR)
                for victim in victims:
                    victim.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            return ""
        return f"{name} to {whom}"


def _is_deadly(code: int) -> bool:
    """Return whether a signal killed a rank or interrupted it early. A launcher then ends the others."""
    return code < 0 or code == EXIT_INTERRUPTED


def _tell(phase: str, times: int, pipe: int) -> None:
    """In a rank, write to the pipe when the phase has begun `times` times. A phase without heartbeats begins once."""
    faulthandler.unregister(signal.SIGUSR1)
    left = [times if PHASES[phase] else 1]

    def begun() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.write(pipe, b".")

    if phase == "end":
        end = Reporter.end
        Reporter.end = lambda *what: (begun(), end(*what))[1]  # type: ignore[method-assign]
    elif not PHASES[phase]:
        begun()
    else:
        beat = Reporter.beat

        def noted(self: Reporter, doing: str, step: int = 0) -> None:
            if doing in PHASES[phase]:
                begun()
            beat(self, doing, step)

        Reporter.beat = noted  # type: ignore[method-assign]


def sharded_recipe(directory: Path, stage: str) -> Path:
    """Write the recipe of a tiny run with a data worker that reads shards; return its path."""
    images, shards = make_image_folder(directory / "images", {"train": 16, "val": 4}), directory / "shards"
    run_script("data_prep/make_webdataset.py", "--src", str(images), "--out", str(shards), "--shard-samples", "20")
    own = ("data.workers=1", "train.global_batch=32", "train.eval_batch=8")
    return tiny_recipe(directory, stage, *own, data=f"path: {shards}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send signals to the processes of a run in every phase.")
    parser.add_argument("--signals", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted(set(SIGNALS)), help="(default: all of these)")
    sys.exit(command_line(parser, Signals, Outcome, sharded_recipe))
