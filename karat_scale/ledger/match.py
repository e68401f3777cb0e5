"""Which row of the paper a run repeats, and by which command."""

import functools
import json
from typing import Any

from karat_scale.ledger.paper import PaperRow, PaperTable
from karat_scale.ledger.record import Record
from karat_scale.recipe import Recipe
from karat_scale.recipe.files import shipped_recipes
from karat_scale.recipe.loading import differing_keys, flatten, load_recipe

# A run that differs in these alone repeats a row, at another budget, which the page states.
BUDGET = ("run.seed", "train.epochs", "schedule.warmup_epochs", "schedule.warmup_steps", "train.precision")
# Other runs that this one stems from: where they lie does not matter, only whether there is one.
LINEAGE = ("init_from", "attention.transfer_from")


def repeats(record: Record, row: PaperRow, table: PaperTable) -> bool:
    """Whether a run is of this row; memory is a GPU's, and noise instead of images repeats nothing."""
    if row.recipe not in shipped_recipes() or record.resolved.data.backend == "synthetic":
        return False
    if table.measure == "memory" and str(record.summary["device"]).startswith("CPU"):
        return False
    reference = reference_recipe(row)
    ours, theirs = flatten(record.resolved), flatten(reference)
    if any(bool(ours[key]) != bool(theirs[key]) for key in LINEAGE):
        return False
    return not differing_keys(reference, record.resolved, (*BUDGET, *LINEAGE))


def is_short(record: Record, row: PaperRow, table: PaperTable) -> bool:
    """Whether a run saw fewer images than its row's recipe has it see."""
    reference = reference_recipe(row)
    whole = table.images // reference.train.global_batch * reference.train.global_batch
    return record.epoch_images < whole or record.epochs < reference.train.epochs - 1e-6


def command_of_row(row: PaperRow) -> str:
    """What repeats a row."""
    return " ".join(["karat train", row.recipe, *row.overrides, "data.path=DIR"])


def command_of_record(record: Record) -> str:
    """What repeats a run: the shipped recipe that it bears the name of, and what it changed in it; else nothing."""
    name = record.resolved.run.name
    if name not in shipped_recipes():
        return ""
    reference = load_recipe(name)
    before, after = flatten(reference), flatten(record.resolved)
    keys = differing_keys(reference, record.resolved)
    keys += ["train.max_steps"] if before["train.max_steps"] != after["train.max_steps"] else []
    return " ".join(["karat train", name, *(f"{key}={_yaml(after[key])}" for key in keys), "data.path=DIR"])


@functools.cache
def reference_recipe(row: PaperRow) -> Recipe:
    """The resolved recipe of a row."""
    return load_recipe(row.recipe, row.overrides)


def _yaml(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}'" if " " in text else text
