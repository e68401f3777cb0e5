"""A program that records what ranks agree on when one of them, or the disk, fails.

It is started by `torchrun -m tests.training.agreement SCRATCH [LOOK ...]`. One launch runs all looks, because starting
processes takes most of the time. Rank 0 writes outcomes.json.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.store import MANIFEST, STATE
from karat_scale.checkpoint.tensor_storage import start_writer
from karat_scale.checkpoint.weights import load_weights, whole_masters
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.files import Fingerprint, file_sha256
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.agreement import Decision, SavePoints, StopSignals
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import TrainState
from karat_scale.training.weights_file import load_exported
from tests.clock import Clock
from tests.conftest import SMALL
from tests.small_engines import CONFIGS, make_trainer
from tests.training.harm import HARMS, POINTERS, point
from tests.training.nonfinite import KINDS, NonfiniteTrainer


def _recipe(world: World, scratch: Path, name: str, *overrides: str) -> Recipe:
    base = scratch / "agreement.yaml"
    if world.is_main:
        base.write_text("data: {backend: synthetic, synthetic_samples: 64}\nattention: {kind: karat}\n")
        RunDirectory(scratch / name).store.root.mkdir(parents=True, exist_ok=True)
    world.broadcast(None)
    fixed = ("schedule.warmup_epochs=0", "data.workers=0", f"run.dir={scratch / name}")
    return load_recipe(base, [*SMALL, *fixed, *overrides])


def _loaded(checkpoints: Checkpoints) -> int | str:
    """Return the step from which this rank resumes, "nothing" without a checkpoint, or the error."""
    try:
        state = checkpoints.load()
    except RunDirectoryError as error:
        return str(error)
    return state.step if state else "nothing"


def damage(world: World, scratch: Path) -> dict[str, Any]:
    """Return the steps from which the ranks resume, and what they print, for each damage of the newest checkpoint."""
    trainer = make_trainer(_recipe(world, scratch, "damage", "deepspeed.config=zero2"), world)
    checkpoints, root = trainer.checkpoints, trainer.checkpoints.store.root
    for step in (1, 2):
        checkpoints.save(TrainState(step=step, samples=8 * step))
    outcomes: dict[str, Any] = {}

    def look(name: str, harm: Callable[[], None]) -> None:
        if world.is_main:
            shutil.copytree(root, scratch / "whole")
            harm()
        world.broadcast(None)
        with redirect_stdout(StringIO()) as said:
            steps = world.gather(_loaded(checkpoints))
        outcomes[name] = {"steps": steps, "said": said.getvalue()}
        if world.is_main:
            shutil.rmtree(root)
            (scratch / "whole").rename(root)
        world.broadcast(None)

    newest = root / "step-00000002"
    files = sorted(path.name for path in newest.iterdir())
    for file, harm in zip(files, itertools.cycle(HARMS), strict=False):  # test_store does every harm to every file
        look(f"{file} {harm}", lambda file=file, harm=harm: HARMS[harm](newest / file))  # type: ignore[misc]
    for what, content in POINTERS.items():
        look(f"latest {what}", lambda content=content: point(root / "latest", content))  # type: ignore[misc]

    def put_code() -> None:
        """Save a checkpoint that is intact by its hashes, but whose file of rank 1 holds code."""
        store = checkpoints.store
        again, state = store.begin(3), {**store.state(newest.name), "step": 3, "samples": 24}
        for file in set(files) - {MANIFEST, STATE}:
            shutil.copy(newest / file, again / file)
        torch.save({"rng": RunsCode()}, again / "rank-00001.pt")
        written = {path.name: Fingerprint(path.stat().st_size, file_sha256(path)) for path in again.iterdir()}
        store.commit(again, state, written)

    look("code", put_code)
    return outcomes


class RunsCode:
    """An object whose pickle ends the process that reads it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (1,)


def failing_rank(world: World, scratch: Path) -> dict[str, Any]:
    """Return the results of saves for which rank 1 alone cannot write large files, by stage and way of saving."""
    outcomes = {}
    for config in ("zero1", "zero3"):
        trainer = make_trainer(_recipe(world, scratch, f"failing-{config}", f"deepspeed.config={config}"), world)
        checkpoints = trainer.checkpoints
        good = checkpoints.save(TrainState(step=1, samples=8))
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        # What fails: the rank that writes, the copy in its memory, or the process that writes beside training.
        for step, (way, pid) in enumerate(
            (("blocking", 0), ("copying", 0), ("beside", start_writer()._process.pid)), 2
        ):
            if world.rank == 1:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
            with redirect_stdout(StringIO()) as said:
                begun = checkpoints.save(TrainState(step=step, samples=8 * step), wait=way == "blocking")
                voided = not (begun and checkpoints.finish())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
            outcomes[f"{config} {way}"] = {
                "good": good,
                "voided": world.gather(voided),
                "names": checkpoints.store.names(),
                "said": said.getvalue(),
                "step": step,
            }
        outcomes[f"{config} after"] = {"good": checkpoints.save(TrainState(step=5, samples=40))}
    return outcomes


def nonfinite_rank(world: World, scratch: Path) -> dict[str, Any]:
    """Return whether each rank skips a step that is not finite on rank 1 alone, keeps its state, and trains on."""
    outcomes = {}
    for config in CONFIGS:
        for precision in ("fp32", "bf16"):
            own = (f"deepspeed.config={config}", f"train.precision={precision}")
            trainer = make_trainer(_recipe(world, scratch, "nonfinite", *own), world, kind=NonfiniteTrainer)
            batches = trainer.task.backend.train_batches(trainer.plan.slices(0, 1 + 2 * len(KINDS)))
            trainer.step([next(batches)])
            for kind in KINDS:
                masters = master_weights(trainer.engine.deepspeed)
                before = [master.detach().clone() for master in masters]
                averages = [shard.clone() for shard in trainer.ema.shards] if trainer.ema else []
                trainer.inject = kind if world.rank == 1 else ""
                trainer.step([next(batches)])
                trainer.inject = ""
                skipped = trainer.state.skipped_in_row == 1
                untouched = all(map(torch.equal, before, masters))
                untouched &= trainer.ema is not None and all(map(torch.equal, averages, trainer.ema.shards))
                trainer.step([next(batches)])
                went_on = trainer.state.skipped_in_row == 0 and not all(map(torch.equal, before, masters))
                outcomes[f"{config} {precision} {kind}"] = world.gather((skipped, untouched, went_on))
            trainer.task.close()
    return outcomes


def snapshots(world: World, scratch: Path) -> dict[str, Any]:
    """Return, by stage, whether a snapshot has all parameters, with the values in a checkpoint of the same step."""
    outcomes = {}
    for config in CONFIGS:
        own = (f"deepspeed.config={config}", "attention.mode=universal", "train.precision=bf16")
        recipe = _recipe(world, scratch, f"snapshots-{config}", *own)
        trainer = make_trainer(recipe, world)
        trainer.step([next(trainer.task.backend.train_batches(trainer.plan.slices(0, 1)))])
        trainer.after_step[1].write(1)
        trainer.checkpoints.save(trainer.state)
        sizes = [parameter.numel() for _, parameter in whole_masters(trainer.engine, world)]
        if world.is_main:
            store = trainer.checkpoints.store
            ours, saved = (create_model(recipe.model, recipe.attention) for _ in range(2))
            load_exported(ours, Path(recipe.run.dir) / "snapshots" / "step-00000001.safetensors")
            load_weights(saved, store.root / "step-00000001", store.state("step-00000001"), ema=False)
            pairs = zip(ours.state_dict().values(), saved.state_dict().values(), strict=True)
            outcomes[config] = all(torch.equal(a, b) for a, b in pairs) and sum(sizes) == trainer.engine.parameters
        trainer.task.close()
    return outcomes


def stops(world: World, scratch: Path) -> dict[str, Any]:
    """Return where two ranks with separate clocks save and stop, and how often they compare their wishes.

    Rank 1 alone gets a signal, in step 150. The name of an outcome gives the seconds that a step takes. In "slower",
    steps take 0.01 s before step 100 and 3 s from then on. Rank 1's clock runs seven times too fast.
    """
    outcomes = {}
    paces: dict[str, Callable[[int], float]] = {
        "0.01": lambda step: 0.01,
        "0.3": lambda step: 0.3,
        "5": lambda step: 5.0,
        "slower": lambda step: 0.01 if step < 100 else 3.0,
    }
    for name, seconds in paces.items():
        clock, signals, asked, saves, step = Clock(), StopSignals(), 0, [], 0
        points = SavePoints(world, signals, every_steps=70, every_minutes=None, clock=clock)
        decision = Decision()
        while not decision.stop and step < 1000:
            step += 1
            clock.go(seconds(step) * (1 if world.is_main else 7))
            if step == 150 and world.rank == 1:
                signals.received = signal.SIGTERM
            asked += points.agreement.is_due(step)
            decision = points.decide(step)
            if decision.save:
                saves.append(step)
        outcomes[name] = world.gather({"step": step, "saves": saves, "asked": asked})
    return outcomes


LOOKS: dict[str, Callable[[World, Path], dict[str, Any]]] = {
    look.__name__: look for look in (damage, failing_rank, nonfinite_rank, snapshots, stops)
}


def main(scratch: str, *looks: str) -> None:
    """Run the named looks on all ranks, or all looks if none is named."""
    world = distributed.start("cpu")
    outcomes = {name: LOOKS[name](world, Path(scratch)) for name in looks or LOOKS}
    if world.is_main:
        Path(scratch, "outcomes.json").write_text(json.dumps(outcomes))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
