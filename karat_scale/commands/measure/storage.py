"""The disk that feeds a recipe: its data files, and their reads without the page cache, at random and in sequence."""

import contextlib
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from karat_scale.data.order import epoch_order
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shard_format import dataset_directory, read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_to_read
from karat_scale.foundation.tables import Files
from karat_scale.recipe import Recipe

PAGE = 4096
CHUNK = 4 << 20
SEQUENTIAL_BYTES = 128 << 20
RANDOM_READS = 512
# The kernel caches pages in blocks of up to this size, aligned to it, and drops only whole blocks.
FOLIO = 2 << 20

State = Literal["cold", "warm", "unknown"]
Span = tuple[int, int, int]  # descriptor, offset, length


@dataclass(frozen=True)
class StorageSpeed:
    """Bytes a second from a data path.

    state: "cold" if the kernel dropped the pages before the read, "warm" if they were in memory nevertheless (a RAM
    disk), "unknown" if the file system does not say. cached_share: the share of the random reads' first pages that were
    in the page cache before; None if unknown. readers: threads that read at random at once.
    """

    sequential: float
    random: float
    random_again: float
    state: State
    cached_share: float | None
    readers: int


def measure_storage(paths: Sequence[Path], block: int, readers: int, seconds: float, rank: int = 0) -> StorageSpeed:
    """Read the files at random in blocks of `block` bytes, then again, then in sequence; about `seconds` in total.

    The pages are dropped from the cache first, as in the first epoch. Each rank reads other places. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        descriptors = [stack.enter_context(open_to_read(path, 0)).fileno() for path in paths]
        spans = _random_spans(descriptors, block, rank)
        cached_share = _cached_share(spans)
        _give_up(spans)
        left = _cached_share(spans)
        at_random, read = _random_speed(spans, readers, seconds / 3)
        again, _ = _random_speed(read, readers, seconds / 3)
        sequence = _sequential_spans(descriptors, rank)
        _give_up(sequence)
        sequential, _ = _random_speed(sequence, 1, seconds / 3)
    state: State = "unknown" if left is None else "warm" if left > 0.5 else "cold"
    return StorageSpeed(sequential, at_random, again, state, cached_share, readers)


def _random_spans(descriptors: list[int], block: int, rank: int) -> list[Span]:
    """Return blocks that begin on a page, at random places of files chosen by their size.

    No file is read more often than it has blocks: what is read twice comes from the page cache.
    """
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
    blocks = [max(1, size // block) for size in sizes]
    rng = random.Random(rank)
    spans = []
    for number in rng.sample(range(len(sizes)), counts=blocks, k=min(RANDOM_READS, sum(blocks))):
        pages = max(1, (sizes[number] - block) // PAGE)
        spans.append((descriptors[number], rng.randrange(pages) * PAGE, block))
    return spans


def _sequential_spans(descriptors: list[int], rank: int) -> list[Span]:
    sizes = ((descriptor, os.fstat(descriptor).st_size) for descriptor in descriptors)
    spans = [(descriptor, offset, CHUNK) for descriptor, size in sizes for offset in range(0, size, CHUNK)]
    count = SEQUENTIAL_BYTES // CHUNK
    start = rank * count % len(spans) if spans else 0
    return (spans[start:] + spans[:start])[:count]


def _give_up(spans: list[Span]) -> None:
    for descriptor, offset, length in spans:
        first = offset // FOLIO * FOLIO
        last = -(-(offset + length) // FOLIO) * FOLIO
        os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)


def _cached_share(spans: list[Span]) -> float | None:
    """Return the share whose first page is in memory: only then does a read that may not wait succeed.

    None if the file system does not support that.
    """
    known = []
    for descriptor, offset, _ in spans:
        with contextlib.suppress(OSError):
            try:
                os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
                known.append(True)
            except BlockingIOError:
                known.append(False)
    return sum(known) / len(known) if known else None


def _random_speed(spans: list[Span], readers: int, seconds: float) -> tuple[float, list[Span]]:
    """Return bytes per second of reading the spans for at most `seconds`, and the spans that were read."""
    begun = time.perf_counter()

    def read(share: list[Span]) -> tuple[int, list[Span]]:
        done, total = [], 0
        for descriptor, offset, length in share:
            total += len(os.pread(descriptor, length, offset))
            done.append((descriptor, offset, length))
            if time.perf_counter() - begun > seconds:
                break
        return total, done

    with ThreadPoolExecutor(readers) as pool:
        results = list(pool.map(read, [spans[number::readers] for number in range(readers)]))
    elapsed = time.perf_counter() - begun
    return sum(total for total, _ in results) / elapsed, [span for _, done in results for span in done]


SAMPLED_IMAGES = 256


@dataclass(frozen=True)
class DataFiles:
    """paths: some files that hold training images; none for data at a URL. total_bytes: of both splits.

    image_bytes: of a training image.
    """

    paths: tuple[Path, ...]
    total_bytes: int
    image_bytes: float


def sampled_ids(num_train: int, seed: int) -> npt.NDArray[np.int64]:
    """Return some random training samples, int64 [at most SAMPLED_IMAGES]."""
    return epoch_order(seed, 0, num_train)[:SAMPLED_IMAGES]


def find_data_files(recipe: Recipe, num_train: int) -> DataFiles | None:
    """Return the files of the recipe's data, or None if it has none or a stream. No image is read. Raises DataError."""
    data = recipe.data
    if data.row.files is None or data.is_stream:
        return None
    if data.row.files is Files.BETONS:
        directory = Path(data.path).expanduser()
        betons = [directory / f"{split}.beton" for split in (data.train_split, data.val_split)]
        for path in betons:
            if not path.is_file():
                raise DataError(f"{path} is missing; make it with data_prep/make_ffcv.py")
        train, val_bytes = (path.stat().st_size for path in betons)
        return DataFiles((betons[0],), train + val_bytes, train / num_train)
    with closing(_open_split(recipe)) as split:
        files = dict.fromkeys(split.file_of(int(i)) for i in sampled_ids(num_train, recipe.run.seed))
        paths = () if isinstance(split, ShardSplit) and split.ahead else tuple(map(Path, files))
        if isinstance(split, FolderSplit):
            image = sum(path.stat().st_size for path in paths) / len(paths)
            val = FolderSplit(data.path, data.val_split, recipe.model.num_classes, split.classes)
            return DataFiles(paths, round(image * (num_train + len(val))), image)
    splits = read_dataset_record(dataset_directory(data.path), data.timeout).splits
    bytes_of = {name: sum(shard.bytes for shard in split.shards) for name, split in splits.items()}
    total = sum(bytes_of[name] for name in {data.train_split, data.val_split})
    return DataFiles(paths, total, bytes_of[data.train_split] / num_train)


def read_into_page_cache(recipe: Recipe, ids: npt.NDArray[np.int64]) -> None:
    """Read these training images, so that timing the decoder does not time the disk. Raises DataError."""
    if recipe.data.row.files in (Files.IMAGES, Files.SHARDS) and not recipe.data.is_stream:
        with closing(_open_split(recipe)) as split:
            if isinstance(split, ShardSplit):
                split.prepare(ids.tolist())
            for sample_id in ids:
                split.read(int(sample_id))


def _open_split(recipe: Recipe) -> ShardSplit | FolderSplit:
    data, num_classes = recipe.data, recipe.model.num_classes
    if data.row.files is Files.IMAGES:
        return FolderSplit(data.path, data.train_split, num_classes)
    return ShardSplit(data.path, data.train_split, num_classes, remote=RemoteUse.of(data, training=True))
