"""Saving and loading one training state on all ranks together.

Every outcome is agreed: a checkpoint that one rank could not write exists for none, and all ranks load
the same one.
"""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from karat_scale.errors import RunDirectoryError
from karat_scale.recipe import Recipe
from karat_scale.recipe_io import dump_recipe
from karat_scale.train.checkpoint_store import CheckpointStore, checkpoint_name
from karat_scale.train.distributed import World
from karat_scale.train.ds_internals import shard_layout, use_storage
from karat_scale.train.ema import Ema
from karat_scale.train.engine import Engine
from karat_scale.train.progress import Reporter
from karat_scale.train.restore import restore
from karat_scale.train.saved_state import FORMAT, read_state, saved_layout, sidecar_name
from karat_scale.train.state import TrainState
from karat_scale.train.tensor_storage import DurableStorage, as_os_error, load_tensors, save_tensors


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
            RunDirectoryError: no checkpoint is intact, or it is of another model, global batch or version.
        """
        found = self._world.broadcast(self._choose(state_of) if self._world.is_main else None)
        if isinstance(found, RunDirectoryError):
            raise found
        if found is None:
            return None
        root, name = found
        saved = CheckpointStore(root).state(name)
        self._refuse_another_batch(name, saved)
        ranks = [self._world.rank] if self._has_my_layout(root / name, saved) else None
        try:
            restore(self._engine, self._ema, read_state(root / name, saved, ranks))
        except RunDirectoryError as error:
            raise RunDirectoryError(f"checkpoint {root / name}: {error}") from error
        self._restore_generators(root / name, saved)
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
        # At stage 0 all ranks hold the same, and rank 0 keeps it.
        owns = self._engine.stage > 0 or self._world.is_main
        sidecar = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self._world.device.type == "cuda" else None,
            "shapes": self._engine.shapes if owns else None,
            "layout": self._layout() if owns else None,
            "ema": self._ema.shards if self._ema and owns else None,
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
            "format": FORMAT,
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

    def _refuse_another_batch(self, name: str, saved: dict[str, Any]) -> None:
        global_batch = self._recipe.train.global_batch
        if saved["samples"] != saved["step"] * global_batch:
            written = saved["samples"] // max(saved["step"], 1)
            raise RunDirectoryError(
                f"checkpoint {name} was written with train.global_batch = {written}, this run has "
                f"{global_batch}; use train.global_batch={written}"
            )

    def _layout(self) -> list[list[tuple[Any, ...]]]:
        return [[tuple(fragment) for fragment in fragments] for fragments in shard_layout(self._engine.deepspeed)]

    def _has_my_layout(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Whether each rank finds all it needs in the files of its own number."""
        differs = saved["world_size"] != self._world.size or saved["zero_stage"] != self._engine.stage
        if not differs and saved["zero_stage"] > 0:
            sidecar = load_tensors(checkpoint / sidecar_name(self._world.rank), mmap=True)
            differs = saved_layout(sidecar) != shard_layout(self._engine.deepspeed)
        return not self._world.any(differs)

    def _restore_generators(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """A rank goes on with the generators of its number; where there are none, they start from the step."""
        path = checkpoint / sidecar_name(self._world.rank)
        if not path.is_file():
            key = (self._recipe.run.seed, saved["step"], self._world.rank)
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
            return
        sidecar = load_tensors(path)
        torch.set_rng_state(sidecar["rng"])
        if sidecar["cuda_rng"] is not None and self._world.device.type == "cuda":
            torch.cuda.set_rng_state(sidecar["cuda_rng"])


def describe(error: OSError) -> str:
    """An OSError in words a user can act on."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
