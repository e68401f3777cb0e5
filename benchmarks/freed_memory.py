"""What keeping freed memory saves a CPU: `python -m benchmarks.freed_memory RECIPE [key=value ...]`.

Trains a recipe for some steps in a process that keeps freed memory, as `karat train` does on a CPU, and in one that
gives it back to the kernel, which is the C library's default; in turn, several times. Prints the processor time of each
and the median ratio. The time to start is taken out: each process also runs with one step.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from karat_scale.foundation.arguments import OneLineParser, count
from karat_scale.foundation.console import print_table
from karat_scale.foundation.errors import run_script

KEPT, GIVEN_BACK = "kept", "given back"
# glibc's own value: the process leaves malloc alone, as the environment has a setting.
SETTINGS = {KEPT: {}, GIVEN_BACK: {"MALLOC_TOP_PAD_": "131072"}}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table. Raises UserError for what cannot be measured."""
    parser = OneLineParser(prog="python -m benchmarks.freed_memory", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=count, default=100, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    options = parser.parse_args(arguments)
    command = [options.recipe, *options.settings, "run.device=cpu"]
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, own in SETTINGS.items():
            whole = processor_seconds(command, options.steps + 1, own)
            seconds[name].append((whole - processor_seconds(command, 1, own)) / options.steps)
    ratios = [back / kept for kept, back in zip(seconds[KEPT], seconds[GIVEN_BACK], strict=True)]
    rows = [(name, f"{1e3 * statistics.median(found):.1f}") for name, found in seconds.items()]
    print_table("karat train on a CPU", ("freed memory", "processor ms per step"), rows)
    print(f"given back / kept: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def processor_seconds(command: list[str], steps: int, own: dict[str, str]) -> float:
    """The processor time of a training process and its children. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="karat-bench-") as scratch:
        places = [f"run.dir={Path(scratch) / 'run'}", f"train.max_steps={steps}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "karat_scale", "train", *command, *places],
            env={**os.environ, **own},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    run_script(main)
