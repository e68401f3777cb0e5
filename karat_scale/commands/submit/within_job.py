"""What slurm/launch.sh asks within a job: how many of its nodes can train a recipe, which rank hangs, which GPU is bad.

    python -m karat_scale.commands.submit.within_job nodes NODES RANKS_PER_NODE COMMAND RECIPE [key=value ...] [--trust]
    python -m karat_scale.commands.submit.within_job watch RUN --ranks N --stall LIMITS
    python -m karat_scale.commands.submit.within_job faults

COMMAND is train or detect, and LIMITS are those of `StallLimits`. The watch runs beside the ranks. Its exit code 3: a
rank made no progress for that long; a line on standard output names the rank and its node. Clocks of other nodes do not
matter: only the time at which this process last saw a file change counts. For a rank that is only slow, there is a line
on standard error. The faults are those of this node's GPUs, one on a line.
"""

import argparse
import math
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from karat_scale.engine import heartbeat
from karat_scale.foundation.arguments import OneLineParser, add_trust
from karat_scale.foundation.errors import run_script
from karat_scale.foundation.machine import gpu_faults

if TYPE_CHECKING:
    from karat_scale.recipe.schema import RunRecipe

EXIT_STALLED = 3
# A rank dumps its stacks at `stall`, and writes its file. The verdict comes a little later, so that both are there.
GRACE_SECONDS = heartbeat.WRITE_SECONDS
# A process without a new file for that long is stopped or gone, whatever its ranks wait for.
_SILENT_SECONDS = 4 * heartbeat.WRITE_SECONDS


@dataclass
class Seen:
    """A rank's newest heartbeat, and when this process saw it make progress and write."""

    sign: heartbeat.Sign
    got_on: float
    wrote: float


class Watch:
    """Remembers when each rank made progress; a verdict names the rank that the others wait for."""

    def __init__(self, ranks: int, limits: heartbeat.StallLimits, now: float) -> None:
        self._ranks = ranks
        self._limits = limits
        self._begun = now
        self._seen: dict[int, Seen] = {}

    def look(self, signs: list[heartbeat.Sign], now: float) -> str | None:
        """Add the ranks' heartbeats at time `now` in seconds. Return a verdict, or None while a rank makes progress."""
        for sign in signs:
            seen = self._seen.get(sign.rank)
            if seen is None or (sign.beats, sign.moves) != (seen.sign.beats, seen.sign.moves):
                self._seen[sign.rank] = Seen(sign, now - sign.since_beat, now)
            elif sign.written != seen.sign.written:
                seen.sign, seen.wrote = sign, now
        if absent := [rank for rank in range(self._ranks) if rank not in self._seen]:
            start = self._limits.of("starting")
            return f"rank {absent[0]} gave no sign of life in {start:g} s" if now - self._begun > start else None
        if now <= self.deadline:
            return None  # such as a rank that writes to a slow disk: the others wait for it
        silent = [seen for seen in self._seen.values() if now - seen.wrote > _SILENT_SECONDS]
        worst = min(silent or self._seen.values(), key=lambda seen: (seen.sign.beats, seen.got_on))
        sign, seconds = worst.sign, now - worst.got_on
        how = "stopped or gone, no stacks" if worst in silent else "its stacks are in its log"
        others = sum(seen.sign.beats > sign.beats for seen in self._seen.values())
        waiting = f"; {others} of {self._ranks} ranks wait for it" if others else ""
        return (
            f"rank {sign.rank} on {sign.host} (process {sign.pid}) has made no progress for {seconds:.0f} s at "
            f"{sign.doing!r} of step {sign.step} ({how}){waiting}"
        )

    @property
    def deadline(self) -> float:
        """The time at which the verdict comes, if no rank makes progress until then."""
        ends = (seen.got_on + self._limits.of(seen.sign.doing) for seen in self._seen.values())
        return max(ends, default=math.inf)


def _limits(text: str) -> heartbeat.StallLimits:
    try:
        return heartbeat.StallLimits.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def watch(run: Path, ranks: int, limits: heartbeat.StallLimits, ended: threading.Event) -> str:
    """Watch this start's ranks; returns the verdict, or nothing once `ended` is set."""
    seen = Watch(ranks, limits.plus(GRACE_SECONDS), time.monotonic())
    stragglers, start, verdict = heartbeat.Stragglers(), heartbeat.this_start(), None
    while not verdict and not ended.wait(heartbeat.pause(seen.deadline)):
        ours = [sign for sign in heartbeat.read_signs(run) if sign.start == start]
        verdict = seen.look(ours, time.monotonic())
        for line in stragglers.look(ours, heartbeat.slow_factor(run)):
            print(f"{time.strftime('%H:%M:%S')} slow: {line}", file=sys.stderr, flush=True)
    return verdict or ""


def most_nodes(recipe: "RunRecipe", nodes: int, ranks_per_node: int) -> int:
    """Return the largest number of nodes, up to `nodes`, over whose ranks the global batch divides.

    If there is none, return `nodes`: the trainer then reports the problem with the batch.
    """
    from karat_scale.data.plan import possible_micro_batch

    divided = (count for count in range(nodes, 0, -1) if possible_micro_batch(recipe, count * ranks_per_node))
    return next(divided, nodes)


def main(arguments: list[str] | None = None) -> int:
    """Answer the question; returns the exit code. Raises RecipeError as `load_recipe`."""
    parser = OneLineParser(description=__doc__)
    questions = parser.add_subparsers(dest="question", required=True)
    hang = questions.add_parser("watch", help="end with a named rank when a job hangs")
    hang.add_argument("run", type=Path, help="the run's directory")
    hang.add_argument("--ranks", type=int, required=True)
    hang.add_argument("--stall", type=_limits, required=True, metavar="LIMITS")
    most = questions.add_parser("nodes", help="print how many nodes can train")
    for name, kind in (("nodes", int), ("ranks_per_node", int), ("command", str), ("recipe", str)):
        most.add_argument(name, type=kind)
    most.add_argument("overrides", nargs="*", default=[])
    add_trust(most)
    questions.add_parser("faults", help="print what is not sound about this node's GPUs")
    options = parser.parse_args(arguments)
    if options.question == "faults":
        for line in gpu_faults() or ():
            print(line)
        return 0
    if options.question == "watch":
        print(f"error: {watch(options.run, options.ranks, options.stall, threading.Event())}", flush=True)
        return EXIT_STALLED
    from karat_scale.foundation.tables import SCHEMAS, load
    from karat_scale.recipe.loading import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, load(SCHEMAS[options.command]))
    print(most_nodes(recipe, options.nodes, options.ranks_per_node))
    return 0


if __name__ == "__main__":
    run_script(main)
