"""Short trainings at chosen stages, as one or several ranks: `python -m tests.engine.stage_jobs JOBS OUT`.

One launch runs many jobs, because starting processes takes most of the time.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.memory import apply_recompute
from karat_scale.models import create_model
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import ROOT, SMALL, rank_environments
from tests.small_engines import checkpoints_of, random_batch, weights
from tests.warm import run_program

GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Job:
    """A training of steps `first` to `last` that resumes from the folder `load`, or saves to `save` after `save_at`."""

    config: str
    first: int = 1
    last: int = 6
    load: str = ""
    save: str = ""
    save_at: int = 0
    precision: str = "fp32"
    overrides: Sequence[str] = ()


def run_job(job: Job, world: World, scratch: Path) -> dict[str, Any]:
    """Run a job; return its losses by step, hashes of the final raw and averaged weights, and the average's norm."""
    base = scratch / "jobs.yaml"
    if world.is_main:
        base.write_text("data: {backend: synthetic, synthetic_samples: 32}\nattention: {kind: karat}\n")
    world.broadcast(None)
    own = (f"run.dir={scratch / 'run'}", f"deepspeed.config={job.config}", f"train.precision={job.precision}")
    recipe = load_recipe(
        base, [*SMALL, "schedule.warmup_epochs=0", f"train.global_batch={GLOBAL_BATCH}", *own, *job.overrides]
    )
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.attention)
    torch.manual_seed(1 + world.rank)
    micro_batch = GLOBAL_BATCH // world.size
    apply_recompute(model, recipe)
    engine = Engine(model, recipe, world, micro_batch)
    checkpoints = checkpoints_of(engine, recipe, world, Path(job.load or job.save or scratch / "none"))
    ema = checkpoints.ema
    if job.load:
        state = checkpoints.load()
        assert state is not None
        assert state.step == job.first - 1
    losses = {}
    for step in range(job.first, job.last + 1):
        images, labels = random_batch(step)
        mine = slice(world.rank * micro_batch, (world.rank + 1) * micro_batch)
        engine.set_lr(1e-3)
        loss = torch.nn.functional.cross_entropy(engine.forward(images[mine]), labels[mine])
        engine.backward(loss)
        engine.step()
        ema.update(step)
        losses[str(step)] = float(world.sum(loss)) / world.size
        if job.save and step == job.save_at:
            assert checkpoints.save(TrainState(step=step, samples=step * GLOBAL_BATCH))
    outcome = {"losses": losses, "raw": _digest(engine)}
    with ema.in_place_of_weights():
        outcome["ema"] = _digest(engine)
        outcome["ema_norm"] = float(torch.cat([w.flatten() for w in weights(engine)]).double().norm())
    return outcome


def _digest(engine: Engine) -> str:
    digest = hashlib.sha256()
    for weight in weights(engine):
        digest.update(weight.float().numpy().tobytes())
    return digest.hexdigest()


def main(jobs_file: str, out_file: str) -> None:
    """Run the jobs of a JSON file on all ranks; rank 0 writes the outcomes."""
    world = distributed.start("cpu")
    outcomes = []
    for job in json.loads(Path(jobs_file).read_text()):
        outcomes.append(run_job(Job(**job), world, Path(jobs_file).parent))
    if world.is_main:
        Path(out_file).write_text(json.dumps(outcomes))
    distributed.stop()


def launch_jobs(jobs: list[Job], processes: int, directory: Path) -> list[dict[str, Any]]:
    """Run jobs on several ranks in one launch, with files in a new directory; return their outcomes."""
    directory.mkdir()
    (directory / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    files = [str(directory / "jobs.json"), str(directory / "out.json")]
    done = run_program("tests.engine.stage_jobs", files, rank_environments(processes), timeout=550, directory=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: list[dict[str, Any]] = json.loads((directory / "out.json").read_text())
    return outcomes


if __name__ == "__main__":
    main(*sys.argv[1:])
