"""Saving and loading one training state on all ranks together.

Every outcome is agreed: a checkpoint that one rank could not write exists for none, and all ranks load
the same one.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from karat_scale.errors import RunDirectoryError
from karat_scale.recipe import Recipe
from karat_scale.recipe_io import dump_recipe
from karat_scale.train.checkpoint_store import CheckpointStore, checkpoint_name
from karat_scale.train.distributed import World
from karat_scale.train.ds_internals import use_storage
from karat_scale.train.ema import Ema
from karat_scale.train.engine import Engine
from karat_scale.train.progress import Reporter
from karat_scale.train.state import TrainState
from karat_scale.train.tensor_storage import DurableStorage, as_os_error, load_tensors, save_tensors


def sidecar_name(rank: int) -> str:
    """The file that holds what only this rank knows: its random generators and its EMA shard."""
    return f"rank-{rank:05d}.pt"


class Checkpoints:
    """Collective save and load for one engine."""

    def __init__(
        self,
        store: CheckpointStore,
        engine: Engine,
        ema: Ema | None,
        world: World,
        recipe: Recipe,
        reporter: Reporter,
    ) -> None:
        self.store = store
        self._engine = engine
        self._ema = ema
        self._world = world
        self._recipe = recipe
        self._reporter = reporter
        self._storage = DurableStorage()
        use_storage(engine.deepspeed, self._storage)

    def save(self, state: TrainState, is_best: bool = False) -> bool:
        """Write a checkpoint of `state`. False when any rank failed: nothing has changed then."""
        begun = time.monotonic()
        directory, problem = self._world.broadcast(self._begin(state.step))
        if directory is not None:
            problem = self._first_problem(self._write(directory))
        if directory is not None and problem is None:
            problem = self._world.broadcast(self._commit(directory, state, is_best))
        name = checkpoint_name(state.step)
        if problem is not None:
            if self._world.is_main:
                self.store.discard_unfinished()
            kept = self.store.pointed("latest") or "none"
            self._reporter.warn(f"checkpoint {name} not saved: {problem}; the last good one is {kept}")
            return False
        self._reporter.checkpoint(state, name, time.monotonic() - begun)
        return True

    def load(self, state_of: str = "") -> TrainState | None:
        """Load the newest intact checkpoint, or the one in directory `state_of`. None when there is none.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it was written by another world size.
        """
        found = self._world.broadcast(self._choose(state_of) if self._world.is_main else None)
        if isinstance(found, RunDirectoryError):
            raise found
        if found is None:
            return None
        root, name = found
        saved = CheckpointStore(root).state(name)
        self._refuse_another_world(name, saved)
        try:
            self._engine.deepspeed.load_checkpoint(str(root), tag=name)
        except RuntimeError as error:  # torch's report of parameters that do not fit
            reason = str(error).splitlines()[-1].strip()
            raise RunDirectoryError(f"checkpoint {root / name} holds another model: {reason}") from error
        self._read_sidecar(root / name / sidecar_name(self._world.rank))
        state = TrainState.from_json(saved)
        state.restarts += 1
        state.seconds_to_first_step = None  # each start has its own
        self._reporter.resumed(state, name)
        return state

    def _begin(self, step: int) -> tuple[Path | None, str | None]:
        if not self._world.is_main:
            return None, None
        try:
            return self.store.begin(step), None
        except OSError as error:
            return None, describe(error)

    def _write(self, directory: Path) -> str | None:
        self._engine.deepspeed.save_checkpoint(str(self.store.root), tag=directory.name, save_latest=False)
        if self._storage.error is not None:
            return describe(self._storage.error)
        sidecar = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self._world.device.type == "cuda" else None,
            "ema": self._ema.shards if self._ema else None,
        }
        try:
            save_tensors(sidecar, directory / sidecar_name(self._world.rank))
        except (OSError, RuntimeError) as error:
            return describe(as_os_error(error))
        return None

    def _first_problem(self, problem: str | None) -> str | None:
        return next((p for p in self._world.gather(problem) if p is not None), None)

    def _commit(self, directory: Path, state: TrainState, is_best: bool) -> str | None:
        if not self._world.is_main:
            return None
        content = {
            "format": 1,
            **state.to_json(),
            "world_size": self._world.size,
            "zero_stage": self._engine.stage,
            "has_ema": self._ema is not None,
            "recipe_sha256": hashlib.sha256(dump_recipe(self._recipe).encode()).hexdigest(),
        }
        try:
            name = self.store.commit(directory, content)
            if is_best:
                self.store.point("best", name)
        except OSError as error:
            return describe(error)
        try:
            self.store.retain(self._recipe.checkpoint.keep_last)
        except OSError as error:  # the new checkpoint is good all the same
            self._reporter.warn(f"an old checkpoint could not be removed: {describe(error)}")
        return None

    def _choose(self, state_of: str) -> tuple[Path, str] | RunDirectoryError | None:
        if state_of:
            path = Path(state_of)
            damage = CheckpointStore(path.parent).damage(path.name)
            if damage:
                return RunDirectoryError(f"resume.from = {state_of}: {damage}; name a complete checkpoint")
            return path.parent, path.name
        names = self.store.names()
        latest = self.store.pointed("latest")
        for name in sorted(names, key=lambda n: n != latest):
            damage = self.store.damage(name)
            if damage is None:
                return self.store.root, name
            self._reporter.warn(f"checkpoint {name} is damaged: {damage}; trying the one before")
        if names:
            return RunDirectoryError(
                f"{self.store.root}: none of {len(names)} checkpoints is intact; "
                "remove the directory to start anew, or restore one from a copy"
            )
        return None

    def _refuse_another_world(self, name: str, saved: dict[str, Any]) -> None:
        global_batch = self._recipe.train.global_batch
        if saved["samples"] != saved["step"] * global_batch:
            written = saved["samples"] // max(saved["step"], 1)
            raise RunDirectoryError(
                f"checkpoint {name} was written with train.global_batch = {written}, this run has "
                f"{global_batch}; use train.global_batch={written}"
            )
        here = {"world_size": self._world.size, "zero_stage": self._engine.stage}
        if saved["zero_stage"] == here["zero_stage"] == 0:
            return  # every rank holds the whole state
        for key, value in here.items():
            if saved[key] != value:
                raise RunDirectoryError(
                    f"checkpoint {name} was written with {key} = {saved[key]}, this run has {value}; "
                    f"start it with {key} = {saved[key]}"
                )

    def _read_sidecar(self, path: Path) -> None:
        if not path.is_file():  # a stage 0 checkpoint of a smaller world: this rank is new
            path = path.with_name(sidecar_name(0))
        sidecar = load_tensors(path)
        torch.set_rng_state(sidecar["rng"])
        if sidecar["cuda_rng"] is not None and self._world.device.type == "cuda":
            torch.cuda.set_rng_state(sidecar["cuda_rng"])
        if self._ema is not None and sidecar["ema"] is not None:
            self._ema.load(sidecar["ema"])


def describe(error: OSError) -> str:
    """An OSError in words a user can act on."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
