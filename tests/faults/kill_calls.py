"""Kill a run before each call by which it renames, flushes or removes a file, and see that it ends in the same bits.

    LD_PRELOAD=calls.so python -m tests.faults.kill_calls --ranks 2 --stage 1 [--tries N] [--seed S] --json FILE

An undisturbed run counts the calls of each rank. Then one rank is killed before its k-th call, for each k, or for
`--tries` of them. After each kill no checkpoint that `latest` or `best` names may be torn; the same command must
finish the run, and leave what the undisturbed one left.
"""

import argparse
import ctypes
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.faults.runs import differing, imported, left_by, left_over, tiny_recipe, torn
from tests.training.forked_ranks import ForkedRanks

FINISHES_WITHIN = 120.0
SURVIVORS_END_WITHIN = 1.0


@dataclass
class Outcome:
    """What was tried and found; `problems` is empty when all is well."""

    ranks: int
    stage: str
    calls: list[int] = field(default_factory=list)
    """Of each rank in an undisturbed run."""
    kills: dict[str, int] = field(default_factory=dict)
    """By the call that was about to come."""
    not_reached: int = 0
    """Runs that ended before the call: with two threads, the number of calls is not always the same."""
    left_over: list[str] = field(default_factory=list)
    """Temporary files that were still there after the next start had finished the run, and the call before the kill."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Runs of one recipe in one directory."""

    def __init__(self, recipe: Path, directory: Path, outcome: Outcome) -> None:
        self._recipe, self._directory, self._outcome = recipe, directory, outcome
        whole = directory / "whole"
        self._run(whole, 0, 0).wait(FINISHES_WITHIN)
        self._expected = left_by(whole)
        outcome.calls = [len(self._trace(whole, rank)) for rank in range(outcome.ranks)]

    def points(self) -> list[tuple[int, int]]:
        """All (rank, call) of an undisturbed run."""
        return [(rank, call + 1) for rank, calls in enumerate(self._outcome.calls) for call in range(calls)]

    def kill(self, rank: int, call: int) -> None:
        """Kill `rank` before its `call`-th call, look, and run the same command again."""
        run = self._directory / f"rank{rank}-call{call}"
        ranks = self._run(run, rank, call)
        while ranks.all_run():
            time.sleep(0.002)
        ranks.wait(SURVIVORS_END_WITHIN)  # one that waits for the dead is ended, as by a launcher
        trace = self._trace(run, rank)
        if len(trace) < call:
            self._outcome.not_reached += 1
        else:
            kind = trace[-1].split()[1]
            self._outcome.kills[kind] = self._outcome.kills.get(kind, 0) + 1
        problems = torn(run)
        again = self._run(run, rank, 0)
        if not again.wait(FINISHES_WITHIN) or any(again.codes.values()):
            problems.append(f"exit codes {list(again.codes.values())} of the next start")
        else:
            different = differing(left_by(run), self._expected)
            problems += [f"{', '.join(different)} differ"] if different else []
            self._outcome.left_over += [f"{trace[-1]}: {name}" for name in left_over(run)]
        if problems:
            log = (self._directory / f"{run.name}.log").read_text()[-2000:]
            self._outcome.problems.append(f"killed before {trace[-1:]}: {'; '.join(problems)}\n{log}")
        shutil.rmtree(run)

    def _run(self, run: Path, rank: int, call: int) -> ForkedRanks:
        arguments = ["train", str(self._recipe), f"run.dir={run}"]
        log = self._directory / f"{run.name}.log"
        return ForkedRanks(arguments, self._outcome.ranks, log, partial(self._arm, run, rank, call))

    def _arm(self, run: Path, victim: int, call: int, rank: int) -> None:
        """In the rank: its own count from now on, and the call before which it dies."""
        log = self._trace_file(run, rank)
        log.unlink(missing_ok=True)
        arm = ctypes.CDLL(None).karat_faults_arm
        arm.argtypes = ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p
        arm(bytes(run), call if rank == victim else 0, bytes(log))

    def _trace_file(self, run: Path, rank: int) -> Path:
        return self._directory / f"{run.name}.calls-{rank}"

    def _trace(self, run: Path, rank: int) -> list[str]:
        file = self._trace_file(run, rank)
        return file.read_text().splitlines() if file.is_file() else []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill a run before its renames, flushes and removals.")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", default="0", help="a file of ds_configs, such as 3_offload")
    parser.add_argument("--tries", type=int, help="(default: every call)")
    parser.add_argument("--seed", type=int, default=0, help="of the calls that are chosen")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the outcome there")
    options = parser.parse_args()
    outcome, begun = Outcome(options.ranks, options.stage), time.monotonic()
    imported()
    with tempfile.TemporaryDirectory(prefix="karat-faults-") as name:
        campaign = Campaign(tiny_recipe(Path(name), options.stage), Path(name), outcome)
        points = campaign.points()
        if options.tries is not None:
            points = random.Random(options.seed).sample(points, min(options.tries, len(points)))
        for number, point in enumerate(points, start=1):
            campaign.kill(*point)
            outcome.seconds = round(time.monotonic() - begun, 1)
            options.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
            print(f"{number}/{len(points)} kills, {len(outcome.problems)} problems, {outcome.seconds} s", flush=True)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
