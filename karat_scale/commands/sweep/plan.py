"""A sweep before it runs: its recipes, checked, its directories, and what stands in them already."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from karat_scale.commands.status.standing import SILENT_SECONDS, read_standing
from karat_scale.commands.sweep.grid import Point, read_grid
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.files import COMMANDS, find_recipe, read_recipe_file, shipped_recipes
from karat_scale.recipe.loading import differing_keys, load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

# Keys that may have an effect with attention.kind=softmax: a teacher's matrices need an implementation.
_OF_SOFTMAX = tuple(f"attention.{key}" for key in ("kind", "implementation", "transfer_from", "transfer_heads"))


class State(Enum):
    """How far a run of the sweep is."""

    NEW = "new"
    UNFINISHED = "unfinished"
    RUNNING = "running now"
    FINISHED = "finished"


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        overrides: all of the run's, with its directory and its checkpoint.url.
    """

    point: Point
    directory: Path
    overrides: tuple[str, ...]
    recipe: RunRecipe

    @property
    def state(self) -> State:
        """What stands in the directory now."""
        directory = RunDirectory(self.directory)
        if not directory.recipe_file.is_file():
            return State.NEW
        standing = read_standing(self.directory)
        if standing.ended is None and (standing.silent_seconds or 0.0) <= SILENT_SECONDS and standing.signs:
            return State.RUNNING
        summary = directory.summary() or {}
        # Without the second, the run was killed after it began again, and the summary is of its earlier end.
        is_done = summary.get("exit") == 0 and standing.ended is not None
        return State.FINISHED if is_done and self._is_of(directory) else State.UNFINISHED

    def _is_of(self, directory: RunDirectory) -> bool:
        """Whether the recipe in the directory is this one and as long; if not, karat train goes on or says why not."""
        recorded = directory.recipe(type(self.recipe))
        is_as_long = recorded.train.max_steps == self.recipe.train.max_steps  # which changes nothing that is learned
        return is_as_long and not differing_keys(recorded, self.recipe)


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, and the command that trains one."""

    command: str
    recipe: str
    shared: tuple[str, ...]
    out: Path
    runs: tuple[PlannedRun, ...]


def plan_sweep(recipe: str, overrides: Sequence[str], out: str | None) -> Sweep:
    """Read the grid and check the recipe of every run.

    Raises:
        UserError: the grid or a recipe is wrong; the line names the run.
    """
    shared, points = read_grid(overrides)
    if any(setting.startswith("run.dir=") for setting in (*shared, *points[0].settings)):
        raise UserError("run.dir: each run of a sweep has its own directory; use --out for the one around them")
    schema = _schema(recipe)
    named = recipe if recipe in shipped_recipes(schema.shipped) else str(Path(recipe).resolve())
    root = Path(out).expanduser() if out else Path("runs") / f"sweep_{Path(recipe).stem}"
    runs = []
    for point in points:
        directory = root / point.name
        own = (*shared, *point.settings, f"run.dir={directory}")
        try:
            checked = load_recipe(recipe, own, schema)
            if checked.checkpoint.url:  # one for each run
                own = (*own, f"checkpoint.url={checked.checkpoint.url.rstrip('/')}/{point.name}")
                checked = load_recipe(recipe, own, schema)
            runs.append(PlannedRun(point, directory, own, checked))
        except RecipeError as error:
            raise RecipeError(f"{' '.join(point.settings)}: {error}") from None
    _refuse_idle_keys(runs)
    return Sweep(COMMANDS[schema.shipped], named, tuple(shared), root, tuple(runs))


def _refuse_idle_keys(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError for a key of KArAt that varies where all runs have softmax: their models would be the same."""
    if any(run.recipe.attention.kind != "softmax" for run in runs):
        return
    for key in (setting.partition("=")[0] for setting in runs[0].point.settings):
        if key.startswith("attention.") and key not in _OF_SOFTMAX:
            raise UserError(
                f"{key} has no effect with attention.kind = softmax, which all runs have; set attention.kind=karat"
            )


def _schema(recipe: str) -> type[RunRecipe]:
    """Return the kind of a recipe: of `karat detect` if it has a detector."""
    if recipe in shipped_recipes(Recipe.shipped):
        return Recipe
    if recipe in shipped_recipes(DetectionRecipe.shipped):
        return DetectionRecipe
    path = find_recipe(recipe)
    try:
        tree = read_recipe_file(path, DetectionRecipe.shipped)
    except RecipeError:
        return Recipe  # which says what is wrong, if something is
    return DetectionRecipe if "detector" in tree else Recipe
