"""A test set for a run: labelled images from shards, also at a URL, from betons, or from folders of classes.

Its classes are matched to the run's by name, by WordNet id or by number. A JSON file can give it other labels: ReaL's
for ImageNet, or your own by the image's name.

Its images can be corrupted as in ImageNet-C (arXiv 1903.12261): 15 corruptions at five severities. `imagecorruptions`
computes them on what the model sees, after the crop. An image is corrupted in the same way on any number of ranks and
in each run: its random numbers depend on the image, the corruption and the severity.
"""

import functools
import inspect
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.commands.evaluate.predictions import Predictions
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.jpeg_header import WNID, turned_by_default, upright
from karat_scale.data.loading.assemble import ImageAssembler, ImageSpec, OrderedLoader, Pixels
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shard_files import ImageSource
from karat_scale.data.shards.shard_format import DATASET_FILE, must_answer, read_dataset_record
from karat_scale.data.shards.shards import FolderSplit, ShardSplit, composed
from karat_scale.foundation.console import few, plural
from karat_scale.foundation.errors import DataError, RecipeError, UserError
from karat_scale.foundation.files import LARGEST_TEXT, parse_json, read_bytes
from karat_scale.foundation.tables import CORRUPTIONS, how_to_install
from karat_scale.recipe import Recipe


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """Return the label of each of their classes among ours; None for a class that we do not have.

    Equal names match first. Other names are compared without case, with one spelling of accents and underscores as
    spaces, if that names only one class on both sides. WordNet ids and the names of ImageNet-1K's classes stand for
    each other. If all of their names are numbers, as in ImageNet-V2, they are the labels themselves, unless ours are
    numbers, too.
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
    """Return the WordNet id of a class of ImageNet-1K, given that id or a name; "" for another class."""
    return name if WNID.fullmatch(name) else _wnids_by_name().get(_plain(name), "")


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
    return " ".join(composed(name).replace("_", " ").casefold().split())


MOST_CLASSES = 10**9
Split = ShardSplit | BetonSplit | FolderSplit
SPLITS = ("val", "test", "validation", "valid", "train")
"""The names of splits, in the order in which one is chosen."""
Change = Callable[[Pixels, int], Pixels]
"""Takes a sample's pixels [H, W, 3], as the model would see them, and its id; returns the changed pixels."""


@dataclass(frozen=True)
class TestSet(ImageSource):
    """Images whose labels are the run's. See ImageSource.

    classes: the run's classes. among: the run's labels of the set's classes. unmatched: the set's classes that the run
    does not know. left_out: the number of their images, which are not in the set. turns: whether pictures are turned
    upright.
    """

    __test__ = False  # pytest would take the class for tests

    source: Split
    kept: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    classes: tuple[str, ...]
    among: npt.NDArray[np.int64]
    unmatched: tuple[str, ...]
    left_out: int
    turns: bool

    def read(self, sample_id: int) -> bytes:
        """Return the image's bytes. Raises UndecodableImageError for a picture that cannot be turned."""
        data = self.source.read(int(self.kept[sample_id]))
        return upright(data) if self.turns else data

    def prepare(self, sample_ids: Iterable[int]) -> None:
        self.source.prepare(self.kept[list(sample_ids)].tolist())

    def locate(self, sample_id: int) -> tuple[str, str]:
        return self.source.locate(int(self.kept[sample_id]))

    def keys(self) -> list[str]:
        """Return the key (or path) of each sample."""
        keys = self.source.keys()
        return [keys[sample_id] for sample_id in self.kept.tolist()]

    def file_of(self, sample_id: int) -> str:
        return self.source.file_of(int(self.kept[sample_id]))

    def close(self) -> None:
        self.source.close()

    @property
    def notice(self) -> str:
        if not self.unmatched:
            return self.source.notice
        names = few(self.unmatched, 8)
        images, classes = plural(self.left_out, "image"), plural(len(self.unmatched), "class")
        others = f"; {self.source.notice}" if self.source.notice else ""
        return f"{classes} that the run does not have, with {images}, left out: {names}{others}"


def open_test_set(
    directory: Path | str, split: str, classes: Sequence[str], use: RemoteUse, as_stored: bool = False
) -> TestSet:
    """Open a directory, or shards at a URL, for a run with these classes.

    Args:
        split: the split; "" chooses the first of val, test, validation, valid and train that is there.
        use: how samples at a URL are used; a directory's file system must answer within its timeout, too.
        as_stored: whether pictures in folders stay as stored, as in training; else they are turned as by data_prep.

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
            f"{', '.join(source.classes[:3])}, and the run's are {', '.join(classes[:3])}; name another test set"
        )
    labels = to_run[source.labels]
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        source.close()
        raise DataError(f"{directory}: the run has no class of its images; name a test set of its classes")
    present = np.unique(to_run[to_run >= 0]).astype(np.int64)
    unmatched = tuple(name for name, label in zip(source.classes, matched, strict=True) if label is None)
    left_out = len(labels) - len(kept)
    of_folders = isinstance(source, FolderSplit) and not as_stored
    turns = of_folders and turned_by_default(source.classes) and turned_by_default(classes)
    return TestSet(source, kept, labels[kept], tuple(classes), present, unmatched, left_out, turns)


def packed_splits(directory: Path | str, use: RemoteUse) -> dict[str, Callable[[], Split]] | None:
    """Return functions that open each split of shards or of betons; None if there are neither. Raises DataError."""
    if isinstance(directory, str) or (directory / DATASET_FILE).is_file():
        splits = read_dataset_record(directory, use.timeout).splits
        names = [name for name, split in splits.items() if split.samples]
        return {name: partial(ShardSplit, directory, name, MOST_CLASSES, remote=use) for name in names}
    betons = sorted(path.stem for path in directory.glob("*.beton"))
    return {name: partial(BetonSplit, directory, name, MOST_CLASSES) for name in betons} or None


def _open(directory: Path | str, split: str, use: RemoteUse) -> Split:
    if isinstance(directory, Path):
        must_answer(directory, use.timeout)
    splits = packed_splits(directory, use)
    if splits is None:
        directory = Path(directory)
        folders = [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
        if not folders:
            raise DataError(
                f"{directory} is not a test set: no {DATASET_FILE}, no *.beton, no folders of classes; correct the path"
            )
        around = [path.name for path in folders if any(entry.is_dir() for entry in path.iterdir())]
        if not split and not {*around} & {*SPLITS}:
            whole = directory.resolve()
            return FolderSplit(whole.parent, whole.name, MOST_CLASSES)
        splits = {name: partial(FolderSplit, directory, name, MOST_CLASSES) for name in around}
    wanted = [split] if split else [name for name in (*SPLITS, *[*splits][:1]) if name in splits]
    if not splits:
        raise DataError(f"{directory} has no samples; prepare it again")
    if wanted[0] not in splits:
        raise DataError(f"{directory} has no split {split!r}; the splits there: {', '.join(sorted(splits))}")
    return splits[wanted[0]]()


def load_test_set(
    test_set: ImageSource, recipe: Recipe, change: Change | None = None
) -> Callable[[Iterable[BatchSlice]], OrderedLoader]:
    """Return a function that makes evaluation batches of slices of a test set, with each image changed by `change`."""
    data = recipe.data
    decoder = make_decoder(data, recipe.augment.interpolation)
    if change is not None:  # what it compiles at its first call is then there in each worker
        change(np.zeros((recipe.model.image_size, recipe.model.image_size, 3), np.uint8), 0)
    make = _Changed(test_set, ImageSpec.of(recipe), decoder, change)
    return lambda slices: OrderedLoader(make, slices, data.workers, data.prefetch, data.timeout)


class _Changed(ImageAssembler):
    """Evaluation batches whose images are changed after the crop."""

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder, change: Change | None) -> None:
        super().__init__(source, spec, decoder, training=False)
        self._change = change

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        batch = super().fill(part, images)
        if self._change is not None:
            pixels = batch.images.numpy()
            for row in np.flatnonzero(batch.valid.numpy()).tolist():
                changed = self._change(np.ascontiguousarray(pixels[row].transpose(1, 2, 0)), int(part.sample_ids[row]))
                pixels[row] = changed.transpose(2, 0, 1)
        return batch


_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
Accepted = frozenset[int]


class OtherLabels:
    """A set of labels that count as right, for each image. An image without labels does not count.

    The file is a JSON list, as ReaL's: the labels of ILSVRC2012_val_00000001 first, numbered as in ImageNet-1K. Or it
    is an object from an image's name, without its suffix, to a class or a list of classes: names, WordNet ids or
    numbers of the run's labels.

    Raises:
        DataError: the file is neither of these.
    """

    def __init__(self, file: Path, classes: Sequence[str]) -> None:
        try:
            content = parse_json(read_bytes(file, LARGEST_TEXT))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
            raise DataError(f"--labels {file}: {reason}; name a JSON file such as ReaL's real.json") from None
        if not isinstance(content, list | dict) or not content:
            raise DataError(f"--labels {file}: should be a JSON list or object of labels")
        entries: dict[Any, Any]
        labels: dict[Any, int | None]
        if isinstance(content, list):
            entries = dict(enumerate(content, start=1))
            labels = dict(enumerate(match_classes(imagenet_wnids(), classes)))
        else:
            entries = {key: entry if isinstance(entry, list) else [entry] for key, entry in content.items()}
            names = sorted({one for entry in entries.values() for one in entry if isinstance(one, str)})
            labels = dict(zip(names, match_classes(names, classes), strict=True)) | dict(enumerate(range(len(classes))))
        self._accepted: dict[int | str, Accepted] = {}
        self.unknown: list[str] = []
        """The file's labels that the run does not have; empty for a list, which has ImageNet's labels."""
        for key, entry in entries.items():
            if not isinstance(entry, list) or not all(isinstance(one, int | str) for one in entry):
                raise DataError(f"--labels {file}: {str(entry)[:60]!r} should be a list of labels")
            found = [labels.get(one) for one in entry]
            if not isinstance(content, list):
                self.unknown += [str(one) for one, label in zip(entry, found, strict=True) if label is None]
            self._accepted[key] = frozenset(label for label in found if label is not None)

    def of(self, key: str) -> Accepted | None:
        """Return the labels of an image by its key or path; None if the file does not have the image."""
        name = key.rpartition("/")[2]
        number = _NUMBER.search(name)
        names: list[int | str] = [int(number[1]) if number else 0, key, name, name.rpartition(".")[0]]
        return next((self._accepted[one] for one in names if one in self._accepted), None)


def with_other_labels(predictions: Predictions, keys: Sequence[str], labels: OtherLabels) -> tuple[float, int, str]:
    """Return top-1 in percent by other labels, on how many images, and a line about the images that do not count.

    Raises:
        DataError: the file has labels for none of them.
    """
    accepted = [labels.of(key) for key in keys]
    counted = np.array([bool(one) for one in accepted])
    unknown = sum(one is None for one in accepted)
    not_here = ""
    if labels.unknown:
        not_here = (
            f"{plural(len(labels.unknown), 'label')} that the run does not have, such as {labels.unknown[0][:60]!r}"
        )
    if not counted.any():
        why = f"; it has {not_here}" if not_here else ""
        raise DataError(f"--labels has labels for none of the {plural(len(keys), 'image')}, such as {keys[0]!r}{why}")
    right = [label in one for label, one in zip(predictions.predicted.tolist(), accepted, strict=True) if one]
    without = len(keys) - int(counted.sum()) - unknown
    left_out = [f"{plural(without, 'image')} without a label"] if without else []
    left_out += [f"{plural(unknown, 'image')} that the file does not have"] if unknown else []
    left_out += [not_here] if not_here else []
    return 100 * sum(right) / len(right), len(right), " and ".join(left_out)


LEAST_PIXELS = 32


def chosen_corruptions(names: Sequence[str]) -> tuple[str, ...]:
    """Return the corruptions of these names; all of them for no name, or for `all`."""
    return CORRUPTIONS if not names or "all" in names else tuple(name for name in CORRUPTIONS if name in names)


def check_corruptible(image_size: int) -> None:
    """Raise UserError if the library is not installed, or the images are too small for it."""
    _library()
    if image_size < LEAST_PIXELS:
        raise UserError(f"--corrupt needs images of at least {LEAST_PIXELS} px, and the run's have {image_size}")


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, from 1 to 5."""

    name: str
    severity: int

    def __call__(self, pixels: Pixels, sample_id: int) -> Pixels:
        """Return the corrupted pixels [H, W, 3] of a sample."""
        library = _library()
        seed = zlib.crc32(f"{self.name} {self.severity} {sample_id}".encode())
        before = np.random.get_state()  # corruptions that take no seed draw from it
        np.random.seed(seed)
        try:
            corruption = library.corruption_dict[self.name]
            seeded = {"seed": seed} if "seed" in inspect.signature(corruption).parameters else {}
            changed: Pixels = library.corrupt(pixels, self.severity, self.name, **seeded)
        finally:
            np.random.set_state(before)
        return changed


def _library() -> Any:
    try:
        import imagecorruptions
    except ImportError:
        raise RecipeError(f"--corrupt needs the library imagecorruptions: {how_to_install('corruptions')}") from None
    return imagecorruptions
