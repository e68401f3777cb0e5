"""An existing run, of anybody, opened to read it: its recipe, one of its checkpoints, and the weights in that.

What builds a run's model opens the run here, so that none forgets to ask whether the code it names is trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

from torch import nn
from typing_extensions import Self

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.checkpoint.weights import load_weights, wants_ema
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.trust import require_trust
from karat_scale.training.run_directory import R, RunDirectory


@dataclass
class OpenRun(Generic[R]):
    """One run to read. `at` opens it by its directory.

    Args:
        path: the run's directory.
        recipe: its recipe, with what the user overrides.
        weights: "raw", "ema", or "auto", which is what the recipe evaluates.
        checkpoint: best, latest, or a name. Without a best one, "best" means "latest".

    Raises:
        UntrustedError: its recipe names a class.
    """

    path: Path
    recipe: R
    weights: str = "auto"
    checkpoint: str = "best"

    def __post_init__(self) -> None:
        require_trust(self.recipe.attention.classes, self.directory.recipe_file)

    @classmethod
    def at(
        cls,
        path: str | Path,
        schema: type[R],
        overrides: Sequence[str] = (),
        weights: str = "auto",
        checkpoint: str = "best",
    ) -> Self:
        """Open the run of a directory, of the kind `schema`.

        Raises:
            RunDirectoryError: this is not a run directory, or another kind of run's.
            RecipeError: its recipe cannot be read, or an override does not fit it.
            UntrustedError: its recipe names a class.
        """
        directory = RunDirectory(path)
        return cls(directory.path, directory.recipe(schema, overrides), weights, checkpoint)

    @cached_property
    def directory(self) -> RunDirectory:
        """The run's files."""
        return RunDirectory(self.path)

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return self.directory.store

    @cached_property
    def trained(self) -> R:
        """The recipe as the run was trained with it."""
        return self.directory.recipe(type(self.recipe))

    @cached_property
    def chosen(self) -> str:
        """The checkpoint's name; it is intact. Raises RunDirectoryError if there is none."""
        if not self.store.names():
            raise RunDirectoryError(f"{self.store.root}: no checkpoint; train the run first")
        return self.store.find_intact(self.checkpoint)

    def choose(self, world: World) -> str:
        """Return `chosen`, which rank 0 alone looks for. Collective; raises the same on all ranks."""
        with world.together():
            name = self.chosen if world.is_main else ""
        self.chosen = world.broadcast(name)
        return self.chosen

    @property
    def saved(self) -> dict[str, Any]:
        """The checkpoint's `state.json`."""
        return self.store.state(self.chosen)

    @property
    def weights_kind(self) -> str:
        """Which weights of the checkpoint are meant, "raw" or "ema"."""
        return "ema" if wants_ema(self.weights, self.recipe, self.saved) else "raw"

    def load(self, model: nn.Module, name: str | None = None, weights: str | None = None) -> None:
        """Copy a checkpoint's weights into a model like the run's.

        Args:
            name: of an intact checkpoint, instead of the chosen one.
            weights: instead of the run's choice.

        Raises:
            RunDirectoryError: it is of another model, or without averages.
        """
        name = name or self.chosen
        saved = self.store.state(name)
        load_weights(model, self.store.root / name, saved, wants_ema(weights or self.weights, self.recipe, saved))
