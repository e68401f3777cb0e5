"""Which class of a run a class of another test set is: by its name, by its WordNet id, or by its number."""

import functools
import re
from collections import Counter
from collections.abc import Sequence

_WNID = re.compile(r"n\d{8}")


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """Return the label of each of their classes among ours; None of one that is not there.

    Equal names match first. Others are compared without case, and an underscore is a space, where that names one class
    alone on both sides. WordNet ids and the names of ImageNet-1K's classes stand for each other. Where all of their
    names are numbers, as in ImageNet-V2, they are the labels themselves, unless ours are numbers, too.
    """
    if list(theirs) == list(ours):
        return list(range(len(ours)))
    equal, plain = _labels(ours), _labels([_plain(name) for name in ours])
    alone = _labels([_plain(name) for name in theirs])
    found = [equal.get(name, plain.get(_plain(name)) if _plain(name) in alone else None) for name in theirs]
    if all(label is not None for label in found):
        return found
    if all(name.isdecimal() for name in theirs) and not any(name.isdecimal() for name in ours):
        return [int(name) if int(name) < len(ours) else None for name in theirs]
    by_wnid = {wnid: label for label, name in enumerate(ours) if (wnid := wnid_of(name))}
    return [by_wnid.get(wnid_of(name)) if label is None else label for label, name in zip(found, theirs, strict=True)]


def wnid_of(name: str) -> str:
    """Return the WordNet id of a class of ImageNet-1K, given that id or a name; "" of another class."""
    return name if _WNID.fullmatch(name) else _wnids_by_name().get(_plain(name), "")


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of ImageNet-1K's classes in the order of its labels."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def _wnids_by_name() -> dict[str, str]:
    """Return the ids by whole descriptions and by each of their names, without the names that two classes have."""
    from timm.data import ImageNetInfo

    named: list[tuple[str, str]] = []
    info = ImageNetInfo("imagenet-1k")
    for wnid in info.label_names():
        description = info.label_name_to_description(wnid)
        names = {_plain(description), *map(_plain, description.split(","))}
        named += [(name, wnid) for name in names]
    counts = Counter(name for name, _ in named)
    return {name: wnid for name, wnid in named if counts[name] == 1}


def _labels(names: Sequence[str]) -> dict[str, int]:
    """Return the label of each name that only one class has."""
    counts = Counter(names)
    return {name: label for label, name in enumerate(names) if counts[name] == 1}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
