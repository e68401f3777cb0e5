"""Batches from a URL are those from disk, whatever the order, the workers, the server and its faults."""

import dataclasses
import multiprocessing
import os
import re
import signal
import time

import pytest

from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.loading.workers import FetchedAhead
from karat_scale.data.plan import EvalPlan, TrainPlan
from karat_scale.data.shards.shard_format import read_dataset_record, write_dataset_record
from karat_scale.data.shards.shards import hash_files
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import Store
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE, children, contents, wait_until
from tests.servers import FaultyProxy

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")

BLOCKS = {"order": "block", "block_samples": 4, "window_blocks": 2}
ORDERS = {"full": {}, "block": BLOCKS}
# All of them where the slow tests run.
SAMPLED = {("nginx", "block", 2), ("s3", "block", 2), ("gs", "full", 0)}
CELLS = [
    pytest.param(kind, order, workers, marks=() if (kind, order, workers) in SAMPLED else pytest.mark.slow)
    for kind in ("nginx", "s3", "gs")
    for order in ORDERS
    for workers in (0, 2)
]
SLOW = pytest.mark.slow


@pytest.fixture
def opened():
    """Opens data, and closes all at the end."""
    backends = []

    def make(path, **fields):
        config = {"path": str(path), "workers": 0, "prefetch": 2, "timeout": 30, "cache_gb": 0.5, **fields}
        spec = ImageSpec(data_config(config), CROP_AND_FLIP, SIZE, 3, 5)
        backends.append(open_backend(spec))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


def data_config(fields):
    from karat_scale.recipe import DataConfig

    return DataConfig.model_validate(fields)


def epochs(backend, epochs=2, **order):
    plan = TrainPlan(5, backend.num_train, 12, 12, 0, 1, **order)
    return contents(backend.train_batches(plan.slices(0, epochs * plan.steps_per_epoch)))


def evaluation(backend):
    return contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))


@pytest.mark.parametrize(("kind", "order", "workers"), CELLS)
def test_batches_are_those_from_disk(kind, order, workers, make_shards, opened, request):
    directory, order = make_shards(), ORDERS[order]
    serve = request.getfixturevalue(kind)
    url = f"http://127.0.0.1:{serve(directory)}" if kind == "nginx" else serve(directory)
    local, remote = opened(directory, **order), opened(url, workers=workers, **order)
    assert remote.classes == local.classes
    assert remote.locate(17) == local.locate(17)
    assert epochs(remote, **order) == epochs(local, **order)
    assert evaluation(remote) == evaluation(local)


@pytest.mark.parametrize("fault", ["503", "cut", pytest.param("short", marks=SLOW), pytest.param("slow", marks=SLOW)])
def test_faults_that_end_change_nothing(fault, make_shards, opened, nginx):
    directory = make_shards()
    expected = epochs(opened(directory, **BLOCKS), **BLOCKS)
    with FaultyProxy(nginx(directory), spoil=lambda number, asked: fault if number % 5 == 2 else None) as proxy:
        assert epochs(opened(proxy.url, workers=1, **BLOCKS), **BLOCKS) == expected
        assert len(proxy.requests) < 80


def test_each_block_is_fetched_once_and_kept_over_restarts(make_shards, opened, nginx):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        before = epochs(opened(proxy.url, workers=2, **BLOCKS), **BLOCKS)
        blocks = sorted((asked.path, asked.range) for asked in proxy.gets())
        assert len(blocks) == len(set(blocks)) == 10  # 40 samples in blocks of 4; no shard ends within one
        proxy.requests.clear()
        assert epochs(opened(proxy.url, workers=2, **BLOCKS), **BLOCKS) == before
        assert proxy.gets("") == proxy.gets("dataset.json")


def test_a_block_that_ends_with_its_shard_is_fetched_in_parts(make_shards, opened, nginx):
    order = {"order": "block", "block_samples": 5, "window_blocks": 3}
    directory = make_shards()
    expected = epochs(opened(directory, **order), **order)
    assert epochs(opened(f"http://127.0.0.1:{nginx(directory)}", **order), **order) == expected


def test_an_object_that_changed_is_noticed(make_shards, opened, nginx, make_sample):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        backend = opened(proxy.url, **BLOCKS)
        tar = directory / "train-000002.tar"
        content = bytearray(tar.read_bytes())
        content[1600] ^= 1  # in the first image
        tar.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{proxy.url}/{tar.name} has changed since .*: sample 0016 differs"):
            epochs(backend, **BLOCKS)
        tar.write_bytes(content[:-512])
        with pytest.raises(DataError, match=rf"{tar.name} has changed since it was indexed: \d+ bytes"):
            opened(proxy.url)
        tar.unlink()
        with pytest.raises(DataError, match=rf"{tar.name}: it is missing"):
            opened(proxy.url)


@pytest.mark.parametrize("suffix", [".tar", ".npz"])
def test_what_the_network_damages_is_not_taken_for_a_change(suffix, make_shards, opened, nginx):
    directory, flipped = make_shards(), []

    def spoil(number, asked):
        is_hit = asked.method == "GET" and asked.path.endswith(suffix) and len(flipped) < most
        flipped.extend([number] * is_hit)
        return "flip" if is_hit else None

    most = 1
    expected = epochs(opened(directory, **BLOCKS), **BLOCKS)
    with FaultyProxy(nginx(directory), spoil=spoil) as proxy:
        assert epochs(opened(proxy.url, **BLOCKS), **BLOCKS) == expected
    most = 10**9
    said = r"arrives damaged, each time in another way; check the network"
    with FaultyProxy(nginx(directory), spoil=spoil) as proxy, pytest.raises(DataError, match=said):
        epochs(opened(proxy.url, **BLOCKS), **BLOCKS)


def test_an_etag_stands_in_for_hashes_that_nobody_computed(make_shards, opened, nginx):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        record = read_dataset_record(directory)
        for split in record.splits.values():
            for shard in split.shards:
                shard.etag, shard.sha256 = Store(proxy.url).facts(shard.name).etag, ""
        write_dataset_record(directory, record)
        backend = opened(proxy.url, **BLOCKS)
        assert len(epochs(backend, 1, **BLOCKS)) == 3
        tar = directory / "train-000002.tar"
        tar.write_bytes(tar.read_bytes())
        os.utime(tar, (1, 1))  # nginx's ETag is of time and size
        with pytest.raises(DataError, match=rf"{tar.name} has changed since it was indexed: its ETag differs"):
            opened(proxy.url, **BLOCKS)
        assert len(epochs(opened(directory), 1)) == 3  # a file system has no ETags


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW)])
def test_a_store_that_stalls_is_named_in_time(workers, make_shards, opened, nginx):
    stalls = []
    with FaultyProxy(nginx(make_shards()), spoil=lambda number, asked: "stall" if stalls else None) as proxy:
        backend = opened(proxy.url, workers=workers, timeout=4)
        stalls.append(True)
        begun = time.monotonic()
        line = rf"^{re.escape(proxy.url)}/train-00000\d\.tar: no answer came in time, .*data.timeout \(now 4 s\)"
        with pytest.raises(DataError, match=line):
            epochs(backend)
        assert time.monotonic() - begun < 4 + workers * 6  # torch gives a worker that hangs 5 s to end


def test_what_the_order_needs_must_fit_into_the_cache(make_shards, opened, nginx):
    with pytest.raises(DataError, match=r"^data.cache_gb = 1e-05 is too small .* set data.cache_gb=[\d.e-]+ or more"):
        opened(f"http://127.0.0.1:{nginx(make_shards())}", cache_gb=1e-5, **BLOCKS)


def test_hashes_are_not_checked_by_fetching_everything(make_shards, opened, nginx):
    url = f"http://127.0.0.1:{nginx(make_shards())}"
    for check in (opened, lambda path, **fields: list(hash_files(data_config({"path": path, **fields}), 0, 1))):
        with pytest.raises(DataError, match=r"use data\.verify=size, which checks each image when it is fetched"):
            check(url, verify="hash")


def test_a_cache_that_loses_bytes_fetches_them_again(make_shards, opened, nginx, own_cache):
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        expected = epochs(opened(proxy.url, **BLOCKS), **BLOCKS)
        for entry in own_cache.glob("??/*"):
            entry.write_bytes(bytes(entry.stat().st_size))
        proxy.requests.clear()
        assert epochs(opened(proxy.url, **BLOCKS), **BLOCKS) == expected
        assert len(proxy.gets()) == 10


class Recorder:
    """Tells what it was asked to fetch, through a file."""

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
    wait_until(lambda: not multiprocessing.active_children() and children() <= before)


def test_the_fetching_process_ends_with_a_trainer_that_is_killed(tmp_path):
    told, pids = tmp_path / "told", tmp_path / "pids"
    trainer = os.fork()
    if trainer == 0:
        before = children()
        FetchedAhead(Recorder(told), TrainPlan(5, 40, 4, 4, 0, 1).slices(0, 10), 8)
        ahead = FetchedAhead(Recorder(told), TrainPlan(5, 40, 4, 4, 0, 1).slices(0, 10), 8)
        pids.write_text(str((children() - before).pop()))
        signal.pause()
        ahead.close()
    wait_until(lambda: pids.exists() and pids.read_text() and told.exists())
    fetcher = int(pids.read_text())
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)

    def has_ended() -> bool:
        try:
            os.kill(fetcher, 0)
        except ProcessLookupError:
            return True
        return open(f"/proc/{fetcher}/stat").read().split(") ")[1][0] == "Z"  # noqa: PTH123

    wait_until(has_ended)


def test_ranks_of_a_node_fetch_each_block_once(make_shards, opened, nginx):
    plans = [TrainPlan(5, 40, 8, 4, rank, 2, **BLOCKS) for rank in range(2)]
    with FaultyProxy(nginx(make_shards()), latency=0.02) as proxy:
        ranks = []
        for plan in plans:
            ranks.append(os.fork())
            if ranks[-1] == 0:
                backend = opened(proxy.url, workers=1, **BLOCKS)
                seen = sum(len(batch.labels) for batch in backend.train_batches(plan.slices(0, 10)))
                backend.close()
                os._exit(0 if seen == 40 else 1)
        assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0]
        assert len(proxy.gets()) == 10


def test_a_small_cache_stays_small_and_changes_nothing(make_shards, opened, nginx, own_cache, monkeypatch):
    monkeypatch.setattr("karat_scale.data.shards.remote._MAX_OPEN", 2)
    directory = make_shards()
    expected = epochs(opened(directory, **BLOCKS), **BLOCKS)
    limit = 70_000  # of 154 kB
    with FaultyProxy(nginx(directory)) as proxy:
        assert epochs(opened(proxy.url, workers=2, cache_gb=limit / 1e9, **BLOCKS), **BLOCKS) == expected
        assert 10 < len(proxy.gets()) < 60
    assert sum(file.stat().st_size for file in own_cache.glob("??/*")) <= limit


def test_training_goes_on_without_the_fetching_process(make_shards, opened, nginx):
    directory = make_shards()
    expected = epochs(opened(directory, **BLOCKS), **BLOCKS)
    with FaultyProxy(nginx(directory), latency=0.05) as proxy:
        backend, before = opened(proxy.url, **BLOCKS), children()
        plan = TrainPlan(5, 40, 12, 12, 0, 1, **BLOCKS)
        batches = backend.train_batches(plan.slices(0, 6))
        (fetcher,) = children() - before
        os.kill(fetcher, signal.SIGKILL)
        assert contents(batches) == expected


def test_dali_reads_a_url(make_shards, opened, nginx):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    directory = make_shards()
    with FaultyProxy(nginx(directory)) as proxy:
        local, remote = (opened(path, backend="dali", workers=2, **BLOCKS) for path in (directory, proxy.url))
        assert epochs(remote, **BLOCKS) == epochs(local, **BLOCKS)
        assert len(proxy.gets()) == 10
        assert evaluation(remote) == evaluation(local)
