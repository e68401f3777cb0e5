"""Save and load a detector's training on all ranks together, in the files of `train/checkpoint/store.py`.

training.pt     weights and AdamW's state, the same on all ranks, written by rank 0
rank-00000.pt   a rank's random generators
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat_scale.checkpoint.generators import generator_states, restore_generators, seed_generators
from karat_scale.checkpoint.intact import agree_on_checkpoint, refuse_another_batch
from karat_scale.checkpoint.restore import check_shapes
from karat_scale.checkpoint.saved_state import sidecar_name
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.checkpoint.tensor_storage import describe, load_tensors, save_tensors
from karat_scale.engine.distributed import World
from karat_scale.errors import RunDirectoryError
from karat_scale.files import Fingerprint
from karat_scale.recipe.loading import dump_recipe
from karat_scale.recipe.portable import text_digest
from karat_scale.reporting.progress import Reporter
from karat_scale.tasks.detection.recipe import DetectionRecipe
from karat_scale.tasks.detection.state import DetectionState

FORMAT, KIND = 1, "detection"
_TRAINING = "training.pt"


class DetectionCheckpoints:
    """Collective save and load for one model and its optimizer."""

    def __init__(
        self,
        store: CheckpointStore,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        recipe: DetectionRecipe,
        reporter: Reporter,
    ) -> None:
        self.store = store
        self._model = model
        self._optimizer = optimizer
        self._world = world
        self._recipe = recipe
        self._reporter = reporter
        self._saved: tuple[int, int] | None = None
        self.problem = ""
        """The reason why the last save failed; the same on all ranks."""

    def save(self, state: DetectionState, is_best: bool = False) -> bool:
        """Write a checkpoint of `state` unless it exists. False if a rank failed: then nothing has changed."""
        if self._saved == (state.step, state.evaluated_step):
            return True
        begun = time.monotonic()
        try:
            with self._world.together():
                self._write(state, is_best)
        except OSError as error:
            self.problem = describe(error)
            kept = self.store.pointed("latest") or "none"
            if self._world.is_main:
                self.store.discard_unfinished()
                self._reporter.warn(
                    f"checkpoint {checkpoint_name(state.step)} not saved: {self.problem}; the last good one is {kept}"
                )
            return False
        self._saved = (state.step, state.evaluated_step)
        seconds = time.monotonic() - begun
        self._reporter.checkpoint(state, checkpoint_name(state.step), seconds, seconds)
        return True

    def _write(self, state: DetectionState, is_best: bool) -> None:
        """Each rank writes its file, then rank 0 the manifest and the name. An OSError of one rank is raised by all."""
        directory = Path(self._world.broadcast(self._begin(state.step)))
        files: dict[str, Fingerprint] = {}
        with self._world.together():
            name = sidecar_name(self._world.rank)
            files[name] = save_tensors(generator_states(self._world.device), directory / name)
            if self._world.is_main:
                content = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
                files[_TRAINING] = save_tensors(content, directory / _TRAINING)
        everyone = self._world.gather(files)
        if self._world.is_main:
            written = {name: fingerprint for part in everyone for name, fingerprint in part.items()}
            self.store.commit(directory, self._content(state), written, is_best)
            for problem in self.store.retain(self._recipe.checkpoint.keep_last):
                self._reporter.warn(problem)

    def _begin(self, step: int) -> str:
        """Yield the new checkpoint's directory on rank 0, else None. Rank 0's errors are raised on all ranks."""
        directory = ""
        with self._world.together():
            if self._world.is_main:
                self.store.root.mkdir(parents=True, exist_ok=True)
                directory = str(self.store.begin(step))
        return directory

    def _content(self, state: DetectionState) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": KIND,
            **state.to_json(),
            "world_size": self._world.size,
            "recipe_sha256": text_digest(dump_recipe(self._recipe)),
        }

    def load(self, state_of: str = "") -> DetectionState | None:
        """Load the newest intact checkpoint, or the one in directory `state_of`. None if there is none.

        Raises:
            RunDirectoryError: no checkpoint is intact, or it is of another model, global batch or kind of run.
        """
        found = agree_on_checkpoint(self.store, state_of, self._world, self._reporter)
        if found is None:
            return None
        root, name = found
        saved = CheckpointStore(root).state(name)
        content = read_training(root / name, saved)
        refuse_another_batch(name, saved["samples"], saved["step"], self._recipe.train.global_batch)
        load_weights(self._model, content, root / name)
        self._optimizer.load_state_dict(content["optimizer"])
        sidecar = root / name / sidecar_name(self._world.rank)
        if sidecar.is_file():
            restore_generators(load_tensors(sidecar), self._world.device)
        else:
            seed_generators(self._recipe.run.seed, saved["step"], self._world.rank)
        state = DetectionState.from_json(saved)
        if root == self.store.root:
            self._saved = (state.step, state.evaluated_step)
        state.restarts += 1
        state.seconds_to_first_step = None  # each start measures its own
        self._reporter.resumed(state, name)
        return state


def read_training(checkpoint: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the weights (`model`) and AdamW's state (`optimizer`) of a verified checkpoint, on the CPU.

    Raises:
        RunDirectoryError: another version or another kind of run wrote it.
    """
    if saved.get("kind") != KIND:
        raise RunDirectoryError(
            f"checkpoint {checkpoint} is of a classifier; start from it with init_from={checkpoint}"
        )
    if saved["format"] != FORMAT:
        raise RunDirectoryError(
            f"checkpoint {checkpoint} has format {saved['format']}, this version reads format {FORMAT}; "
            "use the version that wrote it"
        )
    content: dict[str, Any] = load_tensors(checkpoint / _TRAINING)
    return content


def load_weights(model: nn.Module, content: dict[str, Any], checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a model. Raises RunDirectoryError if they are of another model."""
    here, there = ({name: tuple(x.shape) for name, x in x.items()} for x in (model.state_dict(), content["model"]))
    try:
        check_shapes(here, there)
    except RunDirectoryError as error:
        raise RunDirectoryError(f"checkpoint {checkpoint}: {error}") from None
    model.load_state_dict(content["model"])
