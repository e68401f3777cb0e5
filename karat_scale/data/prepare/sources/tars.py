"""Sources in uncompressed tars, read in place: an ImageFolder in one tar, ImageNet's official tars, finished shards.

Headers are scanned once, and nothing is unpacked. The paths of an ImageFolder's members say its splits and classes.
Shards keep the order, keys and labels of their samples. ImageNet's tars are

ILSVRC2012_img_train.tar    one tar per class: n01440764.tar, ...
ILSVRC2012_img_val.tar      ILSVRC2012_val_00000001.JPEG, ...

The classes of the validation images come from one of these files beside their tar:

    LOC_val_solution.csv                          Kaggle: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`
    any text or CSV file                          lines `filename wnid`, separated by blank or comma, suffix optional
    imagenet_2012_validation_synset_labels.txt    one wnid per line, in the order of the images' names
    val.txt                                       lines `filename number`, counted from 0 over the sorted wnids
    ILSVRC2012_validation_ground_truth.txt        the devkit: one number per line, from 1, in its own class order

The devkit's order is not the sorted one. It comes from a mapping file (--synsets) with lines `number wnid ...`, or a
wnid per line in that order, as in meta.mat.
"""

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from karat_scale.data.decoders.jpeg_header import WNID
from karat_scale.data.indexing import MADE_BY
from karat_scale.data.prepare.sources import base
from karat_scale.data.prepare.sources.imagefolder import NO_IMAGE_NAME, refuse_like_splits
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.shards import ShardSplit, is_hidden_folder, is_image_name
from karat_scale.data.shards.tars import scan_members
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_to_read


@dataclass(frozen=True)
class Member:
    """A file in a tar: its bytes are `size` from `offset` of the tar's own file. `unusable` says why it has none."""

    name: str
    offset: int
    size: int
    unusable: str = ""


def scan_tar(path: Path, within: Member | None = None, folders: list[str] | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of the tar that is member `within` of it. Raises DataError if damaged.

    A hard link has the bytes of its target. An image that is no regular file, such as a symbolic link, is `unusable`.
    folders: a list to which the names of the tar's folders are added.
    """
    files: dict[str, Member] = {}
    with open_to_read(path) as file:
        begin, size = (within.offset, within.size) if within else (0, path.stat().st_size)

        def read(offset: int, most: int) -> bytes:
            file.seek(begin + offset)
            return file.read(max(0, min(most, size - offset)))

        for found in scan_members(read, size, f"{path}: {within.name}" if within else f"{path}"):
            place, target = posixpath.normpath(found.name), files.get(posixpath.normpath(found.target))
            if found.kind == "directory":
                if folders is not None:
                    folders.append(found.name)
            elif found.kind == "file":
                files[place] = Member(found.name, begin + found.offset, found.size)
                yield files[place]
            elif found.target and target:
                files[place] = replace(target, name=found.name)
                yield files[place]
            elif is_image_name(posixpath.basename(place)):
                why = f"a {found.kind} member, not a regular file"
                if found.target:
                    why = f"a hard link to {found.target!r}, which is not before it in the tar"
                yield Member(found.name, 0, 0, why)


class TarSource(base.ListedSource):
    """Image members of one tar as a source. See Source.

    members: (class name, path for reports and keys, member). They are sorted in the order of an ImageFolder of the
    same images, so both give the same shards.
    """

    def __init__(self, archive: Path, members: Iterable[tuple[str, str, Member]], classes: list[str]) -> None:
        skipped: list[tuple[str, str]] = []
        self._archive = archive
        self._file: int | None = None
        numbers = {name: label for label, name in enumerate(classes)}
        found: list[tuple[str, str, Member]] = []
        members = list(members)
        latest = {path: member for _, path, member in members}
        for name, path, member in members:
            if member is not latest[path]:
                skipped.append((path, "a later file of the tar replaces it"))
                continue
            if member.unusable or not is_image_name(path.rpartition("/")[2]):
                skipped.append((path, member.unusable or NO_IMAGE_NAME))
                continue
            found.append((name, path, member))
        if not found:
            raise DataError(f"{archive} has no images; name a tar of images")
        found.sort(key=lambda item: (item[0], os.fsencode(item[1])))
        labels, sizes = [numbers[name] for name, _, _ in found], [member.size for _, _, member in found]
        super().__init__(classes, [path for _, path, _ in found], labels, sizes)
        self.skipped = skipped
        self._offsets = np.array([member.offset for _, _, member in found], dtype=np.int64)

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        try:
            if self._file is None:
                self._file = os.open(self._archive, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._file, size, int(self._offsets[index]))
        except OSError as error:
            raise base.cannot_read(self._archive, error) from error
        if len(data) != size:
            raise DataError(f"{self._archive} has become shorter; it ends in {self.name(index)}")
        return data

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


_FORM = "[<folder>/][train|val/]<class>/<image>"


class _Place(NamedTuple):
    """A path in a tar: the folders above its split, the split, "" for none, and the parts inside it."""

    above: list[str]
    split: str
    inside: list[str]

    @property
    def hidden(self) -> bool:
        """True if the class, or a folder above it or in it, is hidden."""
        return any(map(is_hidden_folder, [*self.above, *self.inside[:1], *self.inside[:-1]]))

    @property
    def is_image(self) -> bool:
        """True for an image's name that is in no hidden folder."""
        return bool(self.inside) and is_image_name(self.inside[-1]) and not self.hidden


_Placed = list[tuple[_Place, Member]]


def folder_tar_splits(path: Path, split: str | None) -> tuple[base.Openers, list[str]]:
    """Return splits and classes of a tar of an ImageFolder: [<anything>/][train|val/]<class>/<image>.

    split: the requested split, or None for all; if the tar names no split, the name of its only one.

    Files in hidden folders or beside the classes are among a source's skipped files. Raises DataError if an image is in
    no class folder, or if the paths do not tell which folders are the classes.
    """
    names: list[str] = []
    members = [(_place(member.name, 2), member) for member in scan_tar(path, folders=names)]
    folders = [_place(name, 1) for name in names]
    split_there = any(place.split and not place.hidden for place, _ in members)
    if not split_there and _are_in_a_folder(path, members, folders):
        members = [(_below(place), member) for place, member in members]
        folders = [_below(place) for place in folders]
    deep = {place.inside[0] for place, _ in members if place.is_image and not place.split and len(place.inside) > 2}
    refuse_like_splits(path, deep, lambda _: True)
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
            where = f"{path}: {member.name} is in no class folder"
            if not split_there:
                raise DataError(f"{where}; expected <class>/<image>")
            raise DataError(
                f"{where} of a split, as other images are; sort such images into <split>/<class>/<image>, or remove "
                "them"
            )
        else:
            others.append((place.split, ("", inside or member.name, member)))
    parents: dict[str, set[str]] = {}
    for place, _ in members:
        if place.split and place.is_image:
            parents.setdefault(place.split, set()).add("/".join(place.above))
    for name, above in parents.items():
        if len(above) > 1:  # images of one name would take each other's place
            two = " and ".join(map(repr, sorted(above)[:2]))
            raise DataError(f"{path} has a split {name} in several folders, such as {two}; make a tar of one of them")
    if not by_split:
        raise DataError(f"{path} has no images; expected {_FORM}")
    classes = {name: {member_class for member_class, _, _ in items} for name, items in by_split.items()}
    for place in folders:  # a class without files is one too, as in a folder
        if place.split in by_split and place.inside and not place.hidden:
            classes[place.split].add(place.inside[0])
    for name, other in others:
        by_split.get(name, next(iter(by_split.values()))).append(other)
    openers: base.Openers = {
        name or split or "train": partial(TarSource, path, items) for name, items in by_split.items()
    }
    return openers, base.names_of_classes(path, dict(zip(openers, classes.values(), strict=True)), split)


def _place(name: str, own: int) -> _Place:
    """Return the place of a path, of which the last `own` parts cannot be the split."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    possible = parts[: max(0, len(parts) - own)]
    at = next((i for i, part in enumerate(possible) if part in shard_format.SPLIT_FOLDERS), None)
    return _Place([], "", parts) if at is None else _Place(parts[:at], parts[at], parts[at + 1 :])


def _below(place: _Place) -> _Place:
    return place if place.split else _Place(place.inside[:1], "", place.inside[1:])


def _are_in_a_folder(path: Path, members: _Placed, folders: list[_Place]) -> bool:
    """Return whether the classes of a tar without splits are in one folder. Raises DataError if that leaves one class.

    If paths that are longer than <class>/<image> give only one class, it is probably no class.
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


_NUMBER_IN_NAME = re.compile(r"_(\d{8})$")
_COLUMNS = re.compile(r"[\s,]+")
LABEL_FILES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "val_labels.csv",
    "val_labels.txt",
    "val.txt",
)
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"


def has_imagenet_tars(src: Path) -> bool:
    """True if an official tar is in `src`."""
    return (src / TRAIN_TAR).is_file() or (src / VAL_TAR).is_file()


def imagenet_splits(
    src: Path, split: str | None, options: base.SourceOptions, known_classes: list[str] | None
) -> tuple[base.Openers, list[str]]:
    """Return the splits whose tars are in `src`, and their classes: the sorted wnids. Raises DataError."""
    found: base.Openers = {}
    wnids: set[str] = set()
    if (src / TRAIN_TAR).is_file():
        inner = [member for member in scan_tar(src / TRAIN_TAR) if member.name.endswith(".tar")]
        if not inner:
            raise DataError(f"{src / TRAIN_TAR} holds no tars of classes; it is not the official one")
        wnids |= {_wnid(member) for member in inner}
        images = (
            (_wnid(tar), f"{_wnid(tar)}/{member.name}", member)
            for tar in inner
            for member in scan_tar(src / TRAIN_TAR, within=tar)
        )
        found["train"] = partial(TarSource, src / TRAIN_TAR, images)
    if (src / VAL_TAR).is_file() and split != "train":
        members = list(scan_tar(src / VAL_TAR))
        path = options.val_labels or base.find_file(src, LABEL_FILES)
        if path is None:
            raise DataError(
                f"{src / VAL_TAR} has no labels beside it; put LOC_val_solution.csv there or use --val-labels FILE, "
                f"or make only --split train"
            )
        stems = [_stem(member.name) for member in members if is_image_name(_file(member))]
        labels = read_val_labels(path, stems, sorted(wnids) or known_classes, options.synsets)
        wnids |= set(labels.values())
        found["val"] = partial(TarSource, src / VAL_TAR, _val_images(members, labels))
    return found, sorted(wnids)


def _wnid(member: Member) -> str:
    return _file(member).removesuffix(".tar")


def _stem(name: str) -> str:
    file = name.replace("\\", "/").rpartition("/")[2]
    return file.rpartition(".")[0] or file


def _file(member: Member) -> str:
    return member.name.rpartition("/")[2]


def _val_images(members: list[Member], labels: dict[str, str]) -> Iterator[tuple[str, str, Member]]:
    for member in members:
        wnid = labels.get(_stem(member.name), "")
        yield wnid, f"{wnid}/{_file(member)}" if wnid else member.name, member


def read_val_labels(path: Path, stems: list[str], wnids: list[str] | None, synsets: Path | None) -> dict[str, str]:
    """Return the wnid by image name without suffix, for the images `stems`, from a label file.

    wnids: the sorted classes, if known, for numbers counted from 0. synsets: the devkit's class order. Raises
    DataError if an image has no label, or a line has an unknown form.
    """
    rows = [_COLUMNS.split(line) for line in base.lines_of(path)]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path} is empty; fetch it again")
    if len(rows[0]) == 1:
        named = _by_position(path, [row[0] for row in rows], stems)
        if all(value.isdigit() for value in named.values()):
            named = _from_devkit(path, named, synsets)
    else:
        named = {_stem(row[0]): row[1] for row in rows if len(row) > 1}
        if all(value.isdigit() for value in named.values()):
            named = _from_sorted(path, named, wnids)
    missing = [stem for stem in stems if stem not in named]
    if missing:
        raise DataError(f"{path} has no label for {plural(len(missing), 'image')}, such as {missing[0]}; add them")
    wrong = next((stem for stem in stems if not WNID.fullmatch(named[stem])), None)
    if wrong:
        raise DataError(f"{path}: the label of {wrong} is {named[wrong]!r}; expected a wnid such as n01440764")
    return named


def _by_position(path: Path, values: list[str], stems: list[str]) -> dict[str, str]:
    """Match line n with the image with n in its name, else with the n-th name."""
    numbers = [_NUMBER_IN_NAME.search(stem) for stem in stems]
    if all(numbers):
        places = {stem: int(found[1]) for stem, found in zip(stems, numbers, strict=True) if found}
    elif len(values) == len(stems):
        places = {stem: place for place, stem in enumerate(sorted(stems), 1)}
    else:
        raise DataError(f"{path} has {len(values)} lines for {len(stems)} images; use lines `filename wnid`")
    return {stem: values[place - 1] for stem, place in places.items() if 1 <= place <= len(values)}


def _from_devkit(path: Path, numbers: dict[str, str], synsets: Path | None) -> dict[str, str]:
    if synsets is None:
        raise DataError(
            f"{path} holds the devkit's class numbers; use --synsets FILE with lines `number wnid` (from meta.mat), "
            f"or use LOC_val_solution.csv"
        )
    rows = [_COLUMNS.split(line) for line in base.lines_of(synsets)]
    if all(row[0].isdigit() and len(row) > 1 for row in rows):
        order = {int(row[0]): row[1] for row in rows}
    else:
        order = {number: row[0] for number, row in enumerate(rows, 1)}
        if list(order.values()) == sorted(order.values()):
            raise DataError(f"{synsets} is sorted by wnid, which is not the devkit's order; use lines `number wnid`")
    if (wrong := next((number for number in map(int, numbers.values()) if number not in order), None)) is not None:
        raise DataError(f"{path} has the class number {wrong}, which {synsets} does not list; use the whole list")
    return {stem: order[int(number)] for stem, number in numbers.items()}


def _from_sorted(path: Path, numbers: dict[str, str], wnids: list[str] | None) -> dict[str, str]:
    if not wnids:
        raise DataError(f"{path} numbers the classes, but their wnids are unknown; make train, too, without --split")
    order = dict(enumerate(sorted(wnids)))
    if max(map(int, numbers.values())) >= len(order):
        raise DataError(
            f"{path} has class numbers up to {max(map(int, numbers.values()))}; counted from 0 over "
            f"{len(order)} sorted wnids they end at {len(order) - 1}; use lines `filename wnid`"
        )
    return {stem: order[int(number)] for stem, number in numbers.items()}


class ShardSource(base.Source):
    """One split of a directory of shards. See Source. Raises DataError if the shards are not right."""

    def __init__(self, directory: Path, split: str, record: shard_format.DatasetRecord) -> None:
        self._split = ShardSplit(directory, split, len(record.classes))
        indexes = [(directory / shard.index.name).read_bytes() for shard in record.splits[split].shards]
        sizes = np.concatenate([shard_format.read_column(index, "size") for index in indexes])
        super().__init__(record.classes, self._split.labels, sizes)
        self.grey = record.splits[split].grey
        self._keys = np.concatenate([shard_format.read_column(index, shard_format.KEY) for index in indexes])
        shards = record.splits[split].shards
        self._hashes = [shard.sha256 for shard in shards]
        if record.splits[split].made.get("by") == MADE_BY:  # then the labels and classes are not those of the tars
            self._hashes += [shard.index.sha256 for shard in shards] + record.classes

    def name(self, index: int) -> str:
        return self.key(index)

    def key(self, index: int) -> str:
        return bytes(self._keys[index]).decode(errors="backslashreplace")

    def read(self, index: int) -> bytes:
        return self._split.read(index)

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._hashes).encode()).hexdigest()


def has_shards(src: Path) -> bool:
    """True if this is a directory of finished shards."""
    return (src / shard_format.DATASET_FILE).is_file()


def open_shards(src: Path, split: str | None) -> tuple[dict[str, ShardSource], list[str]]:
    """Return the requested splits of a directory of shards, and its classes' readable names. Raises DataError."""
    record = shard_format.read_dataset_record(src, what="--src")
    chosen = shard_format.chosen_splits(src, record, split)
    if empty := [name for name, found in chosen.items() if not found.samples]:
        if len(empty) == len(chosen):
            raise DataError(f"{src} has no samples of {' and '.join(empty)}; choose another split or source")
        print(f"{src}: {' and '.join(empty)} without samples: left out")
    return {name: ShardSource(src, name, record) for name, found in chosen.items() if found.samples}, record.names
