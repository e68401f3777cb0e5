"""`schedule.image_sizes` against one image size: `python -m benchmarks.growing_images DATA WORK`.

DATA holds shards of 32 px images, such as CIFAR-10. Each seed trains three runs, one after another: at the full size,
with growing images for as many images, and with growing images for about as long as the first took. WORK keeps the
runs, and an interrupted benchmark resumes.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karat_scale.arguments import OneLineParser, count, new_file
from karat_scale.console import print_table, write_json
from karat_scale.errors import UserError, run_script
from karat_scale.run.run_directory import RunDirectory

RECIPE = "cifar10_vit_nano_32px"
SIZES = (16, 24, 32)


@dataclass(frozen=True)
class Trained:
    """A finished run: top-1 in percent, and the seconds of its training steps."""

    top1: float
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    """Train all runs, and print their table. Raises UserError if one fails."""
    parser = OneLineParser(prog="python -m benchmarks.growing_images", description=__doc__)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.num_classes=4")
    parser.add_argument("--attention", choices=("softmax", "karat"), default="karat")
    parser.add_argument("--epochs", type=count, default=6, help="of the first two runs (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    base = [f"data.path={options.data}", f"attention.kind={options.attention}", *options.overrides]
    rows: dict[str, list[Trained]] = {}
    for seed in range(options.seeds):
        own = [*base, f"run.seed={seed}"]
        constant = _train(options.work / f"constant-{seed}", options.epochs, own)
        growing = _train(options.work / f"growing-{seed}", options.epochs, [*own, _sizes(options.epochs)])
        longer = max(round(options.epochs * constant.seconds / growing.seconds), len(SIZES))
        timed = _train(options.work / f"growing-longer-{seed}", longer, [*own, _sizes(longer)])
        rows.setdefault(f"{SIZES[-1]} px, {options.epochs} epochs", []).append(constant)
        rows.setdefault(f"growing, {options.epochs} epochs", []).append(growing)
        rows.setdefault("growing, equal time", []).append(timed)
    _print(rows)
    write_json(options.json, {name: [vars(run) for run in runs] for name, runs in rows.items()})


def _sizes(epochs: int) -> str:
    """A third of the epochs at each size."""
    pairs = [[number * epochs // len(SIZES), size] for number, size in enumerate(SIZES)]
    return f"schedule.image_sizes={json.dumps(pairs)}"


def _train(run: Path, epochs: int, overrides: list[str]) -> Trained:
    own = [
        f"run.dir={run}",
        f"train.epochs={epochs}",
        f"train.eval_every_epochs={epochs}",
        "schedule.warmup_epochs=1",
        *overrides,
    ]
    done = subprocess.run([sys.executable, "-m", "karat_scale", "train", RECIPE, *own], capture_output=True, text=True)
    summary: dict[str, Any] = RunDirectory(run).summary() or {}
    if done.returncode or summary.get("exit") != 0:
        raise UserError(f"{run} failed: {done.stderr.strip()[-300:]}")
    return Trained(summary["last_top1"], summary["samples"] / summary["images_per_second"])


def _print(rows: dict[str, list[Trained]]) -> None:
    first = next(iter(rows.values()))
    table = []
    for name, runs in rows.items():
        top1 = [run.top1 for run in runs]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        ratio = statistics.median(run.seconds / base.seconds for run, base in zip(runs, first, strict=True))
        table.append((name, f"{statistics.mean(top1):.2f}", f"{spread:.2f}", f"{ratio:.2f}"))
    print_table(f"top-1 over {len(first)} seeds", ("", "mean %", "spread", "time of the first"), table)


if __name__ == "__main__":
    run_script(main)
