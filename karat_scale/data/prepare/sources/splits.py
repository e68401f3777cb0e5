"""Which splits of a source are made, and which of them say what the classes are."""

from collections.abc import Collection, Mapping
from pathlib import Path

from karat_scale.foundation.errors import DataError

# Other data sets' names for the split that recipes call val.
VAL_NAMES = ("val", "valid", "validation", "test", "t10k")


def choose_splits(src: Path, found: Collection[str], split: str | None) -> dict[str, str]:
    """Return output names of splits and the source's own names for them. Raises DataError if there is no such split."""
    if split is None:
        first_val = next((name for name in VAL_NAMES if name in found), None)
        chosen = {name: name for name in found if name not in VAL_NAMES}
        return chosen | ({"val": first_val} if first_val else {})
    aliases = VAL_NAMES if split in VAL_NAMES else (split,)
    for origin in (split, *aliases):
        if origin in found:
            return {split: origin}
    raise DataError(f"{src} has no split {split!r}; it has {', '.join(found)}")


def labelling_splits(src: Path, found: Collection[str], split: str | None) -> set[str]:
    """Return the source's names of the splits whose classes are numbered. Raises DataError if there is no such split.

    They are those that are made without --split, and `split`. So a split that is made alone has the labels that it has
    beside the others. A split that is left out adds no class: all images of `test` are often in one folder.
    """
    return {*choose_splits(src, found, None).values(), *choose_splits(src, found, split).values()}


def names_of_classes(src: Path, by_split: Mapping[str, Collection[str]], split: str | None) -> list[str]:
    """Return the classes of these splits, sorted. See `labelling_splits`."""
    return sorted({name for origin in labelling_splits(src, by_split, split) for name in by_split[origin]})
