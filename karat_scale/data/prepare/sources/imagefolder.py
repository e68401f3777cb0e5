"""An ImageFolder as a source, and the published labels of ImageNet's validation images.

An ImageFolder has one folder per class. The original bytes are kept. The class of each ImageNet validation image comes
from one of these files:

    LOC_val_solution.csv                          Kaggle: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`
    any text or CSV file                          lines `filename wnid`, separated by blank or comma, suffix optional
    imagenet_2012_validation_synset_labels.txt    one wnid per line, in the order of the images' names
    val.txt                                       lines `filename number`, counted from 0 over the sorted wnids
    ILSVRC2012_validation_ground_truth.txt        the devkit: one number per line, from 1, in its own class order

The devkit's order is not the sorted one. It comes from a mapping file (--synsets) with lines `number wnid ...`, or a
wnid per line in that order, as in meta.mat.
"""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from karat_scale.data.prepare.sources.base import ListedSource, UnreadableSampleError, cannot_read, is_of_the_file
from karat_scale.data.shards.shards import (
    folders_in,
    images_under,
    is_hidden_folder,
    is_image_name,
    refuse_broken_link,
)
from karat_scale.foundation.console import progress
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image

SPLIT_FOLDERS = ("train", "val", "valid", "validation", "test")
LIKE_SPLITS = {**{name: name for name in SPLIT_FOLDERS}, "training": "train", "testing": "test"}
NO_IMAGE_NAME = "the name has no image suffix"
# Threads that ask for the sizes of files, which a network file system answers slowly; and files for each turn.
_ASKING, _FILES = 16, 1000


def split_folders(src: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the folders of `src` with a split's name that have class folders, and those that have only images."""
    splits, flat = {}, {}
    for folder in (src / name for name in SPLIT_FOLDERS):
        refuse_broken_link(folder)
        if not folder.is_dir():
            continue
        if any(entry.is_dir() and not is_hidden_folder(entry.name) for entry in folder.iterdir()):
            splits[folder.name] = folder
        elif any(is_image_name(entry.name) for entry in folder.iterdir()):
            flat[folder.name] = folder
    return splits, flat


def refuse_like_splits(src: Path, names: Iterable[str], has_folders: Callable[[str], bool]) -> None:
    """Raise DataError for a folder of folders that has nearly a split's name, such as Training: it is no class."""
    for name in sorted(names):
        split = LIKE_SPLITS.get(name.lower(), name)
        if split != name and has_folders(name):
            raise DataError(
                f"{src}: the folder {name} looks like a split, and not like a class or a folder to leave out; rename "
                f"it to {split}, or give it alone as --src with --split {'val' if split == 'test' else split}"
            )


def class_folders(folder: Path) -> list[str]:
    """Return the class names, sorted. Raises DataError if there is none, or if one is not UTF-8."""
    names = folders_in(folder)
    if not names:
        tars = "; for tars that others made, use karat index" if any(folder.glob("*.tar")) else ""
        raise DataError(f"{folder} has no class folders; expected {folder.name}/<class>/<image>{tars}")
    require_utf8(names, folder)
    return names


def require_utf8(classes: list[str], where: Path) -> None:
    """Raise DataError for a class whose name cannot be written as text."""
    for name in classes:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        if shown != name:
            raise DataError(f"{where}: the name of class {shown} is not UTF-8; rename it")


class ImageFolderSource(ListedSource):
    """`folder`/<class>/.../<image>, sorted by class and the path's bytes. See Source.

    Raises DataError for a class that `classes` does not list.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self.folder = folder
        loose = sorted(path.name for path in folder.iterdir() if is_image_name(path.name) and not path.is_dir())
        skipped = [(name, "it is in no class folder") for name in loose]
        paths: list[str] = []
        labels: list[int] = []
        numbers = {name: label for label, name in enumerate(classes)}
        for name in class_folders(folder):
            if name not in numbers:
                raise DataError(
                    f"{folder / name} is a class that the shards do not have; their classes are "
                    f"{classes[0]} ... {classes[-1]} ({len(classes)}); use another --out"
                )
            try:
                found, others = images_under(folder, name)
            except OSError as error:
                raise cannot_read(Path(error.filename), error) from error
            skipped += [(path, NO_IMAGE_NAME) for path in others]
            paths += found
            labels += [numbers[name]] * len(found)
        if not paths:
            parquet = next((path for path, _ in skipped if path.endswith(".parquet")), "")
            fix = f"; it has Parquet files: give {folder / parquet.partition('/')[0]} as --src" if parquet else ""
            raise DataError(f"{folder} has no images in its class folders{fix}")
        if len(classes) == 1 and all(path.count("/") > 1 for path in paths):  # as in a tar
            raise DataError(
                f"{folder}: by paths such as {paths[0]}, all images would be of one class, {classes[0]!r}; give the "
                "folder of the classes, or of the splits, as --src"
            )
        super().__init__(classes, paths, labels, _sizes(folder, paths))
        self.skipped = skipped

    def read(self, index: int) -> bytes:
        path = self.folder / self._paths[index]
        try:
            return read_image(path)
        except OSError as error:
            if is_of_the_file(error):
                raise UnreadableSampleError(error.strerror or str(error)) from error
            raise cannot_read(path, error) from error


def _sizes(folder: Path, paths: list[str]) -> list[int]:
    """Return the bytes of each file. Raises DataError."""
    parts = [paths[start : start + _FILES] for start in range(0, len(paths), _FILES)]
    sizes: list[int] = []
    with progress(f"{folder.name}: listing", len(paths), "files") as advance, ThreadPoolExecutor(_ASKING) as pool:
        for found in pool.map(lambda part: [_size(folder / path) for path in part], parts):
            sizes += found
            advance(len(found))
    return sizes


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 if it cannot be read, which its reading reports. Raises DataError."""
    try:
        return path.stat().st_size
    except OSError as error:
        if is_of_the_file(error):
            return 0
        raise cannot_read(path, error) from error


LABEL_FILES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "val_labels.csv",
    "val_labels.txt",
    "val.txt",
)
NAME_FILES = ("LOC_synset_mapping.txt", "synset_words.txt")
_WNID = re.compile(r"n\d{8}")
_NUMBER_IN_NAME = re.compile(r"_(\d{8})$")
_COLUMNS = re.compile(r"[\s,]+")


def find_file(src: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of these files in `src`."""
    return next((src / name for name in names if (src / name).is_file()), None)


def read_synset_names(path: Path) -> dict[str, str]:
    """Return readable names by wnid from lines `n01440764 tench, Tinca tinca`. Raises DataError."""
    names = {}
    for number, line in enumerate(_lines(path), 1):
        wnid, _, name = line.partition("\t" if "\t" in line else " ")
        if not _WNID.fullmatch(wnid) or not name.strip():
            raise DataError(f"{path}: line {number} is not `wnid name`: {line[:60]!r}")
        names[wnid] = name.strip()
    return names


def read_val_labels(path: Path, stems: list[str], wnids: list[str] | None, synsets: Path | None) -> dict[str, str]:
    """Return the wnid by image name without suffix, for the images `stems`, from a label file.

    wnids: the sorted classes, if known, for numbers counted from 0. synsets: the devkit's class order. Raises
    DataError if an image has no label, or a line has an unknown form.
    """
    rows = [_COLUMNS.split(line) for line in _lines(path)]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if not rows:
        raise DataError(f"{path} is empty")
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
        raise DataError(f"{path} has no label for {missing[0]} and {len(missing) - 1} other images")
    wrong = next((stem for stem in stems if not _WNID.fullmatch(named[stem])), None)
    if wrong:
        raise DataError(f"{path}: the label of {wrong} is {named[wrong]!r}, which is not a wnid such as n01440764")
    return named


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _stem(name: str) -> str:
    file = name.replace("\\", "/").rpartition("/")[2]
    return file.rpartition(".")[0] or file


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
    rows = [_COLUMNS.split(line) for line in _lines(synsets)]
    if all(row[0].isdigit() and len(row) > 1 for row in rows):
        order = {int(row[0]): row[1] for row in rows}
    else:
        order = {number: row[0] for number, row in enumerate(rows, 1)}
        if list(order.values()) == sorted(order.values()):
            raise DataError(f"{synsets} is sorted by wnid, which is not the devkit's order; use lines `number wnid`")
    if (wrong := next((number for number in map(int, numbers.values()) if number not in order), None)) is not None:
        raise DataError(f"{path} has the class number {wrong}, but the mapping has {len(order)} classes")
    return {stem: order[int(number)] for stem, number in numbers.items()}


def _from_sorted(path: Path, numbers: dict[str, str], wnids: list[str] | None) -> dict[str, str]:
    if not wnids:
        raise DataError(f"{path} numbers the classes, but their wnids are unknown; make the train split with it")
    order = dict(enumerate(sorted(wnids)))
    if max(map(int, numbers.values())) >= len(order):
        raise DataError(
            f"{path} has class numbers up to {max(map(int, numbers.values()))}; counted from 0 over "
            f"{len(order)} sorted wnids they end at {len(order) - 1}"
        )
    return {stem: order[int(number)] for stem, number in numbers.items()}
