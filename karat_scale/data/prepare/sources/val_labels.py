"""The class of each ImageNet validation image, from any of the published forms of the labels.

    LOC_val_solution.csv                          Kaggle: `ILSVRC2012_val_00048981,n03995372 85 1 499 272`
    any text or CSV file                          lines `filename wnid`, separated by blank or comma, suffix optional
    imagenet_2012_validation_synset_labels.txt    one wnid per line, in the order of the images' names
    val.txt                                       lines `filename number`, counted from 0 over the sorted wnids
    ILSVRC2012_validation_ground_truth.txt        the devkit: one number per line, from 1, in its own class order

The devkit's order is not the sorted one. It comes from a mapping file (--synsets) with lines `number wnid ...`, or a
wnid per line in that order, as in meta.mat.
"""

import re
from pathlib import Path

from karat_scale.foundation.errors import DataError

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
    return {stem: _pick(path, order, int(number)) for stem, number in numbers.items()}


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


def _pick(path: Path, order: dict[int, str], number: int) -> str:
    if number not in order:
        raise DataError(f"{path} has the class number {number}, but the mapping has {len(order)} classes")
    return order[number]
