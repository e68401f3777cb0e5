"""`karat bench save`: how long training pauses for a checkpoint, and how long a resume takes.

Three ways to save the same engine in turn: DeepSpeed's own `save_checkpoint`, which neither flushes to the disk nor
hashes; ours, waited for; and ours beside training. Then a load, as at a resume.
"""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from karat_scale.engine import distributed
from karat_scale.engine.run_state import TrainState
from karat_scale.files import write_atomically
from karat_scale.recipe.loading import validate_recipe
from karat_scale.reporting.progress import Reporter, SilentDisplay
from karat_scale.run.loop import Loop
from karat_scale.run.parts import Parts, build_parts
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.signals import StopSignals

DEEPSPEED, BLOCKING, BESIDE = "DeepSpeed's save_checkpoint", "karat, blocking", "karat, beside training"


@dataclass(frozen=True)
class SavePlan:
    """What to save, how often, and where."""

    model: str
    image_size: int
    batch: int
    config: str
    rounds: int
    path: str | None


def bench_save(plan: SavePlan, json_file: str | None) -> int:
    """Measure, print and write `json_file`; returns 0."""
    world = distributed.start("auto")
    try:
        with tempfile.TemporaryDirectory(dir=plan.path) as scratch:
            result = _Bench(plan, world, scratch).measure()
    finally:
        distributed.stop()
    _print(result)
    if json_file:
        write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
    return 0


class _Bench:
    """An engine that has taken a step, and its loop."""

    def __init__(self, plan: SavePlan, world: distributed.World, scratch: str) -> None:
        tree = {
            "run": {"name": "bench-save", "dir": f"{scratch}/run"},
            "model": {"name": plan.model, "image_size": plan.image_size},
            "data": {"backend": "synthetic", "synthetic_samples": 4 * plan.batch, "workers": 0},
            "train": {"global_batch": plan.batch, "epochs": 1000},
            "deepspeed": {"config": plan.config},
            "checkpoint": {"every_minutes": None},
            "log": {"trackers": [], "every_steps": 1000},
        }
        recipe = validate_recipe(tree, "bench save")
        self._plan, self._theirs = plan, Path(scratch) / "deepspeed"
        reporter = Reporter(SilentDisplay(), None)
        self._parts: Parts = build_parts(recipe, world, RunDirectory(recipe.run.dir), StopSignals(), reporter)
        self._loop = Loop(self._parts, TrainState())
        self._batches = self._loop.feed(10**6)

    def measure(self) -> dict[str, Any]:
        """Medians over the rounds, of which the first is not counted."""
        seconds: dict[str, list[float]] = {key: [] for key in (DEEPSPEED, BLOCKING, BESIDE)}
        complete: list[float] = []
        steps: list[float] = []
        steps_beside: list[float] = []
        for number in range(self._plan.rounds + 1):
            steps.append(self._step())
            seconds[DEEPSPEED].append(self._save_as_deepspeed())
            steps.append(self._step())
            seconds[BLOCKING].append(self._timed(lambda: self._parts.checkpoints.save(self._loop.state)))
            steps.append(self._step())
            begun = time.perf_counter()
            seconds[BESIDE].append(self._timed(lambda: self._parts.checkpoints.save(self._loop.state, wait=False)))
            while self._parts.checkpoints.saver.is_under_way:
                steps_beside.append(self._step())
                self._loop.save_or_stop()
            complete.append(time.perf_counter() - begun)
            if number == 0:
                for uncounted in (*seconds.values(), complete, steps, steps_beside):
                    uncounted.clear()
        store = self._parts.checkpoints.store
        return {
            "model": self._plan.model,
            "deepspeed": self._plan.config,
            "device": str(self._parts.world.device),
            "threads": torch.get_num_threads(),
            "rounds": self._plan.rounds,
            "checkpoint_mb": round(store.newest_bytes() / 1e6, 1),
            "stall_seconds": {name: round(statistics.median(one), 3) for name, one in seconds.items()},
            "seconds_until_complete_beside": round(statistics.median(complete), 3),
            "step_seconds": round(statistics.median(steps), 3),
            "step_seconds_while_writing": round(statistics.median(steps_beside), 3),
            "resume_seconds": round(statistics.median(self._timed(self._parts.checkpoints.load) for _ in range(3)), 3),
        }

    def _step(self) -> float:
        return self._timed(lambda: self._loop.step([next(self._batches)]))

    def _save_as_deepspeed(self) -> float:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        engine = self._parts.engine.deepspeed
        ours, engine.checkpoint_engine = engine.checkpoint_engine, TorchCheckpointEngine()
        try:
            return self._timed(lambda: engine.save_checkpoint(str(self._theirs), tag="saved"))
        finally:
            engine.checkpoint_engine = ours
            shutil.rmtree(self._theirs)

    def _timed(self, work: Any) -> float:
        begun = time.perf_counter()
        work()
        if self._parts.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def _print(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['deepspeed']}, {result['checkpoint_mb']:,.0f} MB, {result['device']}"
    table = Table(title=f"{title}, {result['threads']} threads")
    for column in ("save", "training stands still", f"over {DEEPSPEED}"):
        table.add_column(column, justify="left" if column == "save" else "right")
    stalls = result["stall_seconds"]
    for name, seconds in stalls.items():
        table.add_row(name, f"{seconds:.2f} s", f"{seconds / stalls[DEEPSPEED]:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"beside training: complete after {result['seconds_until_complete_beside']:.2f} s, at a step's end; a step "
        f"meanwhile takes {result['step_seconds_while_writing']:.2f} s in place of {result['step_seconds']:.2f} s"
    )
    console.print(f"resume: verified and loaded in {result['resume_seconds']:.2f} s")
