"""Kill a run before each call that renames, flushes or removes a file, and check that it ends in the same bits.

    LD_PRELOAD=calls.so python -m tests.faults.kill_calls --ranks 2 --stage 1 [--tries N] [--seed S] --json FILE

An undisturbed run counts the calls of each rank. Then one rank is killed before its k-th call, for each k, or for
`--tries` of them. After each kill, no checkpoint that `latest` or `best` names may be torn. The same command must then
finish the run, and leave what the undisturbed run left.
"""

import argparse
import ctypes
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import runs
from tests.faults.runs import Campaign, command_line, tiny_recipe, torn
from tests.training.forked_ranks import ForkedRanks

SURVIVORS_END_WITHIN = 1.0


@dataclass
class Outcome(runs.Outcome):
    """The outcome of a campaign of kills, with what was tried."""

    calls: list[int] = field(default_factory=list)
    """Of each rank in an undisturbed run."""
    kills: Counter[str] = field(default_factory=Counter)
    """By the call that was about to come."""
    not_reached: int = 0
    """Runs that ended before the call: with two threads, the number of calls is not always the same."""


class Kills(Campaign):
    outcome: Outcome
    _victim, _call = 0, 0

    def play(self, options: argparse.Namespace) -> Iterator[None]:
        calls = self.outcome.calls = [len(self._trace("whole", rank)) for rank in range(self.outcome.ranks)]
        points = [(rank, call + 1) for rank, count in enumerate(calls) for call in range(count)]
        if options.tries is not None:
            points = random.Random(options.seed).sample(points, min(options.tries, len(points)))
        for rank, call in points:
            self._kill(rank, call)
            yield

    def _kill(self, rank: int, call: int) -> None:
        """Kill `rank` before its `call`-th call, look for torn checkpoints, and run the same command again."""
        run = self.directory / f"rank{rank}-call{call}"
        self._victim, self._call = rank, call
        ranks = self.start(run)
        self._call = 0
        while ranks.all_run():
            time.sleep(0.002)
        ranks.wait(SURVIVORS_END_WITHIN)  # a rank that waits for the killed one is ended, as a launcher would end it
        trace = self._trace(run.name, rank)
        if len(trace) < call:
            self.outcome.not_reached += 1
        else:
            self.outcome.kills[trace[-1].split()[1]] += 1
        self.end(run, f"killed before {trace[-1:]}", torn(run))

    def start(self, run: Path, prepare: Callable[[int], object] = lambda rank: None) -> ForkedRanks:
        return super().start(run, lambda rank: self._arm(run, rank))

    def _arm(self, run: Path, rank: int) -> None:
        """In a rank, count its calls from now on, and set the call before which it is killed."""
        log = self._trace_file(run.name, rank)
        log.unlink(missing_ok=True)
        arm = ctypes.CDLL(None).karat_faults_arm
        arm.argtypes = ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p
        arm(bytes(run), self._call if rank == self._victim else 0, bytes(log))

    def _trace_file(self, run: str, rank: int) -> Path:
        return self.directory / f"{run}.calls-{rank}"

    def _trace(self, run: str, rank: int) -> list[str]:
        file = self._trace_file(run, rank)
        return file.read_text().splitlines() if file.is_file() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a run before its renames, flushes and removals.")
    parser.add_argument("--tries", type=int, help="(default: every call)")
    sys.exit(command_line(parser, Kills, Outcome, tiny_recipe))
