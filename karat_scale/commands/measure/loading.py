"""The speed of data: reads of the disk without the page cache, images to load, and the rate of a loader.

The images are photo-like or the user's, in each backend's layout.
"""

import contextlib
import io
import itertools
import os
import random
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.plan import PADDING, BatchSlice, epoch_order
from karat_scale.data.shards import shard_format
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shards import FolderSplit, ShardSplit
from karat_scale.data.shards.tars import EncodedSample, shard_name, write_shard
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import open_to_read
from karat_scale.foundation.tables import BACKENDS, EXTRAS, Files, how_to_install, is_installed
from karat_scale.recipe import AugmentConfig, Recipe

PAGE = 4096
CHUNK = 4 << 20
SEQUENTIAL_BYTES = 128 << 20
RANDOM_READS = 512
# The kernel caches pages in blocks of up to this size, aligned to it, and drops only whole blocks.
FOLIO = 2 << 20

State = Literal["cold", "warm", "unknown"]
Span = tuple[int, int, int]  # descriptor, offset, length
Ids = npt.NDArray[np.int64]


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
    """Return the share of spans whose first page is in memory: only then does a read that may not wait succeed.

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
    """The files of a recipe's data.

    paths: some files that hold training images; none for data at a URL. total_bytes: the bytes of both splits.
    image_bytes: the mean bytes of a training image.
    """

    paths: tuple[Path, ...]
    total_bytes: int
    image_bytes: float


def sampled_ids(num_train: int, seed: int) -> Ids:
    """Return some random training samples, int64 [at most SAMPLED_IMAGES]."""
    return epoch_order(seed, 0, num_train)[:SAMPLED_IMAGES]


def find_data_files(recipe: Recipe, num_train: int) -> DataFiles | None:
    """Return the files of the recipe's data, or None if it has none or a stream. No image is read. Raises DataError."""
    data = recipe.data
    if data.row.files is None or data.is_stream:
        return None
    if data.row.files is Files.BETONS:
        directory = Path(data.path).expanduser()
        betons = [shard_format.beton_path(directory, split) for split in (data.train_split, data.val_split)]
        train, val_bytes = (path.stat().st_size for path in betons)
        return DataFiles((betons[0],), train + val_bytes, train / num_train)
    with closing(_open_split(recipe)) as split:
        files = dict.fromkeys(split.file_of(int(i)) for i in sampled_ids(num_train, recipe.run.seed))
        paths = () if isinstance(split, ShardSplit) and split.ahead else tuple(map(Path, files))
        if isinstance(split, FolderSplit):
            image = sum(path.stat().st_size for path in paths) / len(paths)
            val = FolderSplit(data.path, data.val_split, recipe.model.num_classes, split.classes)
            return DataFiles(paths, round(image * (num_train + len(val))), image)
    splits = shard_format.read_dataset_record(shard_format.dataset_directory(data.path), data.timeout).splits
    bytes_of = {name: sum(shard.bytes for shard in split.shards) for name, split in splits.items()}
    total = sum(bytes_of[name] for name in {data.train_split, data.val_split})
    return DataFiles(paths, total, bytes_of[data.train_split] / num_train)


def read_into_page_cache(recipe: Recipe, ids: Ids) -> None:
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


CLASSES, PER_SHARD = 10, 100
# As ImageNet's files are: a median of 500 x 375 pixels, and about 110 KB.
LONG_SIDE, SHORT_SIDE, QUALITY = 500, 375, 93
OCTAVES, NOISE = 7, 12.0
JPEG_ENDINGS = (".jpg", ".jpeg")
SIZE, BATCH = 224, 64
AUGMENTS = {
    # The augmentation that every peer has too, as torchvision's reference recipe draws it.
    "crop": AugmentConfig(ratio=(3 / 4, 4 / 3), color_jitter=0, randaugment="", interpolation="bilinear"),
    "paper": AugmentConfig(),
    "device": AugmentConfig(run_on="device"),
}


def images_per_second(
    recipe: Recipe, workers: int, batch: int, seconds: float, ids: Ids | None = None, ready: Callable[[], Any] = tuple
) -> float:
    """Time training batches for about `seconds`, once all workers have started. Raises UserError as the backend does.

    Args:
        workers: the number of workers, instead of `data.workers`; 0 reads, decodes and augments in this process, on one
            core.
        ids: the ids of the samples, which are read again and again; None is all of them in random order.
        ready: called before the timing begins.
    """
    lanes, threads = max(1, workers), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with closing(open_backend(ImageSpec.of(recipe.changed(data__workers=workers, data__verify="size")))) as backend:
            if recipe.data.is_stream:  # its samples have no ids before they are read
                ids = np.full(batch, PADDING)
            order = np.random.default_rng(0).permutation(backend.num_train) if ids is None else ids

            def slices() -> Iterator[BatchSlice]:
                for number in itertools.count():
                    places = np.arange(number * batch, (number + 1) * batch) % len(order)
                    yield BatchSlice(0, number, order[places].astype(np.int64), number % lanes, lanes)

            return rate((len(made.labels) for made in backend.train_batches(slices())), seconds, lanes, ready)
    finally:
        torch.set_num_threads(threads)


def rate(batches: Iterator[int], seconds: float, warm_up: int, ready: Callable[[], object] = tuple) -> float:
    """Return images a second of a loader that yields the size of each batch, after `warm_up` batches.

    `ready` is called before the timing begins.
    """
    for _ in range(warm_up):
        next(batches)
    ready()
    images, begun = 0, time.perf_counter()
    while images == 0 or time.perf_counter() - begun < seconds:
        images += next(batches)
    return images / (time.perf_counter() - begun)


LARGEST_BATCH = 16


@dataclass(frozen=True)
class DataSpeed:
    """Images per second of one rank, the slowest. Bytes come from the page cache.

    one_core: reading, decoding and the recipe's augmentation on one core. decode_one_core: the same, but
    images are only cropped and flipped. workers: with the recipe's workers.
    """

    one_core: float
    decode_one_core: float
    workers: float

    @property
    def decode_share(self) -> float:
        """The share of the work that is not augmentation."""
        return min(1.0, self.one_core / self.decode_one_core)

    @classmethod
    def of(cls, recipe: Recipe, ids: Ids, micro_batch: int, seconds: float, world: World) -> "DataSpeed":
        """Time the backend for about `seconds`; all ranks measure at the same time. Raises DataError."""
        bare = recipe.changed(augment__randaugment="", augment__color_jitter=0.0, augment__erasing=0.0)
        is_generated = recipe.data.row.files is None
        in_process = recipe.data.fewest_workers
        batch = min(micro_batch, LARGEST_BATCH)
        augments = not is_generated and not recipe.augment.workers_only_flip

        def slowest_rate(recipe: Recipe, workers: int) -> float:
            share = seconds / (2 + augments)
            own = images_per_second(recipe, workers, batch, share, ids, ready=lambda: world.any(False))
            return min(world.gather(own))

        one_core = with_workers = slowest_rate(recipe, in_process)
        decode = slowest_rate(bare, in_process) if augments else one_core
        if recipe.data.workers != in_process and not is_generated:
            with_workers = slowest_rate(recipe, recipe.data.workers)
        return cls(one_core, decode, with_workers)


def lacking_library(backend: str) -> str:
    """Return what to type to install a backend's library; empty if it is installed or none is needed."""
    extra = BACKENDS[backend].extra
    return "" if not extra or is_installed(EXTRAS[extra].module) else how_to_install(extra)


@dataclass(frozen=True)
class SampleImages:
    """Encoded images in memory, as shards, and as an ImageFolder. Each split holds the same images."""

    encoded: tuple[bytes, ...]
    shards: Path
    folder: Path
    source: str

    @property
    def mean_kb(self) -> float:
        """The mean size of an image in KB."""
        return round(sum(map(len, self.encoded)) / len(self.encoded) / 1e3, 1)


def prepare_images(scratch: Path, count: int, shards: str | None, tar: str | None) -> SampleImages:
    """Return up to `count` images of a directory of shards, of a tar, or made here, laid out under `scratch`.

    They are whole grey or colour JPEGs, which every contender can read. Raises DataError if there are none.
    """
    source = shards or tar or "made here"
    encoded = list(itertools.islice(filter(_is_ordinary, encoded_images(shards, tar)), count))
    if not encoded:
        raise DataError(f"{source} holds no JPEG; name another by --path or --tar")
    classes = [f"class-{label:02d}" for label in range(min(CLASSES, len(encoded)))]
    images = SampleImages(tuple(encoded), scratch / "shards", scratch / "folder", source)
    images.shards.mkdir()
    samples = [EncodedSample(f"{i:06d}", "jpg", data, i % CLASSES) for i, data in enumerate(encoded)]
    written = [
        write_shard(images.shards, shard_name("train", number), samples[start : start + PER_SHARD])
        for number, start in enumerate(range(0, len(samples), PER_SHARD))
    ]
    split = shard_format.SplitRecord(samples=len(samples), bytes=sum(shard.bytes for shard in written), shards=written)
    record = shard_format.DatasetRecord(classes=classes, splits={"train": split, "val": split})
    shard_format.write_dataset_record(images.shards, record)
    for sample in samples:
        path = images.folder / "train" / classes[sample.label] / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.data)
    (images.folder / "val").symlink_to("train")
    return images


def photo_like(seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have; the same for the same seed."""
    rng = np.random.default_rng(seed)
    size = (LONG_SIDE, SHORT_SIDE) if seed % 4 else (SHORT_SIDE, LONG_SIDE)
    pixels = np.full((size[1], size[0], 3), 128.0)
    for octave in range(1, OCTAVES + 1):
        cells = rng.uniform(-1, 1, (2**octave, 2**octave, 3))
        # Brightness varies more than colour.
        cells = 0.7 * cells.mean(axis=2, keepdims=True) + 0.3 * cells
        as_image = Image.fromarray((127.5 + 127.5 * cells).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(as_image) - 127.5) * 2.6 / 1.45**octave
    pixels += rng.normal(0, NOISE, pixels.shape[:2])[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _is_ordinary(data: bytes) -> bool:
    frame = read_frame(data)
    if frame is None:
        return False
    try:
        decode_rgb(data)
    except UndecodableImageError:
        return False
    return True


def encoded_images(shards: str | None, tar: str | None) -> Iterator[bytes]:
    """Yield the images of shards, or else of a tar, or else new ones without end. Raises DataError."""
    if shards:
        if isinstance(directory := shard_format.dataset_directory(shards), Path):
            shard_format.check_has_record(directory, "--path")
        with closing(ShardSplit(shards, "train", num_classes=1 << 30)) as split:
            yield from map(split.read, range(len(split)))
    elif tar:
        try:
            with tarfile.open(tar) as members:
                for member in members:
                    if member.name.lower().endswith(JPEG_ENDINGS) and (file := members.extractfile(member)):
                        yield file.read()
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"--tar {tar} cannot be read: {error}") from error
    else:
        yield from map(photo_like, itertools.count())
