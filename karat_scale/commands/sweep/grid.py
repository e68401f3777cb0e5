"""A sweep before it runs: its grid, `key=a,b,c` and `run.seed=0..4`, and the runs that it names.

Each run's recipe is checked. Its directory says how far the run is already.
"""

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import yaml

from karat_scale.commands.status.status import read_standing
from karat_scale.foundation.console import few, plural
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.foundation.files import json_sha256
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.files import COMMANDS, parse, read_recipe, shipped_recipes
from karat_scale.recipe.loading import differing_keys, flatten, load_recipe, text_digest
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MOST_POINTS = 10_000
_LONGEST_NAME = 120
_DIGITS = 8
SEED = "run.seed"


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `settings` are its values of the keys that vary, as overrides."""

    name: str
    settings: tuple[str, ...]


def read_grid(overrides: Sequence[str]) -> tuple[list[str], list[Point]]:
    """Return the overrides that all runs share, and the runs; the last key varies fastest, and seeds fastest of all.

    Raises:
        UserError: an override cannot be read, or no key has several values.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: should be key=value or key=value,value, such as run.seed=0..4")
        values[key] = _values(key, text)  # the last one counts, as in karat train
    shared = [f"{key}={only[0]}" for key, only in values.items() if len(only) == 1]
    varied = {key: several for key, several in values.items() if len(several) > 1}
    if not varied:
        raise UserError("no key has several values, so there is one run: use karat train, or key=a,b")
    if SEED in varied:
        varied[SEED] = varied.pop(SEED)
    if (count := math.prod(map(len, varied.values()))) > _MOST_POINTS:
        raise UserError(f"the grid has {count:,} runs; at most {_MOST_POINTS:,} are possible")
    return shared, _points(varied)


def _points(varied: dict[str, list[str]]) -> list[Point]:
    leaves = Counter(key.rpartition(".")[2] for key in varied)
    short = {key: leaf if leaves[leaf := key.rpartition(".")[2]] == 1 else key for key in varied}
    names: set[str] = set()
    points = []
    for values in itertools.product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        settings = tuple(f"{key}={value}" for key, value in pairs)
        name = "_".join(f"{short[key]}-{_plain(value)}" for key, value in pairs)
        if len(name) > _LONGEST_NAME or name in names:  # other names stay as they are when values are added
            digest = text_digest("\n".join(settings))[:_DIGITS]
            name = f"{name[: _LONGEST_NAME - _DIGITS - 1]}_{digest}"
        names.add(name)
        points.append(Point(name, settings))
    return points


def _values(key: str, text: str) -> list[str]:
    """Return the values of a list. Commas inside brackets and quotes do not separate; 0..4 are five integers."""
    pieces = [piece.strip() for piece in _split(text)]
    values: list[str] = []
    for piece in pieces:
        counted = _RANGE.fullmatch(piece)
        if counted is None:
            values.append(piece)
            continue
        first, last = int(counted[1]), int(counted[2])
        if not 0 <= last - first < _MOST_POINTS:
            raise UserError(f"{key}={text[:100]}: {piece} should count up, over at most {_MOST_POINTS:,} integers")
        values += map(str, range(first, last + 1))
    if len(values) > 1 and "" in values:
        raise UserError(f"{key}={text[:100]}: a value is empty; write null for none")
    if len(set(values)) < len(values):
        raise UserError(f"{key}={text[:100]}: {Counter(values).most_common(1)[0][0]} is there twice")
    return values


def _split(text: str) -> Iterator[str]:
    piece, quote = "", ""
    expected: list[str] = []
    for character in text:
        if character == "," and not expected and not quote:
            yield piece
            piece = ""
            continue
        piece += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
    if expected or quote:
        raise UserError(f"{text[:100]!r}: {quote or expected[-1]} is missing at the end")
    yield piece


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "none"


# Keys that may have an effect with attention.kind=softmax: a teacher's matrices need an implementation.
_OF_SOFTMAX = {"kind", "implementation", "transfer_from", "transfer_heads"}


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
        if standing.signs and standing.ended is None and not standing.is_silent:
            return State.RUNNING
        summary = directory.summary() or {}
        # Without the second, the run was killed after it began again, and the summary is of its earlier end.
        if summary.get("exit") != 0 or standing.ended is None:
            return State.UNFINISHED
        # Of another recipe, or a shorter one, karat train goes on or says why not.
        recorded = directory.recipe(type(self.recipe))
        is_as_long = recorded.train.max_steps == self.recipe.train.max_steps  # which changes nothing that is learned
        return State.FINISHED if is_as_long and not differing_keys(recorded, self.recipe) else State.UNFINISHED


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
    if not _is_plain(f"{root}/run"):
        raise UserError(f"--out {root}: YAML reads it as another text; choose one without ' #' and ': '")
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
    _refuse_equal_runs(runs)
    return Sweep(COMMANDS[schema.shipped], named, tuple(shared), root, _without_twins(runs))


def _is_plain(text: str) -> bool:
    """True if an override `key=text` gives the key this text."""
    with suppress(yaml.YAMLError):
        return bool(parse(text) == text)
    return False


def _refuse_idle_keys(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError for a key of KArAt that varies where all runs have softmax: their models would be the same."""
    if any(run.recipe.attention.learns for run in runs):
        return
    for key in (setting.partition("=")[0] for setting in runs[0].point.settings):
        if key.startswith("attention.") and key.removeprefix("attention.") not in _OF_SOFTMAX:
            raise UserError(
                f"{key} has no effect with attention.kind = softmax, which all runs have; set attention.kind=karat"
            )


def _without_twins(runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Return the runs without those of softmax that differ from one before only in keys of KArAt, and say so."""
    first: dict[str, PlannedRun] = {}
    twins = []
    for run in runs:
        attention = run.recipe.attention
        idle = () if attention.learns else [f"attention.{key}" for key in attention.model_dump(exclude=_OF_SOFTMAX)]
        if (one := first.setdefault(_digest(run.recipe, idle), run)) is not run:
            twins.append(f"{run.point.name} is the same as {one.point.name}")
    if twins:
        left = f"{plural(len(twins), 'run')} left out, as no key of KArAt has an effect with attention.kind = softmax"
        print(f"note: {left}: {few(twins, most=1)}", file=sys.stderr)
    return tuple(first.values())


def _digest(recipe: RunRecipe, without: Collection[str] = ()) -> str:
    """Return a digest of what a recipe trains, wherever it is kept."""
    left_out = {"run.dir", "checkpoint.url", *without}
    return json_sha256({key: value for key, value in flatten(recipe).items() if key not in left_out})


def _refuse_equal_runs(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError for two points whose values are written differently, and are the same."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        other = seen.setdefault(_digest(run.recipe), run)
        if other is not run:
            one, two = (" ".join(each.point.settings) for each in (other, run))
            raise UserError(f"{one} and {two} are the same recipe; leave one out")


def _schema(recipe: str) -> type[RunRecipe]:
    """Return the kind of a recipe: of `karat detect` if it has a detector."""
    if recipe in shipped_recipes(Recipe.shipped):
        return Recipe
    if recipe in shipped_recipes(DetectionRecipe.shipped):
        return DetectionRecipe
    try:
        _, tree = read_recipe(recipe, DetectionRecipe.shipped)
    except RecipeError:
        return Recipe  # which says what is wrong, if something is
    return DetectionRecipe if "detector" in tree else Recipe
