"""`karat bench step`: our training loop against a bare PyTorch loop, and KArAt against softmax in ours.

Each contender trains the same model from the same weights on the same in-memory batches with the same
optimizer, gradient clip and learning rate; they run in turn, and ratios are medians over rounds.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy

from karat_scale.commands.bench.measuring import interleaved_seconds, median_ratio
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.augmentation.mixing import Mixer
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.batch import Batch
from karat_scale.data.loading.loader import with_digest
from karat_scale.data.plan import TrainPlan
from karat_scale.engine import distributed
from karat_scale.engine.devices import wait_for
from karat_scale.engine.optimizers import build_optimizer, build_schedule
from karat_scale.engine.reporting.progress import Reporter, SilentDisplay
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, on_one_line
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.run import build_parts, resume
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.signals import StopSignals
from karat_scale.training.tasks.classification.task import ClassificationTask

BARE, OURS, KARAT = "bare PyTorch loop, softmax", "karat loop, softmax", "karat loop, KArAt G3B"
FIRST_STEP_RUNS = 3


def bench_step(name: str, image_size: int, batch: int, steps: int, rounds: int, json_file: str | None) -> int:
    """Measure, print a table and the seconds to a first step, and write `json_file`; returns 0."""
    model = {"name": name, "image_size": image_size}
    world = distributed.start("auto")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            contenders = {
                BARE: _bare_loop(_recipe(model, batch, "softmax", scratch), steps, world.device),
                OURS: _our_loop(_recipe(model, batch, "softmax", scratch), steps, world),
                KARAT: _our_loop(_recipe(model, batch, "karat", scratch), steps, world),
            }
            seconds = interleaved_seconds(contenders, rounds)
            first_step = statistics.median(
                _seconds_to_first_step(model, batch, Path(scratch) / f"first-{number}")
                for number in range(FIRST_STEP_RUNS)
            )
    finally:
        distributed.stop()
    rows = [
        {
            "loop": name,
            "images_per_second": round(steps * batch / statistics.median(seconds[name]), 2),
            "ratio_to_bare": round(1 / median_ratio(seconds, name, BARE), 3),
            "ratio_to_karat_softmax": round(1 / median_ratio(seconds, name, OURS), 3),
        }
        for name in contenders
    ]
    result = {
        "model": name,
        "image_size": image_size,
        "batch": batch,
        "steps": steps,
        "rounds": rounds,
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "seconds_to_first_step": first_step,
        "rows": rows,
    }
    _print(result)
    write_json(json_file, result)
    return 0


def _recipe(model: dict[str, Any], batch: int, kind: str, scratch: str) -> Recipe:
    tree = {
        "run": {"name": f"bench-{kind}", "dir": f"{scratch}/{kind}"},
        "model": model,
        "attention": {"kind": kind},
        "data": {"backend": "synthetic", "synthetic_samples": 4 * batch},
        "train": {"global_batch": batch, "ema_decay": 0.0, "epochs": 100},
        "checkpoint": {"every_minutes": None},
        "log": {"every_steps": 50, "trackers": []},
    }
    return validate_recipe(tree, "bench step")


def _batches(recipe: Recipe, device: torch.device) -> list[Batch]:
    backend = open_backend(ImageSpec.of(recipe))
    batch = recipe.train.global_batch
    plan = TrainPlan(0, backend.num_train, batch, batch, 0, 1)
    return [with_digest(one).to(device) for one in backend.train_batches(plan.slices(0, plan.steps_per_epoch))]


def silent_trainer(
    recipe: Recipe, world: distributed.World, task_type: type[ClassificationTask] = ClassificationTask
) -> tuple[ClassificationTask, Parts, Loop]:
    """Return the task, parts and loop of `karat train`, which print nothing here. A run that has begun is resumed."""
    directory = RunDirectory(recipe.run.dir)
    world.on_main(lambda: directory.store.root.mkdir(parents=True, exist_ok=True))
    task = task_type(recipe, world, Reporter(SilentDisplay(), None))
    parts = build_parts(task, directory, StopSignals())
    return task, parts, Loop(parts, resume(parts, directory))


def _our_loop(recipe: Recipe, steps: int, world: distributed.World) -> Callable[[], None]:
    _, _, loop = silent_trainer(recipe, world)
    batches = _batches(recipe, world.device)

    def run() -> None:
        for number in range(steps):
            loop.step([batches[number % len(batches)]])
            loop.save_or_stop()
        wait_for(world.device)

    return run


def _bare_loop(recipe: Recipe, steps: int, device: torch.device) -> Callable[[], None]:
    torch.manual_seed(recipe.run.seed)
    model: Any = create_model(recipe.model, recipe.attention).to(device)
    optimizer = build_optimizer(model, recipe.optim, device)
    criterion = SoftTargetCrossEntropy()
    normalize = Normalize(recipe.augment.mean, recipe.augment.std)
    mixer = Mixer(recipe.augment, recipe.model.num_classes, recipe.run.seed)
    batches = _batches(recipe, device)
    schedule = build_schedule(recipe, len(batches))
    done = 0

    def run() -> None:
        nonlocal done
        for number in range(steps):
            batch = batches[number % len(batches)]
            mix = mixer.params(batch.epoch, batch.batch, *batch.images.shape[-2:])
            images, targets = normalize(batch.images, mix), mixer.targets(batch.labels, mix)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(done)
            loss = criterion(model(images), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
        wait_for(device)

    return run


def _seconds_to_first_step(model: dict[str, Any], batch: int, run_dir: Path) -> float:
    """Seconds from the start of `karat train` to the end of its first step, in a process of its own."""
    recipe = run_dir.with_suffix(".yaml")
    recipe.write_text(json.dumps({"data": {"backend": "synthetic"}, "model": model, "train": {"ema_decay": 0.0}}))
    overrides = [f"run.dir={run_dir}", f"train.global_batch={batch}", f"data.synthetic_samples={max(64, batch)}"]
    command = [sys.executable, "-m", "karat_scale", "train", str(recipe), "train.max_steps=1", *overrides]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"karat train ended with exit code {done.returncode}: {on_one_line(done.stderr[-400:])}")
    summary = RunDirectory(run_dir).summary() or {}
    return float(summary["seconds_to_first_step"])


def _print(result: dict[str, Any]) -> None:
    rows = [
        (
            row["loop"],
            f"{row['images_per_second']:.1f}",
            f"{row['ratio_to_bare']:.3f}",
            f"{row['ratio_to_karat_softmax']:.3f}",
        )
        for row in result["rows"]
    ]
    title = f"{result['model']} at {result['image_size']} px, batch {result['batch']}, {result['device']}, "
    title += f"{result['threads']} threads"
    print_table(title, ("loop", "images/s", "over bare", "over karat softmax"), rows)
    print(f"from command to first step: {result['seconds_to_first_step']:.1f} s (median of {FIRST_STEP_RUNS})")
