"""`schedule.image_sizes` against one image size: `python -m benchmarks.growing_images DATA WORK`.

DATA holds shards of 32 px images, such as CIFAR-10. Each seed trains three runs, one after another: at the full size,
with growing images for as many images, and with growing images for as long. How long that is follows from the time of
a step at each size, measured first, interleaved. WORK keeps the runs, and an interrupted benchmark resumes.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from karat_scale.arguments import OneLineParser, count, new_file
from karat_scale.console import print_table, write_json
from karat_scale.errors import UserError, run_script
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.run.run_directory import RunDirectory

RECIPE = "cifar10_vit_nano_32px"
SIZES = (16, 24, 32)


def main(arguments: list[str] | None = None) -> None:
    """Train all runs, and print their table. Raises UserError if one fails."""
    parser = OneLineParser(prog="python -m benchmarks.growing_images", description=__doc__)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.num_classes=4")
    parser.add_argument("--attention", choices=("softmax", "karat"), default="karat")
    parser.add_argument("--epochs", type=count, default=6, help="of the first two runs (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=15, help="of the timing (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    base = [f"data.path={options.data}", f"attention.kind={options.attention}", *options.overrides]
    costs = step_costs(load_recipe(RECIPE, base), options.rounds)
    longer = max(round(options.epochs / statistics.mean(costs.values())), len(SIZES))
    contenders = {
        f"{SIZES[-1]} px": ("constant", options.epochs, []),
        "growing, as many images": ("growing", options.epochs, [_sizes(options.epochs)]),
        "growing, as long": ("growing-longer", longer, [_sizes(longer)]),
    }
    top1: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(options.seeds):
        for name, (directory, epochs, own) in contenders.items():
            run = options.work / f"{directory}-{seed}"
            top1[name].append(_train(run, epochs, [*base, f"run.seed={seed}", *own]))
    epochs_of = {name: epochs for name, (_, epochs, _) in contenders.items()}
    _print(costs, top1, epochs_of)
    write_json(options.json, {"step_costs": costs, "epochs": epochs_of, "top1": top1})


def step_costs(recipe: Recipe, rounds: int) -> dict[int, float]:
    """Return the time of a training step at each size over that of the largest: medians of interleaved rounds."""
    steps = {size: _Step(recipe.changed(model__image_size=size)) for size in SIZES}
    ratios: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds + 1):  # the first round warms up
        seconds = {size: step.seconds() for size, step in steps.items()}
        for size in SIZES:
            ratios[size].append(seconds[size] / seconds[SIZES[-1]])
    return {size: statistics.median(found[1:]) for size, found in ratios.items()}


class _Step:
    """Forward, backward and AdamW of a recipe's model on random images."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self._model = create_model(recipe.model, recipe.attention)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        size = recipe.model.image_size
        self._images = torch.randn(recipe.train.global_batch, 3, size, size)

    def seconds(self) -> float:
        """Return the processor time of a step, which other processes hardly disturb."""
        begun = time.process_time()
        self._model(self._images).logsumexp(-1).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.process_time() - begun


def _sizes(epochs: int) -> str:
    """A third of the epochs at each size."""
    pairs = [[number * epochs // len(SIZES), size] for number, size in enumerate(SIZES)]
    return f"schedule.image_sizes={json.dumps(pairs)}"


def _train(run: Path, epochs: int, overrides: list[str]) -> float:
    """Train a run to its end; returns its top-1 in percent."""
    own = [f"run.dir={run}", f"train.epochs={epochs}", f"train.eval_every_epochs={epochs}", "schedule.warmup_epochs=1"]
    command = [sys.executable, "-m", "karat_scale", "train", RECIPE, *own, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    summary: dict[str, Any] = RunDirectory(run).summary() or {}
    if done.returncode or summary.get("exit") != 0:
        raise UserError(f"{run} failed: {done.stderr.strip()[-300:]}")
    return float(summary["last_top1"])


def _print(costs: dict[int, float], top1: dict[str, list[float]], epochs: dict[str, int]) -> None:
    shares = ", ".join(f"{size} px {cost:.2f}" for size, cost in costs.items())
    print(f"time of a training step over that at {SIZES[-1]} px: {shares}")
    rows = []
    for name, found in top1.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        cost = epochs[name] * (1.0 if name == next(iter(top1)) else statistics.mean(costs.values()))
        relative = cost / epochs[next(iter(top1))]
        rows.append((name, str(epochs[name]), f"{relative:.2f}", f"{statistics.mean(found):.2f}", f"{spread:.2f}"))
    seeds = len(next(iter(top1.values())))
    print_table(f"top-1 over {seeds} seeds", ("", "epochs", "time", "mean %", "spread"), rows)


if __name__ == "__main__":
    run_script(main)
