import multiprocessing
import resource
import threading

import numpy as np
import psutil
import pytest

from karat_scale.data.backends.gpu_decoders import RowReader, _readers_with_files
from karat_scale.data.decoders.decode import crop_view
from karat_scale.data.decoders.libraries import PillowDecoder
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import EncodedSample
from tests.data.conftest import encode, photo


def read(directory, ids, threads=1, max_pixels=10**6):
    split = ShardSplit(directory, "train", 3)
    decoder = PillowDecoder("bicubic", max_pixels)
    seen = []

    def choose(epoch, sample_id, width, height):
        seen.append((epoch, sample_id, width, height))
        return crop_view((0, 0, width, height // 2), 8), None

    reader = RowReader(split, decoder, choose, max_pixels, threads)
    rows = reader.read(BatchSlice(3, 0, np.array(ids)))
    reader.close()
    return split, rows, sorted(seen)


@pytest.mark.parametrize("threads", [1, 3])
def test_jpegs_come_as_bytes_in_order_with_their_views(make_shards, threads):
    ids = [7, 0, PADDING, 39, 7]
    split, rows, seen = read(make_shards(), ids, threads)
    assert rows[2] is None
    for row, sample_id in zip(rows, ids, strict=True):
        if row is not None:
            assert row.data.tobytes() == split.read(sample_id)
            assert row.pixels is None
    assert seen == sorted((3, i, 20 + i % 9, 18 + i % 7) for i in (7, 0, 39, 7))


def test_what_is_no_plain_complete_jpeg_is_decoded_at_once(make_shards):
    data = encode(photo(1), quality=95)
    middle = data.rindex(b"\xff\xda") + (len(data) - data.rindex(b"\xff\xda")) // 2
    files = {
        "whole": data,
        "png": encode(photo(1), "PNG"),
        "trailing": data + b"\0",
        "marker in its scan": data[:middle] + b"\xff\xd9" + data[middle + 2 :],
        "cut": encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[:-100],
    }
    directory = make_shards(train=[EncodedSample(name, "jpg", found, 0) for name, found in files.items()])
    whole, *odd = read(directory, range(4))[1]
    assert whole.pixels is None
    assert all(row.data is None and row.pixels.shape == (8, 8, 3) for row in odd)
    assert read(directory, [0, 4])[1] is None  # although it is cut below the wanted part


def test_too_many_pixels_are_refused_from_the_header_and_files_are_closed_with_the_reader(make_shards):
    directory = make_shards()
    before = psutil.Process().num_fds()
    assert read(directory, [0], max_pixels=20 * 18)[1] is not None
    assert read(directory, [0], max_pixels=20 * 18 - 1)[1] is None
    for threads in (1, 1, 2, 2):
        read(directory, range(40), threads)
    assert psutil.Process().num_fds() <= before + 1
    processes = multiprocessing.get_context("fork")  # a hard limit cannot be raised again
    told = processes.SimpleQueue()
    process = processes.Process(target=_readers_below_a_hard_limit, args=(told,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert told.get() == (2, 7, (2048, 2048))


@pytest.fixture
def few_files():
    """Let this process open 1,024 files, which is the usual limit, until it asks for more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < 17 * 256:
        pytest.skip(f"the hard limit of open files is {limits[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_all_threads_read_though_few_files_may_be_open(make_shards, few_files):
    together = threading.Barrier(8)

    def choose(epoch, sample_id, width, height):
        together.wait(timeout=60)  # fewer threads would wait here in vain
        return crop_view((0, 0, width, height), 8), None

    reader = RowReader(ShardSplit(make_shards(), "train", 3), PillowDecoder("bicubic", 10**6), choose, 10**6, 8)
    try:
        assert None not in reader.read(BatchSlice(0, 0, np.arange(8)))
    finally:
        reader.close()


def _readers_below_a_hard_limit(told):
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, 2048))
    told.put((_readers_with_files(2), _readers_with_files(64), resource.getrlimit(resource.RLIMIT_NOFILE)))
