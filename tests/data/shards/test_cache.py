"""Tests of the node's cache: one process fetches and all read, it is bounded and kept, and a failing disk is named."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from karat_scale.data import ExactLoader
from karat_scale.data.shards.remote import NodeCache, Part, RemoteUse, data_cache_directory
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import DataConfig
from tests.conftest import forked, wait_until

SIZE = 1000


def later(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def made(cache: NodeCache, key: str, content: bytes = b"x" * SIZE, calls: list[str] | None = None) -> bytes:
    """Return the content of an entry, which is made if it is not there."""

    def make(part):
        if calls is not None:
            calls.append(key)
        part.write(b"what a try left")
        part.restart()
        part.write(content[:10])
        part.write(content[10:])

    entry = cache.open(key, len(content), make, later())
    assert entry is not None
    try:
        return os.pread(entry, 10 * SIZE, 0)
    finally:
        os.close(entry)


def entries(directory: Path) -> list[Path]:
    return [path for path in directory.glob("??/*") if path.suffix != ".part"]


def test_an_entry_is_made_once_and_kept_and_made_again_where_it_is_not_whole(tmp_path):
    calls: list[str] = []
    for _ in range(3):
        assert made(NodeCache(tmp_path / "cache", 1e6), "url a", calls=calls) == b"x" * SIZE
    assert calls == ["url a"]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "cache" / "total").read_text().split() == [str(SIZE)]
    cache = NodeCache(tmp_path / "cache", 1e6)
    (entry,) = entries(tmp_path / "cache")
    os.truncate(entry, 17)  # by a crash
    assert made(cache, "url a", calls=calls) == b"x" * SIZE
    entry.unlink()
    os.mkfifo(entry)
    assert made(cache, "url a", calls=calls) == b"x" * SIZE
    assert calls == 3 * ["url a"]


def test_the_entries_used_last_are_kept(tmp_path):
    cache, calls = NodeCache(tmp_path / "cache", 10 * SIZE), []
    for number in range(10):
        made(cache, f"url {number}")
    held = cache.open("url 1", SIZE, lambda part: None, later())
    time.sleep(0.02)
    made(cache, "url 0")  # used again
    made(cache, "url 10")
    assert sum(path.stat().st_size for path in entries(tmp_path / "cache")) == 9 * SIZE
    assert os.pread(held, SIZE, 0) == b"x" * SIZE  # what a process has open can be read
    os.close(held)
    for number in (0, 10, 9):
        made(cache, f"url {number}", calls=calls)
    assert calls == []
    for number in range(20, 60):
        made(cache, f"url {number}")
        assert sum(path.stat().st_size for path in entries(tmp_path / "cache")) <= 10 * SIZE


def test_files_of_the_users_own_in_the_directory_stay(tmp_path):
    """Before the fix, the oldest files of every folder in it were removed, whoever had made them."""
    own = [tmp_path / "results/model.pt", tmp_path / "ab/notes.txt", tmp_path / "ab/x.part"]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 3 * SIZE)
        os.utime(path, (0, 0))
    tmp_path.chmod(0o755)
    for number in range(20):
        made(NodeCache(tmp_path, 5 * SIZE), f"url {number}")
    assert all(path.read_bytes() == b"x" * 3 * SIZE for path in own)
    assert sum(path.stat().st_size for path in tmp_path.glob("??/" + "?" * 40)) <= 5 * SIZE


def test_a_directory_that_others_may_write_to_is_refused_and_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(DataError, match=rf"other users may write to the cache {tmp_path}; chmod go-w {tmp_path}, or "):
        NodeCache(tmp_path, 1e6)
    assert tmp_path.stat().st_mode & 0o777 == 0o777


def test_one_of_many_processes_makes_an_entry_and_a_killed_one_blocks_nobody(tmp_path):
    cache, log = NodeCache(tmp_path / "cache", 1e6), tmp_path / "log"
    begun = tmp_path / "begun"

    def slow(part: Part) -> None:
        part.write(b"half")
        begun.touch()
        time.sleep(60)

    holder = forked(lambda: cache.open("url a", SIZE, slow, later()))
    wait_until(begun.exists)
    assert cache.open("url a", SIZE, slow, later(), waits=False) is None
    with pytest.raises(DataError, match=r"another process has not fetched url in time; raise data\.timeout"):
        cache.open("url a", SIZE, slow, later(0.1))

    def quick(part: Part) -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        part.write(b"y" * SIZE)

    def read() -> None:
        assert os.pread(cache.open("url a", SIZE, quick, later()), SIZE, 0) == b"y" * SIZE

    readers = [forked(read) for _ in range(6)]
    time.sleep(0.2)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert [os.waitpid(reader, 0)[1] for reader in readers] == [0] * 6
    assert log.read_text() == "made\n"
    assert not list((tmp_path / "cache").glob("??/*.part"))


@pytest.mark.usefixtures("locks_of_nfs")
def test_an_error_of_the_store_leaves_nothing_and_what_a_killed_process_left_goes_when_room_is_made(tmp_path):
    cache = NodeCache(tmp_path / "cache", 2 * SIZE)

    def fail(part: Part) -> None:
        raise DataError("the store is down")

    with pytest.raises(DataError, match="the store is down"):
        cache.open("url a", SIZE, fail, later())
    assert not list((tmp_path / "cache").glob("??/*"))
    assert made(cache, "url a") == b"x" * SIZE
    left = entries(tmp_path / "cache")[0].with_suffix(".part")
    left.write_bytes(b"half")
    for number in range(3):
        made(cache, f"url {number}")
    assert not left.exists()


def test_a_full_disk_is_one_line(small_disk):
    cache = NodeCache(small_disk / "cache", 1e9)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; free space there, lower data\."):
        made(cache, "url a", b"x" * 3_000_000)
    assert not list((small_disk / "cache").glob("??/*"))
    assert made(cache, "url b") == b"x" * SIZE


@pytest.mark.skipif(os.getuid() != 0, reason="another user's directory needs root")
def test_another_users_directory_is_refused(tmp_path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(DataError, match="belongs to another user; set KARAT_DATA_CACHE to a directory of yours"):
        NodeCache(tmp_path, 1e6)


def test_where_it_is_and_what_is_no_directory(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache, cannot be written: Not a directory; set KARAT_DATA_CACHE to"):
        NodeCache(tmp_path / "file" / "cache", 1e6)
    monkeypatch.setenv("KARAT_DATA_CACHE", str(tmp_path / "own"))
    assert data_cache_directory() == tmp_path / "own"
    monkeypatch.delenv("KARAT_DATA_CACHE")
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "all"))
    assert data_cache_directory() == tmp_path / "all" / "data"


def test_a_disk_that_became_read_only_still_serves_what_it_has(small_disk):
    cache = NodeCache(small_disk / "cache", 1e9)
    made(cache, "url a")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert made(NodeCache(small_disk / "cache", 1e9), "url a") == b"x" * SIZE
    with pytest.raises(DataError, match=r"cannot be written: Read-only file system; set KARAT_DATA_CACHE to"):
        made(cache, "url b")


@pytest.mark.parametrize(
    ("environ", "ahead", "full"),
    [
        ({}, 8192, 8192),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 512, 65536),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "4"}, 512, 32768),
    ],
)
def test_a_window_is_fetched_ahead_by_all_ranks_together(environ, ahead, full, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    data = DataConfig(path="s3://bucket/set", order="block")
    block = RemoteUse.of(data, training=True)
    assert (block.together, block.ahead, block.working_set) == (256, ahead, 2 * 8192)
    one = RemoteUse.of(data.changed(order="full"), training=True)
    assert (one.together, one.ahead, one.working_set) == (1, 1024, full)
    assert RemoteUse.of(data, training=False).together == 64


@pytest.mark.parametrize(
    ("environ", "full"),
    [({}, 4), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 4), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "2"}, 2)],
)
def test_a_loaders_own_number_of_ranks_counts(environ, full, monkeypatch, make_shards, nginx):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    url = f"http://127.0.0.1:{nginx(make_shards())}"
    own = {"global_batch": 8, "rank": 1, "world_size": 4, "workers": 0, "image_size": 16}
    with ExactLoader(url, order="block", block_samples=4, window_blocks=2, **own) as loader:
        assert loader._source._train.ahead == 2
    assert RemoteUse.of(DataConfig(path=url), training=True, world_size=4).working_set == 8192 * full
