"""An ImageFolder in one uncompressed tar: its splits and classes, by the paths of its members."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from karat_scale.data.prepare.sources.base import Openers
from karat_scale.data.prepare.sources.imagefolder import SPLIT_FOLDERS, is_image_name, require_utf8
from karat_scale.data.prepare.sources.splits import names_of_classes
from karat_scale.data.prepare.sources.tars import Member, TarSource, scan_tar
from karat_scale.foundation.errors import DataError

_FORM = "[<folder>/][train|val/]<class>/<image>"


class _Place(NamedTuple):
    """A path in a tar: the folders above its split, the split, "" for none, and the parts inside it."""

    above: list[str]
    split: str
    inside: list[str]

    @property
    def hidden(self) -> bool:
        """True if the class, or a folder above it, is hidden."""
        return any(part[0] == "." for part in [*self.above, *self.inside[:1]])

    @property
    def is_image(self) -> bool:
        """True for an image's name that is in no hidden folder."""
        return bool(self.inside) and is_image_name(self.inside[-1]) and not self.hidden


_Placed = list[tuple[_Place, Member]]


def folder_tar_splits(path: Path, split: str | None) -> tuple[Openers, list[str]]:
    """Return splits and classes of a tar of an ImageFolder: [<anything>/][train|val/]<class>/<image>.

    split: the requested one, or None for all; the name of the only split of a tar that names none.

    What is in hidden folders or beside the classes is among what a source skipped. Raises DataError if an image is in
    no class folder, or if the paths do not tell which folders are the classes.
    """
    names: list[str] = []
    members = [(_place(member.name, 2), member) for member in scan_tar(path, folders=names)]
    folders = [_place(name, 1) for name in names]
    split_there = any(place.split and not place.hidden for place, _ in members)
    if not split_there and _are_in_a_folder(path, members, folders):
        members = [(_below(place), member) for place, member in members]
        folders = [_below(place) for place in folders]
    by_split: dict[str, list[tuple[str, str, Member]]] = {}
    others: list[tuple[str, tuple[str, str, Member]]] = []
    for place, member in members:
        inside = "/".join(place.inside)
        if place.hidden:
            hidden = replace(member, unusable="it is in a hidden folder, or hidden")
            others.append((place.split, ("", member.name, hidden)))
        elif len(place.inside) > 1 and bool(place.split) == split_there:
            by_split.setdefault(place.split, []).append((place.inside[0], inside, member))
        elif place.is_image:
            raise _in_no_class(path, member, split_there)
        else:
            others.append((place.split, ("", inside or member.name, member)))
    if not by_split:
        raise DataError(f"{path} has no images; expected {_FORM}")
    classes = {name: {member_class for member_class, _, _ in items} for name, items in by_split.items()}
    for place in folders:  # a class without files is one too, as in a folder
        if place.split in by_split and place.inside and not place.hidden:
            classes[place.split].add(place.inside[0])
    for name, other in others:
        by_split.get(name, next(iter(by_split.values()))).append(other)
    openers: Openers = {name or split or "train": partial(TarSource, path, items) for name, items in by_split.items()}
    names = names_of_classes(path, dict(zip(openers, classes.values(), strict=True)), split)
    require_utf8(names, path)
    return openers, names


def _place(name: str, own: int) -> _Place:
    """Return the place of a path, of which the last `own` parts cannot be the split."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    at = next((i for i, part in enumerate(parts[: max(0, len(parts) - own)]) if part in SPLIT_FOLDERS), None)
    return _Place([], "", parts) if at is None else _Place(parts[:at], parts[at], parts[at + 1 :])


def _below(place: _Place) -> _Place:
    return place if place.split else _Place(place.inside[:1], "", place.inside[1:])


def _are_in_a_folder(path: Path, members: _Placed, folders: list[_Place]) -> bool:
    """Return whether the classes of a tar without splits are in one folder. Raises DataError if that leaves one class.

    One class by paths that are longer than <class>/<image> is probably no class.
    """
    images = [(place, member) for place, member in members if place.is_image]
    if not images or any(len(place.inside) < 3 for place, _ in images):
        return False
    tops = {place.inside[0] for place, _ in images}
    is_one = len(tops | {place.inside[0] for place in folders if place.inside and not place.hidden}) == 1
    classes = {place.inside[1] for place, _ in images} if is_one else tops
    if len(classes) == 1:
        raise DataError(
            f"{path}: by paths such as {images[0][1].name}, all images would be of one class, {classes.pop()!r}; "
            f"expected {_FORM}"
        )
    return is_one


def _in_no_class(path: Path, member: Member, split_there: bool) -> DataError:
    if not split_there:
        return DataError(f"{path}: {member.name} is in no class folder; expected <class>/<image>")
    return DataError(
        f"{path}: {member.name} is in no class folder of a split, as other images are; sort such images into "
        "<split>/<class>/<image>, or remove them"
    )
