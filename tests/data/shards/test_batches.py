"""Batches from a URL equal those from disk, whatever the order, the workers, the server and its faults."""

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from functools import partial

import pytest

from karat_scale.data import EvalLoader, SampleFiles
from karat_scale.data.backends import Backend
from karat_scale.data.backends.images import SplitBackend
from karat_scale.data.loading.workers import FetchedAhead
from karat_scale.data.plan import EvalPlan, TrainPlan
from karat_scale.data.shards.shard_format import read_dataset_record, write_dataset_record
from karat_scale.data.shards.shards import hash_files
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import Store
from tests.conftest import forked, free_port, wait_until
from tests.data.backends.helpers import CROP_AND_FLIP, all_ended_since, children, contents, flip, running
from tests.servers import FaultyProxy

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")

BLOCKS = {"order": "block", "block_samples": 4, "window_blocks": 2}
# Shards end within some of these blocks.
ORDERS = {"full": {}, "block": {"order": "block", "block_samples": 5, "window_blocks": 3}}
# The other cells run with the slow tests.
SAMPLED = {("nginx", "block", 2), ("s3", "block", 2), ("gs", "full", 0)}
CELLS = [
    pytest.param(kind, order, workers, marks=() if (kind, order, workers) in SAMPLED else pytest.mark.slow)
    for kind in ("nginx", "s3", "gs")
    for order in ORDERS
    for workers in (0, 2)
]
SLOW = pytest.mark.slow


@pytest.fixture
def remote(opened) -> Callable[..., Backend]:
    """Return a function that opens data, also at a URL."""
    return lambda path, **fields: opened(path, CROP_AND_FLIP, **{"timeout": 30, "cache_gb": 0.5, **fields})


def epochs(backend, epochs=2, **order):
    plan = TrainPlan(5, backend.num_train, 12, 12, 0, 1, **order)
    return contents(backend.train_batches(plan.slices(0, epochs * plan.steps_per_epoch)))


def evaluation(backend):
    return contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))


@pytest.mark.parametrize(("kind", "order", "workers"), CELLS)
def test_batches_are_those_from_disk(kind, order, workers, make_shards, remote, request):
    directory, order = make_shards(), ORDERS[order]
    serve = request.getfixturevalue(kind)
    url = f"http://127.0.0.1:{serve(directory)}" if kind == "nginx" else serve(directory)
    local, distant = remote(directory, **order), remote(url, workers=workers, **order)
    assert distant.classes == local.classes
    assert distant.locate(17) == local.locate(17)
    assert epochs(distant, **order) == epochs(local, **order)
    assert evaluation(distant) == evaluation(local)


def test_each_block_is_fetched_once_and_kept_over_restarts(make_shards, remote, nginx):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        before = epochs(remote(proxy.url, workers=2, **BLOCKS), **BLOCKS)
        blocks = sorted((asked.path, asked.range) for asked in proxy.gets())
        assert len(blocks) == len(set(blocks)) == 10  # 40 samples in blocks of 4; no shard ends within one
        proxy.requests.clear()
        assert epochs(remote(proxy.url, workers=2, **BLOCKS), **BLOCKS) == before
        assert proxy.gets("") == proxy.gets("dataset.json")


def test_an_evaluation_fetches_samples_together(make_shards, nginx):
    with FaultyProxy(nginx(make_shards())) as proxy, EvalLoader(proxy.url, workers=0, image_size=16) as loader:
        assert sum(len(ids) for _, _, ids in loader) == 11
        assert len(proxy.gets()) == 2  # one for each tar


def test_the_parts_of_a_sample_are_fetched_by_one_request(make_shards, nginx):
    directory = make_shards()
    local = SampleFiles(directory)
    with FaultyProxy(nginx(directory)) as proxy:
        distant = SampleFiles(proxy.url)
        assert [distant[number] for number in range(9)] == [local[number] for number in range(9)]
        assert len(proxy.gets()) == 9  # before the fix, an image came twice
        flip(directory / "train-000000.tar", 1600)  # in the first image
        for samples in (local, distant):
            with pytest.raises(
                DataError, match=r"train-000000.tar has changed since its index .*: sample 0000 differs"
            ):
                samples[0]
        assert distant[1]["__key__"] == "0001"


def test_an_object_that_changed_is_noticed(make_shards, remote, nginx, make_sample):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        backend = remote(proxy.url, **BLOCKS)
        tar = directory / "train-000002.tar"
        flip(tar, 1600)  # in the first image
        with pytest.raises(DataError, match=rf"^{proxy.url}/{tar.name} has changed since .*: sample 0016 differs"):
            epochs(backend, **BLOCKS)
        os.truncate(tar, tar.stat().st_size - 512)
        with pytest.raises(DataError, match=rf"{tar.name} has changed since it was indexed: \d+ bytes"):
            remote(proxy.url)
        tar.unlink()
        with pytest.raises(DataError, match=rf"{tar.name}: it is missing"):
            remote(proxy.url)


@pytest.mark.parametrize("suffix", [".tar", pytest.param(".npz", marks=SLOW)])
def test_what_the_network_damages_is_not_taken_for_a_change(suffix, make_shards, remote, nginx):
    directory, flipped = make_shards(), []

    def spoil(number, asked):
        is_hit = asked.method == "GET" and asked.path.endswith(suffix) and len(flipped) < most
        flipped.extend([number] * is_hit)
        return "flip" if is_hit else None

    most = 1
    expected = epochs(remote(directory, **BLOCKS), **BLOCKS)
    with FaultyProxy(nginx(directory), spoil=spoil) as proxy:
        assert epochs(remote(proxy.url, **BLOCKS), **BLOCKS) == expected
    most = 10**9
    said = r"arrives damaged, each time in another way; check the network"
    with FaultyProxy(nginx(directory), spoil=spoil) as proxy, pytest.raises(DataError, match=said):
        epochs(remote(proxy.url, **BLOCKS), **BLOCKS)


def test_an_etag_stands_in_for_hashes_that_nobody_computed(make_shards, remote, nginx):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        record = read_dataset_record(directory)
        for split in record.splits.values():
            for shard in split.shards:
                shard.etag, shard.sha256 = Store(proxy.url).facts(shard.name).etag, ""
        write_dataset_record(directory, record)
        backend = remote(proxy.url, **BLOCKS)
        assert len(epochs(backend, 1, **BLOCKS)) == 3
        tar = directory / "train-000002.tar"
        tar.write_bytes(tar.read_bytes())
        os.utime(tar, (1, 1))  # nginx's ETag is of time and size
        with pytest.raises(DataError, match=rf"{tar.name} has changed since it was indexed: its ETag differs"):
            remote(proxy.url, **BLOCKS)
        assert len(epochs(remote(directory), 1)) == 3  # a file system has no ETags


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW)])
def test_a_store_that_stalls_is_named_in_time(workers, make_shards, remote, nginx, monkeypatch):
    stalls = []
    with FaultyProxy(nginx(make_shards()), spoil=lambda number, asked: "stall" if stalls else None) as proxy:
        backend = remote(proxy.url, workers=workers)
        store = backend._train._files._store
        store._timeout, store._patience = 3, 2.4  # not earlier, since opening it may take longer
        # Otherwise the process that fetches ahead may be the one that waits, and the trainer waits for that process.
        monkeypatch.setattr(SplitBackend, "_fetched_ahead", lambda self, source, slices: slices)
        stalls.append(True)
        line = rf"^{re.escape(proxy.url)}/train-00000\d\.tar: no answer came in time, .*data.timeout \(now 3 s\)"
        with pytest.raises(DataError, match=line):
            epochs(backend)  # the server's answer would come only at the end of the block


def test_the_cache_must_hold_what_the_order_needs_and_hashes_are_not_fetched(make_shards, remote, nginx, data_config):
    url = f"http://127.0.0.1:{nginx(make_shards())}"
    with pytest.raises(DataError, match=r"^data.cache_gb = 1e-05 is too small .* set data.cache_gb=[\d.e-]+ or more"):
        remote(url, cache_gb=1e-5, **BLOCKS)
    for check in (remote, lambda path, **fields: list(hash_files(data_config(path, **fields), 0, 1))):
        with pytest.raises(DataError, match=r"use data\.verify=size, which checks each image when it is fetched"):
            check(url, verify="hash")


def test_a_cache_that_loses_bytes_fetches_them_again(make_shards, remote, nginx, own_cache):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        expected = epochs(remote(proxy.url, **BLOCKS), **BLOCKS)
        for entry in own_cache.glob("??/*"):
            entry.write_bytes(bytes(entry.stat().st_size))
        proxy.requests.clear()
        assert epochs(remote(proxy.url, **BLOCKS), **BLOCKS) == expected
        assert len(proxy.gets()) == 10


class Recorder:
    """Writes what it was asked to fetch to a file."""

    def __init__(self, path):
        self.path = path

    def hint(self, sample_ids):
        with self.path.open("a") as file:
            file.write(f"{list(sample_ids)}\n")


def test_the_fetching_process_stays_ahead_and_ends_with_its_slices(tmp_path):
    before, told = children(), tmp_path / "told"
    plan = TrainPlan(5, 40, 4, 4, 0, 1)
    ahead = FetchedAhead(Recorder(told), plan.slices(0, 10), 8)
    parts = list(plan.slices(0, 10))
    wait_until(lambda: told.exists() and len(told.read_text().splitlines()) == 2)
    assert dataclasses.astuple(next(ahead))[:2] == (0, 0)
    wait_until(lambda: len(told.read_text().splitlines()) == 3)
    assert [str(part.sample_ids.tolist()) for part in parts[:3]] == told.read_text().splitlines()
    assert [part.sample_ids.tolist() for part in ahead] == [part.sample_ids.tolist() for part in parts[1:]]
    wait_until(lambda: all_ended_since(before))


def test_the_fetching_process_ends_with_a_trainer_that_is_killed(tmp_path):
    told, pids = tmp_path / "told", tmp_path / "pids"

    def train() -> None:
        before = children()
        ahead = FetchedAhead(Recorder(told), TrainPlan(5, 40, 4, 4, 0, 1).slices(0, 10), 8)
        pids.write_text(str((children() - before).pop()))
        signal.pause()
        ahead.close()

    trainer = forked(train)
    wait_until(lambda: pids.exists() and pids.read_text() and told.exists())
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    wait_until(lambda: not running(int(pids.read_text())))


def test_ranks_of_a_node_fetch_each_block_once(make_shards, remote, nginx):
    plans = [TrainPlan(5, 40, 8, 4, rank, 2, **BLOCKS) for rank in range(2)]
    with FaultyProxy(nginx(make_shards()), latency=0.02) as proxy:

        def read(plan: TrainPlan) -> None:
            backend = remote(proxy.url, workers=1, **BLOCKS)
            assert sum(len(batch.labels) for batch in backend.train_batches(plan.slices(0, 10))) == 40
            backend.close()

        ranks = [forked(partial(read, plan)) for plan in plans]
        assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0]
        assert len(proxy.gets()) == 10


def test_a_small_cache_stays_small_and_changes_nothing(make_shards, remote, nginx, own_cache, monkeypatch):
    monkeypatch.setattr("karat_scale.data.shards.remote._MAX_OPEN", 2)
    directory = make_shards()
    expected = epochs(remote(directory, **BLOCKS), **BLOCKS)
    limit = 70_000  # of 102 kB
    with FaultyProxy(nginx(directory)) as proxy:
        assert epochs(remote(proxy.url, workers=2, cache_gb=limit / 1e9, **BLOCKS), **BLOCKS) == expected
        assert len(proxy.gets()) < 60
        assert proxy.sent > limit
    assert sum(file.stat().st_size for file in own_cache.glob("??/*")) <= limit


def test_training_goes_on_without_the_fetching_process(make_shards, remote, nginx):
    directory = make_shards()
    expected = epochs(remote(directory, **BLOCKS), **BLOCKS)
    with FaultyProxy(nginx(directory), latency=0.05) as proxy:
        backend, before = remote(proxy.url, **BLOCKS), children()
        plan = TrainPlan(5, 40, 12, 12, 0, 1, **BLOCKS)
        closed = backend.train_batches(plan.slices(0, 6))
        closed.close()
        wait_until(lambda: all_ended_since(before))
        batches = backend.train_batches(plan.slices(0, 6))
        (fetcher,) = children() - before
        os.kill(fetcher, signal.SIGKILL)
        assert contents(batches) == expected


def test_dali_reads_a_url(make_shards, remote, nginx):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        local, distant = (remote(path, backend="dali", workers=2, **BLOCKS) for path in (directory, proxy.url))
        assert epochs(distant, **BLOCKS) == epochs(local, **BLOCKS)
        assert len(proxy.gets()) == 10
        assert evaluation(distant) == evaluation(local)


def test_a_stream_of_a_web_server_is_that_of_the_files_and_its_refusals_are_named(nginx, opened, stream_config, tars):
    """The webdataset library reads a URL with curl, and the error has curl's exit code."""

    def train(stream: str):
        plan = TrainPlan(5, 24, 4, 2, 0, 1, "stream", lanes=1)
        return contents(opened(stream_config(stream)).train_batches(plan.slices(0, 6)))

    place = f"http://127.0.0.1:{nginx(tars)}"
    found, of_files = (train(f"{where}/{{0..3}}.tar") for where in (place, tars))
    # Only labels are compared: the name of a tar is part of a sample's id, which seeds its augmentation.
    assert sorted(label for one in found for label in one[3]) == sorted(label for one in of_files for label in one[3])
    assert found == train(f"{place}/{{0..3}}.tar")
    for stream, code in ((f"{place}/no.tar", 22), (f"pipe:curl -s http://127.0.0.1:{free_port()}/0.tar", 7)):
        with pytest.raises(DataError, match=f"/(no|0).tar ended with exit code {code}"):
            train(stream)
