"""The grid of a sweep: `key=a,b,c` and `run.seed=0..4`, and the runs that it names."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from karat_scale.foundation.errors import UserError
from karat_scale.recipe.loading import text_digest

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
