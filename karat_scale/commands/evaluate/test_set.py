"""Labelled images as a test set of a run: shards, also at a URL, betons, or folders of classes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.commands.evaluate.class_names import match_classes
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.orientation import turned_by_default, upright
from karat_scale.data.loading.assemble import EvalAssembler, ImageSource, Pixels
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.loading.loader import OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.checks import must_answer
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shard_format import DATASET_FILE, read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.use import RemoteUse
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import Recipe

_MOST_CLASSES = 10**9
SPLITS = ("val", "test", "validation", "valid", "train")
"""The names of splits, in the order in which one is chosen."""
_MOST_NAMED = 8
Change = Callable[[Pixels, int], Pixels]
"""Takes the pixels [H, W, 3] that the model would see of a sample, and its id; returns others."""


@dataclass(frozen=True)
class TestSet:
    """Images whose labels are the run's. See ImageSource.

    classes: the run's. among: the run's labels of the set's classes. unmatched: the set's classes that the run does not
    know, and left_out: the number of their images, which are not in the set. turns: pictures are turned upright.
    """

    __test__ = False  # pytest would take the class for tests

    source: ShardSplit | FolderSplit | BetonSplit
    kept: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    among: npt.NDArray[np.int64]
    unmatched: tuple[str, ...]
    left_out: int
    turns: bool

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, sample_id: int) -> bytes:
        """Return the image's bytes. Raises UndecodableImageError for a picture that cannot be turned."""
        data = self.source.read(int(self.kept[sample_id]))
        return upright(data) if self.turns else data

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """Fetch some samples of a set at a URL together. Raises DataError."""
        if isinstance(self.source, ShardSplit):
            self.source.prepare(self.kept[list(sample_ids)].tolist())

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the sample's key (or path) and its shard."""
        return self.source.locate(int(self.kept[sample_id]))

    def keys(self) -> list[str]:
        """Return the key (or path) of each sample."""
        keys = self.source.keys()
        return [keys[sample_id] for sample_id in self.kept.tolist()]

    def file_of(self, sample_id: int) -> str:
        """Return the path of the file that holds the sample."""
        return self.source.file_of(int(self.kept[sample_id]))

    def close(self) -> None:
        """Close open files."""
        self.source.close()

    @property
    def notice(self) -> str:
        """A line about what is left out; "" if nothing is."""
        if not self.unmatched:
            return ""
        names = ", ".join(self.unmatched[:_MOST_NAMED]) + (", ..." if len(self.unmatched) > _MOST_NAMED else "")
        images, classes = plural(self.left_out, "image"), "class" if len(self.unmatched) == 1 else "classes"
        return f"{len(self.unmatched)} {classes} that the run does not have, with {images}, left out: {names}"


def open_test_set(
    directory: Path | str, split: str, classes: Sequence[str], use: RemoteUse, as_stored: bool = False
) -> TestSet:
    """Open a directory, or shards at a URL, for a run with these classes.

    Args:
        split: "" chooses the first of val, test, validation, valid and train that is there.
        use: how samples at a URL are used; a directory's file system must answer within its timeout, too.
        as_stored: pictures in folders are not turned, as in training; else they are, as data_prep turns them.

    Raises:
        DataError: there are no images, or the run knows none of their classes.
    """
    source = _open(directory, split, use)
    matched = match_classes(source.classes, classes)
    to_run = np.array([-1 if label is None else label for label in matched], dtype=np.int32)
    if (to_run < 0).all():
        source.close()
        raise DataError(
            f"{directory}: the run knows none of its {len(to_run)} classes; the first ones are "
            f"{', '.join(source.classes[:3])}, and the run's are {', '.join(classes[:3])}"
        )
    labels = to_run[source.labels]
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        source.close()
        raise DataError(f"{directory}: all of its images are of classes that the run does not have")
    present = np.unique(to_run[to_run >= 0]).astype(np.int64)
    unmatched = tuple(name for name, label in zip(source.classes, matched, strict=True) if label is None)
    left_out = len(labels) - len(kept)
    of_folders = isinstance(source, FolderSplit) and not as_stored
    turns = of_folders and turned_by_default(source.classes) and turned_by_default(classes)
    return TestSet(source, kept, labels[kept], tuple(classes), present, unmatched, left_out, turns)


def _open(directory: Path | str, split: str, use: RemoteUse) -> ShardSplit | FolderSplit | BetonSplit:
    if isinstance(directory, Path):
        must_answer(directory, use.timeout)
    if isinstance(directory, str) or (directory / DATASET_FILE).is_file():
        found = read_dataset_record(directory, use.timeout)
        there = [name for name, record in found.splits.items() if record.samples]
        return ShardSplit(directory, _chosen(directory, split, there), _MOST_CLASSES, remote=use)
    if betons := [path.stem for path in directory.glob("*.beton")]:
        return BetonSplit(directory, _chosen(directory, split, betons), _MOST_CLASSES)
    folders = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    if not folders:
        raise DataError(f"{directory} is no test set: it has no {DATASET_FILE}, no *.beton and no folders of classes")
    if split or any(name in SPLITS and _has_folders(directory / name) for name in folders):
        splits = [name for name in folders if _has_folders(directory / name)]
        return FolderSplit(directory, _chosen(directory, split, splits), _MOST_CLASSES)
    whole = directory.resolve()
    return FolderSplit(whole.parent, whole.name, _MOST_CLASSES)


def _chosen(directory: Path | str, split: str, there: Sequence[str]) -> str:
    wanted = [split] if split else [name for name in (*SPLITS, *there[:1]) if name in there]
    if not wanted or wanted[0] not in there:
        raise DataError(f"{directory} has no split {split!r}; the splits there: {', '.join(sorted(there)) or 'none'}")
    return wanted[0]


def _has_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir())


def load_test_set(
    test_set: TestSet, recipe: Recipe, change: Change | None = None
) -> Callable[[Iterable[BatchSlice]], Iterator[Batch]]:
    """Return what makes batches of slices of a test set, as evaluation does, with each image changed by `change`."""
    data = recipe.data
    decoder = make_decoder(data, recipe.augment.interpolation)
    if change is not None:  # what it compiles at its first call is then there in each worker
        change(np.zeros((recipe.model.image_size, recipe.model.image_size, 3), np.uint8), 0)
    make = _Changed(test_set, ImageSpec.of(recipe), decoder, change)
    return lambda slices: OrderedLoader(make, slices, data.workers, data.prefetch, data.timeout)


class _Changed(EvalAssembler):
    """Evaluation batches whose images are changed after the crop. See EvalAssembler."""

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder, change: Change | None) -> None:
        super().__init__(source, spec, decoder)
        self._change = change

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        batch = super().fill(part, images)
        if self._change is not None:
            pixels = batch.images.numpy()
            for row in np.flatnonzero(batch.valid.numpy()).tolist():
                changed = self._change(np.ascontiguousarray(pixels[row].transpose(1, 2, 0)), int(part.sample_ids[row]))
                pixels[row] = changed.transpose(2, 0, 1)
        return batch
