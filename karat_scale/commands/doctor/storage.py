"""The speed of the data's disk, in sequence and at random, without the page cache."""

import contextlib
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from karat_scale.foundation.files import open_regular

PAGE = 4096
CHUNK = 4 << 20
SEQUENTIAL_BYTES = 128 << 20
RANDOM_READS = 512
# The kernel caches pages in blocks of up to this size, aligned to it, and drops only whole blocks.
FOLIO = 2 << 20

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
    state: Literal["cold", "warm", "unknown"]
    cached_share: float | None
    readers: int


def measure_storage(paths: Sequence[Path], block: int, readers: int, seconds: float, rank: int = 0) -> StorageSpeed:
    """Read the files at random in blocks of `block` bytes, then again, then in sequence; about `seconds` in total.

    The pages are dropped from the cache first, as in the first epoch. Each rank reads other places. Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        descriptors = [stack.enter_context(os.fdopen(open_regular(path), "rb", 0)).fileno() for path in paths]
        spans = _random_spans(descriptors, block, rank)
        cached_share = _cached_share(spans)
        _give_up(spans)
        state = _state(spans)
        at_random, read = _random_speed(spans, readers, seconds / 3)
        again, _ = _random_speed(read, readers, seconds / 3)
        sequence = _sequential_spans(descriptors, rank)
        _give_up(sequence)
        sequential, _ = _random_speed(sequence, 1, seconds / 3)
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
    answers = [_is_cached(descriptor, offset) for descriptor, offset, _ in spans]
    known = [answer for answer in answers if answer is not None]
    return sum(known) / len(known) if known else None


def _state(spans: list[Span]) -> Literal["cold", "warm", "unknown"]:
    share = _cached_share(spans)
    if share is None:
        return "unknown"
    return "warm" if share > 0.5 else "cold"


def _is_cached(descriptor: int, offset: int) -> bool | None:
    """True if a page is in memory: only then does a read that may not wait succeed. None if this is not supported."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


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
