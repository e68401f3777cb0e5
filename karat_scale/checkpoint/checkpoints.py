"""Saving and loading one training state on all ranks together.

Every outcome is agreed: a checkpoint that one rank could not write exists for none, and all ranks load
the same one.
"""

from pathlib import Path
from typing import Any

from karat_scale.checkpoint.generators import restore_generators, seed_generators
from karat_scale.checkpoint.intact import agree_on_checkpoint, refuse_another_batch
from karat_scale.checkpoint.restore import check_teacher, restore
from karat_scale.checkpoint.saved_state import FORMAT, read_state, saved_layout, sidecar_name
from karat_scale.checkpoint.saver import Saver
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.engine.deepspeed_internals import shard_layout
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.run_state import TrainState
from karat_scale.errors import RunDirectoryError
from karat_scale.models.transfer import teacher_of
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import dump_recipe
from karat_scale.recipe.portable import text_digest
from karat_scale.reporting.progress import Reporter


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
            "recipe_sha256": text_digest(dump_recipe(self._recipe)),
        }
        return self.saver.save(state, content, is_best, wait)

    def load(self, state_of: str = "") -> TrainState | None:
        """Load the newest intact checkpoint, or the one in directory `state_of`. None when there is none.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it is of another model, global batch or version.
        """
        found = agree_on_checkpoint(self.store, state_of, self._world, self._reporter)
        if found is None:
            return None
        root, name = found
        saved = CheckpointStore(root).state(name)
        refuse_another_batch(name, saved["samples"], saved["step"], self._recipe.train.global_batch)
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

    def _has_my_layout(self, checkpoint: Path, saved: dict[str, Any]) -> bool:
        """Whether each rank finds all it needs in the files of its own number."""
        differs = saved["world_size"] != self._world.size or saved["zero_stage"] != self._engine.stage
        with self._world.together():
            if not differs and saved["zero_stage"] > 0:
                sidecar = load_tensors(checkpoint / sidecar_name(self._world.rank), mmap=True)
                differs = saved_layout(sidecar) != shard_layout(self._engine.deepspeed)
        return not self._world.any(differs)

    def _restore_generators(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """A rank resumes with the generators of its number. If there are none, they start from the step."""
        path = checkpoint / sidecar_name(self._world.rank)
        if path.is_file():
            restore_generators(load_tensors(path), self._world.device)
        else:
            seed_generators(self._recipe.run.seed, saved["step"], self._world.rank)
