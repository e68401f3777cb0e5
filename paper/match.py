"""Match a run with the row of the paper that it repeats, and derive the command."""

import functools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karat_scale.data.plan import total_steps
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.files import shipped_recipes
from karat_scale.recipe.loading import differing_keys, flatten, load_recipe
from paper.kinds import CLASSIFIER, DETECTOR, Kind
from paper.paper import DataSet, PaperRow, PaperTable
from paper.record import Record

# A run that differs only in these repeats a row, at another budget, which the page states.
BUDGET = ("run.seed", "train.epochs", "schedule.warmup_epochs", "schedule.warmup_steps", "train.precision")
# Earlier runs from which this one starts. Their names matter, not their directories.
LINEAGE = ("init_from", "attention.transfer_from")


def repeats(record: Record, row: PaperRow, table: PaperTable) -> bool:
    """True if a run repeats this row: with its recipe, on its data set or a part of it, from the same earlier runs.

    Memory rows need a GPU. Synthetic images repeat no row. Nor does a run that does not record its classes, since it
    may be on any data set.
    """
    if record.kind is not _kind(row):
        return False
    if isinstance(record.resolved, Recipe) and record.resolved.data.row.files is None:
        return False
    if table.measure == "memory" and record.figures.device.startswith("CPU"):
        return False
    if not _is_of(record, table.data):
        return False
    reference = reference_recipe(row)
    ours, theirs = flatten(record.resolved), flatten(reference)
    if any(bool(ours[key]) != bool(theirs[key]) for key in LINEAGE):
        return False
    if any(_ancestor(record, key) != Path(theirs[key]).name for key in LINEAGE):
        return False
    return not differing_keys(reference, record.resolved, (*BUDGET, *LINEAGE))


def budget_mark(record: Record, row: PaperRow, table: PaperTable) -> str:
    """Return `short` if a run was trained on fewer images than its row's recipe, `long` if on more."""
    reference = reference_recipe(row)
    train, steps_per_epoch = reference.train, table.data.images // reference.train.global_batch
    epochs = total_steps(steps_per_epoch, train.epochs, train.max_steps) / steps_per_epoch
    is_part = record.epoch_images < steps_per_epoch * train.global_batch or record.eval_images < table.data.val_images
    if is_part or record.epochs < epochs - 1e-6:
        return "short"
    return "long" if record.epochs > epochs + 1e-6 else ""


def by_recipe(records: Sequence[Record]) -> list[list[Record]]:
    """Return runs in groups that differ only in their seed, in the order of the first of each."""
    groups: list[list[Record]] = []
    for record in records:
        for group in groups:
            if _differ_in_seed(group[0], record):
                group.append(record)
                break
        else:
            groups.append([record])
    return groups


def _differ_in_seed(one: Record, other: Record) -> bool:
    budgets = [(r.epoch_images, r.eval_images, r.figures.samples, r.resolved.run.name) for r in (one, other)]
    return budgets[0] == budgets[1] and not differing_keys(one.resolved, other.resolved, ("run.seed",))


def _is_of(record: Record, data: DataSet) -> bool:
    figures = record.figures
    if (figures.classes, figures.classes_sha256) != (data.classes, data.classes_sha256):
        return False
    images = figures.train_images or record.epoch_images
    return images <= data.images and record.eval_images <= data.val_images


def _ancestor(record: Record, key: str) -> str:
    """Return the name of the run in `key` of the recipe, if the weights recorded it."""
    return record.figures.lineage.get(key, {}).get("name", "")


def command_of_record(record: Record, seed: bool = True) -> str:
    """Return the command that repeats a run: the shipped recipe of the same name and the changed keys; else nothing.

    seed: False leaves the run's seed out.
    """
    name, schema = record.resolved.run.name, record.kind.recipe
    if name not in shipped_recipes(schema.shipped):
        return ""
    reference = load_recipe(name, (), schema)
    before, after = flatten(reference), flatten(record.resolved)
    keys = differing_keys(reference, record.resolved, () if seed else ("run.seed",))
    keys += ["train.max_steps"] if before["train.max_steps"] != after["train.max_steps"] else []
    return " ".join(
        [f"karat {record.kind.command}", name, *(_setting(key, after[key]) for key in keys), "data.path=DIR"]
    )


@functools.cache
def reference_recipe(row: PaperRow) -> RunRecipe:
    """Return the resolved recipe of a row."""
    return load_recipe(row.recipe, row.overrides, _kind(row).recipe)


def _kind(row: PaperRow) -> Kind:
    return DETECTOR if row.box else CLASSIFIER


def _setting(key: str, value: Any) -> str:
    """Return an override as a word of a shell's command."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{key}={shlex.quote(text)}"
