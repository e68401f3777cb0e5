"""A sweep before it runs: its recipes, checked, its directories, and what stands in them already."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from karat_scale.cluster.standing import SILENT_SECONDS, read_standing
from karat_scale.errors import RecipeError, UserError
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.files import COMMANDS, find_recipe, read_recipe_file, shipped_recipes
from karat_scale.recipe.loading import differing_keys, load_recipe
from karat_scale.run.run_directory import RunDirectory
from karat_scale.sweep.grid import Point, read_grid
from karat_scale.tasks.detection.recipe import DetectionRecipe


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
        # A finished run of another recipe is not this one: karat train says what is wrong with it.
        is_same = not differing_keys(directory.recipe(type(self.recipe)), self.recipe)
        return State.FINISHED if summary.get("exit") == 0 and is_same else State.UNFINISHED


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
    return Sweep(COMMANDS[schema.shipped], named, tuple(shared), root, tuple(runs))


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
