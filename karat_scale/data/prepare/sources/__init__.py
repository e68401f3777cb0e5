"""Sources of images: find the kind of source in a directory, and its splits."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

from karat_scale.data.prepare.sources.base import Openers, Source, SourceOptions, choose_splits, names_of_classes
from karat_scale.data.prepare.sources.imagefolder import (
    ImageFolderSource,
    class_folders,
    refuse_like_splits,
    split_folders,
)
from karat_scale.data.prepare.sources.parquet import parquet_files, parquet_splits
from karat_scale.data.prepare.sources.small import (
    KNOWN_TO_TORCHVISION,
    cifar_splits,
    flowers_splits,
    idx_splits,
    stl10_splits,
    svhn_splits,
)
from karat_scale.data.prepare.sources.tars import folder_tar_splits, has_imagenet_tars, imagenet_splits
from karat_scale.foundation.errors import DataError

__all__ = ["Source", "SourceOptions", "open_splits"]

# Each looks for its data set's official files and returns splits and classes. The value has the options it uses.
DataSets = dict[Callable[[Path, SourceOptions], tuple[Openers, list[str]]], set[str]]
DATA_SETS: DataSets = {
    idx_splits: {"encoding"},
}
OF_TORCHVISION: DataSets = {
    partial(cifar_splits, "cifar10"): {"encoding", "any_hash"},
    partial(cifar_splits, "cifar100"): {"encoding", "any_hash"},
    svhn_splits: {"encoding", "any_hash"},
    stl10_splits: {"encoding", "any_hash"},
    flowers_splits: {"any_hash"},
}


def open_splits(
    src: Path, split: str | None, known_classes: list[str] | None, options: SourceOptions | None = None
) -> dict[str, Source]:
    """Return the requested splits of `src`, a directory, a tar of an ImageFolder or a Parquet file, by output names.

    split: one output name, or None for all; then only the first of several validation splits is taken, and a line
    names the others. known_classes: the classes that earlier splits were labelled with. A source without split folders
    is one split, called `split` or train. Raises DataError.
    """
    if not src.is_dir() and not src.is_file():
        raise DataError(f"--src {src} is not a directory, a tar or a Parquet file; correct the path")
    if src.is_dir() and not any(src.iterdir()):
        raise DataError(f"--src {src} is empty; correct the path")
    found, own_classes = _find(src, split, options or SourceOptions(), known_classes)
    chosen = choose_splits(src, found, split)
    for name, origin in chosen.items():
        if name != origin:
            print(f"{src}: its split {origin} becomes {name}")
    if split is None:
        for name in [name for name in found if name not in chosen.values()]:
            print(f"{src}: the split {name} is left out; --split {name} converts it")
    classes = own_classes if known_classes is None else known_classes
    if known_classes is not None and not set(own_classes) <= set(known_classes):
        new = sorted(set(own_classes) - set(known_classes))
        raise DataError(f"{src} has the class {new[0]!r}, which the shards in --out do not have; use another --out")
    return {name: found[origin](classes) for name, origin in chosen.items()}


def _find(
    src: Path, split: str | None, options: SourceOptions, known_classes: list[str] | None
) -> tuple[Openers, list[str]]:
    parquet = parquet_files(src)
    if parquet:
        _refuse_unheeded(src, options, "Parquet files", {"any_hash", "image_column", "label_column"})
        return parquet_splits(src, parquet, split, options)
    if src.is_file():
        _refuse_unheeded(src, options, "images in a tar", set())
        return folder_tar_splits(src, split)
    if has_imagenet_tars(src):
        _refuse_unheeded(src, options, "ImageNet's tars", {"val_labels", "synsets"})
        return imagenet_splits(src, split, options, known_classes)
    possible = DATA_SETS | (OF_TORCHVISION if any((src / name).exists() for name in KNOWN_TO_TORCHVISION) else {})
    official = [(heeded, *found) for look_for, heeded in possible.items() if (found := look_for(src, options))[0]]
    if len(official) > 1:
        raise DataError(f"{src} has the official files of several data sets; give each a directory of its own")
    for heeded, known, names in official:
        _refuse_unheeded(src, options, "a data set's official files", heeded)
        return known, names
    _refuse_unheeded(src, options, "folders of image files", set())
    folders, flat = split_folders(src)
    if split is None or not folders:
        names = [path.name for path in src.iterdir() if path.is_dir()]
        refuse_like_splits(src, names, lambda name: any(path.is_dir() for path in (src / name).iterdir()))
    for name in choose_splits(src, [*folders, *flat], split).values() if folders else ():
        if name in flat:  # like val of Kaggle's ImageNet
            raise DataError(
                f"{flat[name]} has images but no class folders; sort them into classes, "
                f"or make only --split {next(iter(folders))}"
            )
    if folders and split is None:
        for name in flat:
            print(f"{src}: the split {name} is left out; its images are in no class folders")
    folders = folders or {split or "train": src}
    names = names_of_classes(src, {name: class_folders(folder) for name, folder in folders.items()}, split)
    return {name: partial(ImageFolderSource, path) for name, path in folders.items()}, names


def _refuse_unheeded(src: Path, options: SourceOptions, kind: str, heeded: set[str]) -> None:
    """Raise DataError for an option that this kind of source would ignore."""
    for field in fields(options):
        if getattr(options, field.name) and field.name not in heeded:
            raise DataError(f"--{field.name.replace('_', '-')} has no effect on {kind}, as in {src}; remove it")
