"""Keys that recipes no longer have. Recipes with them still load: those of old runs and of the ledger are such.

A key that had no effect is dropped. One that asked for something is dropped with a note, since it asked for speed or
memory and not for another model. `log.tensorboard` became an entry of `log.trackers`.
"""

import copy
from collections.abc import Mapping
from typing import Any

from karat_scale.errors import RecipeError

# The key, the value that asked for nothing, and why the key is gone.
_DROPPED = (
    ("train.recompute.partition", False, "without model parallelism it saved nothing"),
    ("train.recompute.cpu", False, "no run was ever verified with it; train.recompute.policy=all saves memory"),
)


def without_retired_keys(tree: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's tree as today's schema has it, and a line on each key that had asked for something.

    Raises RecipeError, which begins with `source`, for a value that such a key never had.
    """
    today: dict[str, Any] = copy.deepcopy(dict(tree))
    notes = []
    for key, nothing, reason in _DROPPED:
        *sections, leaf = key.split(".")
        section = _section(today, *sections)
        if leaf in section and (value := section.pop(leaf)) != nothing:
            notes.append(f"{source}: {key} = {str(value).lower()} is ignored: {reason}")
    recompute = _section(today, "train", "recompute")
    if recompute.get("budget_gb", ...) is None:  # as every recipe of a run had it; any other value is an unknown key
        del recompute["budget_gb"]
    log = _section(today, "log")
    if "tensorboard" in log:
        is_wanted = log.pop("tensorboard")
        if not isinstance(is_wanted, bool):
            raise RecipeError(f"{source}: log.tensorboard = {is_wanted!r}: should be true or false; see log.trackers")
        given = log.get("trackers") or []
        others = [name for name in (given if isinstance(given, list) else [given]) if name != "tensorboard"]
        log["trackers"] = [*others, *(["tensorboard"] if is_wanted else [])]
    return today, notes


def _section(tree: Any, *names: str) -> dict[str, Any]:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}
