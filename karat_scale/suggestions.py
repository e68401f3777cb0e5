"""Suggest the nearest known name for an unknown one."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(name: str, names: Iterable[str], count: int = 1, likeness: float = 0.6) -> list[str]:
    """Return at most `count` of `names`, the most similar first, whose beginning is similar enough to `name`.

    The beginning is compared first: people omit the long endings of model names, and seldom mistype the start.
    """

    def score(other: str) -> tuple[float, float]:
        return _ratio(other[: len(name)], name), _ratio(other, name)

    scores = {other: score(other) for other in names}
    alike = [other for other in scores if scores[other][0] >= likeness]
    return sorted(alike, key=lambda other: scores[other], reverse=True)[:count]


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
