"""ImageNet's official tars as sources, read in place.

ILSVRC2012_img_train.tar    one tar per class: n01440764.tar, ...
ILSVRC2012_img_val.tar      ILSVRC2012_val_00000001.JPEG, ...; the labels come from a file beside it (val_labels.py)
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from karat_scale.data.prepare.sources.base import Openers, SourceOptions
from karat_scale.data.prepare.sources.imagefolder import is_image_name
from karat_scale.data.prepare.sources.tars import Member, TarSource, scan_tar
from karat_scale.data.prepare.sources.val_labels import LABEL_FILES, find_file, read_val_labels
from karat_scale.foundation.errors import DataError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"


def has_imagenet_tars(src: Path) -> bool:
    """True if an official tar is in `src`."""
    return (src / TRAIN_TAR).is_file() or (src / VAL_TAR).is_file()


def imagenet_splits(
    src: Path, split: str | None, options: SourceOptions, known_classes: list[str] | None
) -> tuple[Openers, list[str]]:
    """Return the splits whose tars are in `src`, and their classes: the sorted wnids. Raises DataError."""
    found: Openers = {}
    wnids: set[str] = set()
    if (src / TRAIN_TAR).is_file():
        inner = [member for member in scan_tar(src / TRAIN_TAR) if member.name.endswith(".tar")]
        if not inner:
            raise DataError(f"{src / TRAIN_TAR} holds no tars of classes; it is not the official one")
        wnids |= {_wnid(member) for member in inner}
        found["train"] = partial(TarSource, src / TRAIN_TAR, _train_images(src / TRAIN_TAR, inner))
    if (src / VAL_TAR).is_file() and split != "train":
        members = list(scan_tar(src / VAL_TAR))
        labels = _val_labels(src, members, options, sorted(wnids) or known_classes)
        wnids |= set(labels.values())
        found["val"] = partial(TarSource, src / VAL_TAR, _val_images(members, labels))
    return found, sorted(wnids)


def _wnid(member: Member) -> str:
    return member.name.rpartition("/")[2].removesuffix(".tar")


def _stem(member: Member) -> str:
    return _file(member).rpartition(".")[0]


def _file(member: Member) -> str:
    return member.name.rpartition("/")[2]


def _train_images(path: Path, inner: list[Member]) -> Iterator[tuple[str, str, Member]]:
    for tar in inner:
        for member in scan_tar(path, within=tar):
            yield _wnid(tar), f"{_wnid(tar)}/{member.name}", member


def _val_images(members: list[Member], labels: dict[str, str]) -> Iterator[tuple[str, str, Member]]:
    for member in members:
        wnid = labels.get(_stem(member), "")
        yield wnid, f"{wnid}/{_file(member)}" if wnid else member.name, member


def _val_labels(src: Path, members: list[Member], options: SourceOptions, wnids: list[str] | None) -> dict[str, str]:
    path = options.val_labels or find_file(src, LABEL_FILES)
    if path is None:
        raise DataError(
            f"{src / VAL_TAR} has no labels beside it; put LOC_val_solution.csv there or use --val-labels FILE, "
            f"or make only --split train"
        )
    stems = [_stem(member) for member in members if is_image_name(_file(member))]
    return read_val_labels(path, stems, wnids, options.synsets)
