"""The code that the scripts for shards and betons share.

The images of a split and the notes about them, worker processes, the division of a source into train and val, options.
"""

import argparse
import multiprocessing
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from karat_scale import __version__
from karat_scale.data.decoders.jpeg_header import turned_by_default
from karat_scale.data.plan import epoch_order
from karat_scale.data.prepare import DECODED_BELOW
from karat_scale.data.prepare.images import Check, OddImageSkippedError, Preparation, Prepared
from karat_scale.data.prepare.sources import Source, SourceOptions, open_splits
from karat_scale.data.prepare.sources.base import UnreadableSampleError, find_file
from karat_scale.data.prepare.sources.imagefolder import NAME_FILES, ImageFolderSource, read_synset_names
from karat_scale.data.shards.shard_format import BetonRecord, OddRecord, SkippedRecord, SplitRecord, dataset_directory
from karat_scale.foundation.arguments import OneLineParser, count
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import lock, unlock
from karat_scale.foundation.machine import be_killed_with_parent, usable_cores
from karat_scale.foundation.stores import is_url

# These may differ between two runs that make the same bytes.
FREE_SETTINGS = ("version", "source")
# Settings of the preparation. Without a preparation they have no effect.
PREPARING = ("check", "on_odd", "exif")
LISTED = 5
ITEMS_AHEAD = 4

T = TypeVar("T")


class Notes(BaseModel):
    """Notes about some images of a source: those that are skipped or odd, grey ones, and the number of each label."""

    skipped: list[SkippedRecord] = []
    odd: list[OddRecord] = []
    grey: int = 0
    labels: dict[int, int] = {}

    def add(self, other: "Notes") -> None:
        """Add the notes about other images."""
        self.skipped += other.skipped
        self.odd += other.odd
        self.grey += other.grey
        for label, images in other.labels.items():
            self.labels[label] = self.labels.get(label, 0) + images

    def stored(self, path: str, image: Prepared, label: int, odd: str) -> None:
        """Note an image that is stored; `odd` says what is odd about it."""
        if odd:
            self.odd.append(OddRecord(path=path, what=odd, done=image.done))
        self.labels[label] = self.labels.get(label, 0) + 1
        self.grey += image.grey


@dataclass(frozen=True)
class Job:
    """One split to make: its images, how they are prepared, and the settings that decide the bytes of the result.

    preparation is None if the images were prepared before, as those in shards are.
    """

    split: str
    source: Source
    out: Path
    preparation: Preparation | None
    made: dict[str, Any]

    def made_with(self) -> dict[str, Any]:
        """Return the settings that decide the bytes of the result."""
        free = FREE_SETTINGS if self.preparation else (*FREE_SETTINGS, *PREPARING)
        return {key: value for key, value in self.made.items() if key not in free}

    def check_settings(self, made: dict[str, Any], what: str, delete: str) -> None:
        """Raise DataError if `what`, which exists, was made with other settings; `delete` names its files."""
        for key, value in self.made_with().items():
            found = made.get(key)
            if found != value:
                if key == "source_sha256":
                    found, value = str(found)[:12], f"{value[:12]}, since --src has other images"
                raise DataError(
                    f"{what} made with {key} = {found}, now {value}; use another --out, or delete {delete} "
                    "to make all that is in it again"
                )

    def prepare(self, index: int, notes: Notes) -> Prepared | None:
        """Return the image to store, or note why it is left out and return None. Raises DataError to stop."""
        path = self.source.name(index)
        try:
            data = self.source.read(index)
            return self.preparation.prepare(data, path) if self.preparation else Prepared(data, "", False)
        except UnreadableSampleError as error:
            if self.preparation and self.preparation.on_odd == "stop":
                raise DataError(f"{path}: {error}; remove it, or choose another --on-odd than stop") from error
            notes.skipped.append(SkippedRecord(path=path, reason=str(error)))
            if isinstance(error, OddImageSkippedError):
                notes.odd.append(OddRecord(path=path, what=str(error), done="skipped"))
            return None

    def record_fields(self, notes: Notes) -> dict[str, Any]:
        """Return the fields of a record that describe the images. Raises DataError if no image is left."""
        skipped = [SkippedRecord(path=path, reason=reason) for path, reason in self.source.skipped] + notes.skipped
        if not notes.labels:
            raise DataError(f"no image of split {self.split} is usable; first: {skipped[0].path}: {skipped[0].reason}")
        classes = self.source.classes
        return {
            "made": self.made,
            "skipped": sorted(skipped, key=lambda item: item.path),
            "odd": sorted(notes.odd, key=lambda item: item.path),
            "grey": notes.grey if self.preparation else self.source.grey,
            "per_class": [notes.labels.get(label, 0) for label in range(len(classes))],
            "empty_classes": [name for label, name in enumerate(classes) if label not in notes.labels],
        }

    def print_plan(self, indices: npt.NDArray[np.int64], where: str) -> None:
        """Print what --dry-run promises."""
        size = int(self.source.sizes[indices].sum())
        print(
            f"{self.split}: {plural(len(indices), 'image')} of {plural(len(self.source.classes), 'class')}, about "
            f"{size / 1e6:,.1f} MB, would be written to {where}"
        )

    def print_result(self, record: SplitRecord | BetonRecord, where: str, listed_in: str) -> None:
        """Print what was made, and the first images that were skipped or are odd."""
        print(
            f"{self.split}: {plural(record.samples, 'sample')} of {plural(len(self.source.classes), 'class')} {where}, "
            f"{record.bytes / 1e6:,.1f} MB, {len(record.skipped)} skipped, {len(record.odd)} odd"
        )
        lines = [f"skipped {item.path}: {item.reason}" for item in record.skipped]
        lines += [f"{item.done} {item.path}: {item.what}" for item in record.odd if item.done != "skipped"]
        for line in lines[:LISTED]:
            print(f"  {line}")
        if len(lines) > LISTED:
            print(f"  ... all are listed in {listed_in}")
        if record.empty_classes:
            names = ", ".join(record.empty_classes[:LISTED])
            more = f" and {len(record.empty_classes) - LISTED} others" if len(record.empty_classes) > LISTED else ""
            print(
                f"{self.split}: {len(record.empty_classes)} of {len(self.source.classes)} classes have no image: "
                f"{names}{more}"
            )
        turned = sum(item.done == "turned" for item in record.odd)
        if turned:
            print(
                f"{self.split}: stored upright, as viewers show them by their EXIF orientation: {turned} of "
                f"{record.samples} pictures; --exif keep copies their files instead"
            )
        kept = sum(item.done != "turned" and "EXIF orientation" in item.what for item in record.odd)
        if kept and self.made.get("exif") == "keep":
            print(
                f"{self.split}: turned or mirrored by viewers, but not in training, because of their EXIF "
                f"orientation: {kept} of {record.samples} pictures; --exif turn stores them upright"
            )


def made_by(
    tool: str, source: Source, options: argparse.Namespace, preparation: Preparation | None, **settings: Any
) -> dict[str, Any]:
    """Return the `made` of a record: the script, the source and the settings."""
    return {
        "tool": f"data_prep/{tool}",
        "version": __version__,
        "source": os.fsencode(options.src.resolve().name).decode(errors="backslashreplace"),
        "source_sha256": source.fingerprint(),
        **{name: getattr(options, name) for name in ("seed", "subset", "val_fraction", "val_count")},
        **settings,
        **{name: getattr(preparation, name, None) for name in PREPARING},
        **source.facts,
    }


def shuffled(source: Source, seed: int, subset: int | None) -> npt.NDArray[np.int64]:
    """Return the samples in an order drawn from the seed; with `subset`, only the first `subset` of each class.

    A source that is read in blocks is shuffled within windows of blocks.
    """
    order = epoch_order(seed, 0, len(source))
    if source.blocks is not None:
        places = np.argsort(epoch_order(seed, 0, int(source.blocks.max()) + 1))
        order = order[np.argsort(places[source.blocks[order]] // source.window, kind="stable")]
    return order if subset is None else order[rank_in_class(source.labels[order]) < subset]


def rank_in_class(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return for each sample how many of its class come before it."""
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - first
    return ranks


class PartOfSource(Source):
    """The samples `indices` of another source, in this order. See Source."""

    def __init__(self, whole: Source, indices: npt.NDArray[np.int64]) -> None:
        super().__init__(whole.classes, whole.labels[indices], whole.sizes[indices])
        self._whole, self._indices, self.exact_sizes, self.facts = whole, indices, whole.exact_sizes, whole.facts
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
    if options.out.resolve() == options.src.resolve():
        raise DataError(f"--out {options.out} is also --src; use another directory")
    sources = open_splits(options.src, options.split, known_classes, SourceOptions.of(options))
    for folder in (source.folder for source in sources.values() if isinstance(source, ImageFolderSource)):
        if folder.resolve() in options.out.resolve().parents:
            raise DataError(
                f"--out {options.out} is among the classes in {folder}, and the next run would take it for one; use "
                "another directory"
            )
    if options.val_fraction is None and options.val_count is None:
        if [*sources] == ["train"] and options.split is None:
            print(f"{options.src}: it has no val split; to make one of a tenth of its images, add --val-fraction 0.1")
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
    """Return which samples are for validation: a fraction or a count, in proportion to classes, drawn by the seed.

    Each class keeps an image for training. Raises DataError if no image or too many are asked for.
    """
    total = round((fraction or 0) * len(labels)) if count is None else count
    asked = f"--val-fraction {fraction}" if count is None else f"--val-count {count}"
    order = epoch_order(seed, 0, len(labels))
    ranks, sizes = rank_in_class(labels[order]), np.bincount(labels)[labels[order]]
    spare = ranks < sizes - 1
    if not spare.any():
        raise DataError(f"{asked}: each class has one image alone, which is for training; add images")
    if not 1 <= total <= spare.sum():
        of = "a fraction that makes " if count is None else ""
        raise DataError(
            f"{asked} is {total} of {len(labels)} images; choose {of}1 to {spare.sum()}, so that each class keeps one "
            "to train on"
        )
    # Webster's rule of proportion. Among equals, the order that the seed draws decides.
    turns = np.where(spare, (ranks + 0.5) / sizes, np.inf)
    held = np.zeros(len(labels), dtype=bool)
    held[order[np.argsort(turns, kind="stable")[:total]]] = True
    return held


def class_names(options: argparse.Namespace, classes: list[str]) -> list[str]:
    """Return readable names of the classes, from --names or a known file beside the images; empty if there is none."""
    path = options.names or find_file(options.src, NAME_FILES)
    if path is None:
        return []
    names = read_synset_names(path)
    return [names.get(name, name) for name in classes]


_work: Callable[[Any], Any] | None = None


def _start_worker(work: Callable[[Any], Any]) -> None:
    """Ignore Ctrl-C, which the main process handles, and end with that process, so as not to write after its end."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    be_killed_with_parent()


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)


@contextmanager
def alone_in(folder: Path, made: bool = False) -> Iterator[None]:
    """Let only one process at a time run the block, which writes into a folder; a line says when it waits.

    made: whether the folder serves only as this lock. Then it is made before the block and removed after it.
    """
    while True:
        if made:
            folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not made:
                raise
            continue  # the other run has just removed it
        try:
            if not lock(handle, wait=False):
                print(f"waiting for the end of another run that writes {folder.parent if made else folder}", flush=True)
                lock(handle)
            if made and not (folder.is_dir() and os.path.samestat(folder.stat(), os.fstat(handle))):
                continue  # the other run has removed it
            try:
                yield
            finally:
                if made:
                    with suppress(OSError):  # without locks, another run may write here, or be done
                        folder.rmdir()
                unlock(handle)  # also for workers, which have a copy of it
            return
        finally:
            os.close(handle)


def run_in_processes(work: Callable[[Any], T], items: Iterable[Any], workers: int) -> Generator[T, None, None]:
    """Yield `work` of each item, in order. Processes are forked, so `work` may hold large data; items should be small.

    Raises DataError if a process dies.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    left, waiting = deque(items), deque[Future[T]]()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (work,))
    try:
        while left or waiting:
            while left and len(waiting) < workers * ITEMS_AHEAD:
                waiting.append(pool.submit(_do, left.popleft()))
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died; use fewer --workers if memory is short") from error
    finally:
        pool.shutdown(cancel_futures=True)


def user_path(text: str) -> Path:
    """Return the path that an option names, with ~ expanded: a shell leaves it after a =, as in --out=~/data."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  # Path's refuses the name of an unknown user


def output_directory(text: str) -> Path:
    """Return the path of a directory to write to, which may not exist yet. Raises argparse.ArgumentTypeError."""
    path = user_path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a directory")
    return path


def make_parser(description: str, writes: bool = True) -> OneLineParser:
    """Return a parser with the options of every script; with `writes`, also those of every script that writes."""
    parser = OneLineParser(Path(sys.argv[0]).name, description=description)
    if not writes:
        return parser
    parser.add_argument("--out", type=output_directory, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    return parser


def source_path(text: str) -> Path:
    """Return the path of images to convert. Raises DataError for a URL."""
    if is_url(text):
        raise DataError(f"--src {text} is a URL; for tars there use karat index, else download it first")
    return user_path(text)


def source_parser(description: str) -> OneLineParser:
    """Return a parser with the options of scripts that convert a source: where it is, its images, and odd ones."""
    parser = make_parser(description)
    images = "the images: a directory, a tar that is not compressed, or a Parquet file"
    parser.add_argument("--src", type=source_path, required=True, metavar="DIR", help=images)
    parser.add_argument("--split", metavar="NAME", help="make only this split (default: all)")
    _add_workers(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the output (default 0)")
    parser.add_argument("--subset", type=count, metavar="N", help="only N images of each class, drawn by the seed")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="move this share of each class from the only split into val",
    )
    by_number = "like --val-fraction, but N images over all classes"
    held_out.add_argument("--val-count", type=count, metavar="N", help=by_number)
    parser.add_argument(
        "--check",
        choices=("header", "decode"),
        help=f"read only headers, or decode every image (default: decode a split below {DECODED_BELOW:,} images)",
    )
    parser.add_argument(
        "--on-odd",
        choices=("convert", "keep", "skip", "stop"),
        default="keep",
        help="what to do with CMYK, misnamed images and corrupt EXIF (default keep); an image that "
        "cannot be decoded is skipped; with stop, it ends the command",
    )
    parser.add_argument(
        "--exif",
        choices=("turn", "keep"),
        help="pictures with an EXIF orientation: store them upright, or leave them to --on-odd "
        "(default turn; keep for ImageNet, whose published results are without turning)",
    )
    parser.add_argument(
        "--encoding",
        choices=("png", "jpeg"),
        help="encoding of images that are raw pixels: PNG, lossless, or JPEG (default png; for IDX files jpeg)",
    )
    parser.add_argument(
        "--any-hash",
        action="store_true",
        help="accept files with another hash than published, and missing Parquet files",
    )
    parser.add_argument("--image-column", metavar="NAME", help="Parquet: the column of images, if several could be")
    parser.add_argument("--label-column", metavar="NAME", help="Parquet: the column of labels, if several could be")
    parser.add_argument("--val-labels", type=user_path, metavar="FILE", help="ImageNet's validation labels")
    parser.add_argument(
        "--synsets", type=user_path, metavar="FILE", help="`number wnid` lines for the devkit's numbers"
    )
    parser.add_argument(
        "--names", type=user_path, metavar="FILE", help="`wnid name` lines: readable names of the classes"
    )
    return parser


def check_source_options(options: argparse.Namespace) -> None:
    """Refuse a split that is not a plain name, a wrong share, and files that do not exist. Raises DataError."""
    if options.split is not None and not re.fullmatch(r"\w+", options.split):
        raise DataError(f"--split {options.split!r} is not a name; use letters, digits and _")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction} is not between 0 and 1")
    if options.split is not None and (options.val_fraction is not None or options.val_count is not None):
        raise DataError(
            "--val-fraction and --val-count make train and val of a source with one split; remove --split, or give "
            "that split's folder as --src"
        )
    if not -(2**63) <= options.seed < 2**63:
        raise DataError(f"--seed {options.seed}: expected a number of 64 bits with sign")
    for name in ("val_labels", "synsets", "names"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise DataError(f"--{name.replace('_', '-')} {path}: the file does not exist")


def check_of(options: argparse.Namespace, source: Source, made: Mapping[str, Any]) -> Check:
    """Return `--check`; without it, the one that an existing split was `made` with, or one by the number of images."""
    chosen: Check = options.check or made.get("check") or ("decode" if len(source) < DECODED_BELOW else "header")
    return chosen


def settle(options: argparse.Namespace, sources: Mapping[str, Source]) -> None:
    """Choose `--exif` by the classes if the command line does not."""
    classes = next(iter(sources.values())).classes
    options.exif = options.exif or ("turn" if turned_by_default(classes) else "keep")


def shard_parser(description: str, writes: bool = True) -> OneLineParser:
    """Return a parser with the options of scripts on finished shards; with `writes`, also of those that write."""
    parser = make_parser(description, writes)
    parser.add_argument("--src", type=dataset_directory, required=True, metavar="DIR", help="shards, also at a URL")
    parser.add_argument("--split", metavar="NAME", help="use only this split (default: all)")
    _add_workers(parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=count, default=usable_cores(), metavar="N", help="processes (default: cores)")
