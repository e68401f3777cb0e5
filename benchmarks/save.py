"""How long training pauses for a checkpoint, and how long a resume takes: `python -m benchmarks.save`.

Three ways to save the same engine in turn: DeepSpeed's own `save_checkpoint`, which neither flushes to the disk nor
hashes; ours, waited for; and ours beside training. Then a load, as at a resume.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.measure.interleaved import wall_seconds
from karat_scale.commands.measure.step import MANY, synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script
from karat_scale.training.tasks.classification.task import ClassificationTask
from karat_scale.training.trainer import silent_trainer

DEEPSPEED, BLOCKING, BESIDE = "DeepSpeed's save_checkpoint", "karat, blocking", "karat, beside training"


@dataclass(frozen=True)
class SavePlan:
    """The engine to save, the number of rounds, and the directory."""

    model: str
    image_size: int
    batch: int
    config: str
    rounds: int
    path: str | None


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.save", description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch", type=count, default=2)
    parser.add_argument("--config", default="zero0", help="deepspeed.config (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="where to save (default: the temporary directory)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    where = (options.config, options.rounds, options.path)
    plan = SavePlan(options.model, options.image_size, options.batch, *where)
    world = distributed.start("auto")
    try:
        with tempfile.TemporaryDirectory(dir=plan.path) as scratch:
            result = _Bench(plan, world, scratch).measure()
    finally:
        distributed.stop()
    _print(result)
    write_json(options.json, result)


class _Bench:
    """A trainer that has taken a step."""

    def __init__(self, plan: SavePlan, world: distributed.World, scratch: str) -> None:
        recipe = synthetic_recipe(
            f"{scratch}/run",
            "bench save",
            model={"name": plan.model, "image_size": plan.image_size},
            data={"synthetic_samples": 4 * plan.batch, "workers": 0},
            train={"global_batch": plan.batch, "epochs": 1000},
            deepspeed={"config": plan.config},
        )
        self._plan, self._theirs = plan, Path(scratch) / "deepspeed"
        self._trainer = silent_trainer(recipe, world, ClassificationTask)
        self._trainer.resume()
        self._batches = self._trainer.feed(MANY)

    def measure(self) -> dict[str, Any]:
        """Medians over the rounds, of which the first is not counted."""
        seconds: dict[str, list[float]] = {key: [] for key in (DEEPSPEED, BLOCKING, BESIDE)}
        complete: list[float] = []
        steps: list[float] = []
        steps_beside: list[float] = []
        cpu: list[float] = []
        cpu_beside: list[float] = []
        for number in range(self._plan.rounds + 1):
            self._step_into(steps, cpu)
            seconds[DEEPSPEED].append(self._save_as_deepspeed())
            self._step_into(steps, cpu)
            seconds[BLOCKING].append(self._timed(lambda: self._trainer.checkpoints.save(self._trainer.state)))
            self._step_into(steps, cpu)
            begun = time.perf_counter()
            seconds[BESIDE].append(self._timed(lambda: self._trainer.checkpoints.save(self._trainer.state, wait=False)))
            while self._trainer.checkpoints.is_under_way:
                self._step_into(steps_beside, cpu_beside)
                self._trainer.save_or_stop()
            complete.append(time.perf_counter() - begun)
            if number == 0:
                for uncounted in (*seconds.values(), complete, steps, steps_beside, cpu, cpu_beside):
                    uncounted.clear()
        store = self._trainer.checkpoints.store
        return {
            "model": self._plan.model,
            "deepspeed": self._plan.config,
            "device": str(self._trainer.world.device),
            "threads": torch.get_num_threads(),
            "rounds": self._plan.rounds,
            "checkpoint_mb": round(store.newest_bytes() / 1e6, 1),
            "stall_seconds": {name: round(statistics.median(one), 3) for name, one in seconds.items()},
            "seconds_until_complete_beside": round(statistics.median(complete), 3),
            "step_seconds": round(statistics.median(steps), 3),
            "step_seconds_while_writing": round(statistics.median(steps_beside), 3),
            "step_cpu_seconds": round(statistics.median(cpu), 3),
            "step_cpu_seconds_while_writing": round(statistics.median(cpu_beside), 3),
            "resume_seconds": round(
                statistics.median(self._timed(self._trainer.checkpoints.load) for _ in range(3)), 3
            ),
        }

    def _step_into(self, seconds: list[float], cpu: list[float]) -> None:
        """Take a step; keep its seconds, and those of this process's threads, of which a busy machine changes less."""
        begun = time.process_time()
        seconds.append(self._timed(lambda: self._trainer.step([next(self._batches)])))
        cpu.append(time.process_time() - begun)

    def _save_as_deepspeed(self) -> float:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        engine = self._trainer.engine.deepspeed
        ours, engine.checkpoint_engine = engine.checkpoint_engine, TorchCheckpointEngine()
        try:
            return self._timed(lambda: engine.save_checkpoint(str(self._theirs), tag="saved"))
        finally:
            engine.checkpoint_engine = ours
            shutil.rmtree(self._theirs)

    def _timed(self, work: Callable[[], object]) -> float:
        return wall_seconds(work, 1, self._trainer.world.device)


def _print(result: dict[str, Any]) -> None:
    title = f"{result['model']}, {result['deepspeed']}, {result['checkpoint_mb']:,.0f} MB, {result['device']}"
    stalls = result["stall_seconds"]
    print_table(
        f"{title}, {result['threads']} threads",
        ("save", "training pauses", f"over {DEEPSPEED}"),
        [(name, f"{seconds:.2f} s", f"{seconds / stalls[DEEPSPEED]:.2f}") for name, seconds in stalls.items()],
    )
    kinds, whens = ("step_seconds", "step_cpu_seconds"), ("_while_writing", "")
    wall, cpu = ([result[f"{kind}{when}"] for when in whens] for kind in kinds)
    print(f"beside training: complete after {result['seconds_until_complete_beside']:.2f} s, at the end of a step")
    for what, (meanwhile, else_) in {"a step": wall, "a step's CPU time": cpu}.items():
        print(f"{what}: {meanwhile:.2f} s meanwhile, {else_:.2f} s else")
    print(f"resume: verified and loaded in {result['resume_seconds']:.2f} s")


if __name__ == "__main__":
    run_script(main)
