"""The tars of a directory, and the split that each belongs to."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import Store

_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_NAMES)})(?![a-z])", re.IGNORECASE)
_NAME_IN_RECORD = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")


def find_tars(source: Path | Store) -> list[str]:
    """Return the tars in a directory or at a URL and below it, as sorted paths relative to it. Raises DataError."""
    if isinstance(source, Store):
        where, files = source.url, list(source.files())
    elif source.is_dir():
        where, files = str(source), [str(path.relative_to(source)) for path in source.rglob("*.tar*") if path.is_file()]
    else:
        raise DataError(f"{source} is not a directory; name the one that holds the tars")
    names = sorted(name for name in files if name.endswith(".tar"))
    if not names:
        packed = next((name for name in files if ".tar." in name), None)
        found = f"only such as {packed}; unpack their compression first" if packed else "and nothing to index"
        raise DataError(f"{where} has no *.tar, {found}")
    for name in names:
        if not _NAME_IN_RECORD.fullmatch(name):
            raise DataError(
                f"{where}/{name}: the name has other characters than letters, digits, _, . and -; rename it"
            )
    return names


def into_splits(names: Sequence[str], rules: Sequence[str]) -> dict[str, list[str]]:
    """Return the tars of each split.

    Args:
        names: paths of tars.
        rules: `SPLIT=PATTERN` each, such as `train=shard-0*.tar`; without any, the word train, val, validation or
            test in a path decides, and tars without such a word are for training.

    Raises:
        DataError: a rule fits no tar, or a tar fits none.
    """
    if not rules:
        return _by_word(names)
    splits: dict[str, list[str]] = {}
    left = list(names)
    for rule in rules:
        split, equals, pattern = rule.partition("=")
        if not equals or not re.fullmatch(r"\w+", split):
            raise DataError(f"--split {rule}: should be SPLIT=PATTERN, such as train=train-*.tar")
        fitting = [name for name in left if fnmatchcase(name, pattern)]
        if not fitting:
            raise DataError(f"--split {rule}: no tar that is left has such a path; the first is {names[0]}")
        splits.setdefault(split, []).extend(fitting)
        left = [name for name in left if name not in set(fitting)]
    if left:
        raise DataError(f"{left[0]} and {len(left) - 1} more tars are in no split; add --split SPLIT=PATTERN for them")
    return splits


def _by_word(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        words = _WORD.findall(name)
        splits.setdefault(_NAMES[words[-1].lower()] if words else "train", []).append(name)
    return splits
