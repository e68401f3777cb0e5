"""Saving and loading one training state on all ranks together.

Every outcome is agreed: a checkpoint that one rank could not write exists for none, and all ranks load
the same one.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from karat_scale.errors import RunDirectoryError
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import Recipe
from karat_scale.recipe_io import dump_recipe
from karat_scale.train.checkpoint_store import CheckpointStore
from karat_scale.train.distributed import World
from karat_scale.train.ds_internals import shard_layout
from karat_scale.train.ema import Ema
from karat_scale.train.engine import Engine
from karat_scale.train.progress import Reporter
from karat_scale.train.restore import check_teacher, restore
from karat_scale.train.saved_state import FORMAT, read_state, saved_layout, sidecar_name
from karat_scale.train.saver import Saver
from karat_scale.train.state import TrainState
from karat_scale.train.tensor_storage import load_tensors


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
        self.saver = Saver(store, engine, ema, world, recipe.checkpoint, reporter)

    def save(self, state: TrainState, is_best: bool = False, wait: bool = True) -> bool:
        """Write a checkpoint of `state`, as `Saver.save` says. False when any rank failed: nothing has changed then."""
        teacher = teacher_of(self._engine.module)
        content = {
            "format": FORMAT,
            **state.to_json(),
            "world_size": self._world.size,
            "zero_stage": self._engine.stage,
            "has_ema": self._ema is not None,
            "teacher": teacher.digest if teacher else None,
            "recipe_sha256": hashlib.sha256(dump_recipe(self._recipe).encode()).hexdigest(),
        }
        return self.saver.save(state, content, is_best, wait)

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
        try:
            check_teacher(self._engine.module, saved)
            ranks = [self._world.rank] if self._has_my_layout(root / name, saved) else None
            with self._world.together():  # none must wait in `restore` for one that refuses its files
                content = read_state(root / name, saved, ranks)
            restore(self._engine, self._ema, content)
        except RunDirectoryError as error:
            raise RunDirectoryError(f"checkpoint {root / name}: {error}") from error
        self._restore_generators(root / name, saved)
        state = TrainState.from_json(saved)
        if root == self.store.root:
            self.saver.note_saved(state)
        state.restarts += 1
        state.seconds_to_first_step = None  # each start has its own
        self._reporter.resumed(state, name)
        return state

    def _choose(self, state_of: str) -> tuple[Path, str] | RunDirectoryError | None:
        if not state_of:
            return self._newest_intact(self.store)
        path = Path(state_of)
        if (path / "checkpoints").is_dir():
            found = self._newest_intact(CheckpointStore(path / "checkpoints"))
            return found or RunDirectoryError(f"resume.from = {state_of}: this run has no checkpoints yet")
        damage = CheckpointStore(path.parent).damage(path.name, self._reporter.display.verify)
        if damage:
            return RunDirectoryError(
                f"resume.from = {state_of}: {damage}; name a complete checkpoint or a run's directory"
            )
        return path.parent, path.name

    def _newest_intact(self, store: CheckpointStore) -> tuple[Path, str] | RunDirectoryError | None:
        names = store.names()
        latest = store.pointed("latest")
        for name in sorted(names, key=lambda n: n != latest):
            damage = store.damage(name, self._reporter.display.verify)
            if damage is None:
                return store.root, name
            self._reporter.warn(f"checkpoint {name} is damaged: {damage}; trying the one before")
        if names:
            return RunDirectoryError(
                f"{store.root}: none of {len(names)} checkpoints is intact; "
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

    def _has_my_layout(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Whether each rank finds all it needs in the files of its own number."""
        differs = saved["world_size"] != self._world.size or saved["zero_stage"] != self._engine.stage
        with self._world.together():
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
