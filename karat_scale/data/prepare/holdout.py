"""Divide a source with one split into train and val: by class, and by a seed."""

import argparse

import numpy as np
import numpy.typing as npt

from karat_scale.data.order import epoch_order
from karat_scale.data.prepare.job import rank_in_class
from karat_scale.data.prepare.sources import Source, SourceOptions, open_splits
from karat_scale.foundation.errors import DataError


class PartOfSource(Source):
    """The samples `indices` of another source, in this order. See Source."""

    def __init__(self, whole: Source, indices: npt.NDArray[np.int64]) -> None:
        super().__init__(whole.classes, whole.labels[indices], whole.sizes[indices], whole.facts)
        self._whole, self._indices, self.exact_sizes = whole, indices, whole.exact_sizes
        self.blocks, self.window = None if whole.blocks is None else whole.blocks[indices], whole.window

    def name(self, index: int) -> str:
        return self._whole.name(int(self._indices[index]))

    def key(self, index: int) -> str:
        return self._whole.key(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        return self._whole.read(int(self._indices[index]))

    def fingerprint(self) -> str:
        return self._whole.fingerprint()


def open_chosen(options: argparse.Namespace, known_classes: list[str] | None) -> dict[str, Source]:
    """Return the splits that the command line asks for. Raises DataError."""
    sources = open_splits(options.src, options.split, known_classes, SourceOptions.of(options))
    if options.val_fraction is None and options.val_count is None:
        return sources
    option = "--val-fraction" if options.val_count is None else "--val-count"
    if "val" in sources:
        raise DataError(f"{options.src} already has a validation split; remove {option}")
    if len(sources) > 1:
        raise DataError(f"{options.src} has the splits {', '.join(sources)}; give the folder of one as --src")
    (whole,) = sources.values()
    held = held_out(whole.labels, options.val_fraction, options.val_count, options.seed)
    train, val = PartOfSource(whole, np.flatnonzero(~held)), PartOfSource(whole, np.flatnonzero(held))
    train.skipped = whole.skipped
    return {"train": train, "val": val}


def held_out(
    labels: npt.NDArray[np.int32], fraction: float | None, count: int | None, seed: int
) -> npt.NDArray[np.bool_]:
    """Return which samples are for validation: so many, each class in proportion, drawn by the seed.

    Each class keeps an image for training. Raises DataError if no image or too many are asked for.
    """
    total = round((fraction or 0) * len(labels)) if count is None else count
    asked = f"--val-fraction {fraction}" if count is None else f"--val-count {count}"
    order = epoch_order(seed, 0, len(labels))
    ranks, sizes = rank_in_class(labels[order]), np.bincount(labels)[labels[order]]
    spare = ranks < sizes - 1
    if not 1 <= total <= spare.sum():
        raise DataError(
            f"{asked} is {total} of {len(labels)} images; choose 1 to {spare.sum()}, so that each class keeps one to "
            "train on"
        )
    # Webster's rule of proportion. Among equals, the order that the seed draws decides.
    turns = np.where(spare, (ranks + 0.5) / sizes, np.inf)
    held = np.zeros(len(labels), dtype=bool)
    held[order[np.argsort(turns, kind="stable")[:total]]] = True
    return held
