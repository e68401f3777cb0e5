"""Copies of checkpoints in a real object store: each is complete or absent, whatever interrupts the copying."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from karat_scale.checkpoint.remote import RemoteCheckpoints
from karat_scale.checkpoint.store import MANIFEST, CheckpointStore, checkpoint_name
from karat_scale.foundation.files import Fingerprint
from karat_scale.foundation.stores import StoreError, WritableStore
from tests.clock import Clock
from tests.conftest import ROOT, karat_environment
from tests.servers import FaultyProxy, gs, s3, s3_port

__all__ = ["gs", "s3", "s3_port"]
FILES = {"a.pt": bytes(range(256)) * 10, "b.pt": b"b" * 5000, "empty.pt": b""}
WRITES = len(FILES) + 2  # with state.json and the manifest


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def save(store: CheckpointStore, step: int, **more: bytes) -> str:
    directory = store.begin(step)
    files = {**FILES, **{f"{name}.pt": data for name, data in more.items()}}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    written = {name: Fingerprint(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    return store.commit(directory, {"step": step}, written)


def opened(url: str, timeout: float = 60) -> RemoteCheckpoints:
    remote = RemoteCheckpoints(WritableStore(url, timeout))
    remote.look()
    return remote


def upload(remote: RemoteCheckpoints, store: CheckpointStore, name: str) -> None:
    remote.upload(store, name, lambda size: None, lambda: None)


def fetched(url: str, name: str, scratch: Path) -> CheckpointStore:
    """Download the checkpoint at the URL into a new directory, assert that it is intact, and return its store."""
    other = CheckpointStore(scratch / "other" / "checkpoints")
    assert opened(url).download(name, other, lambda size: None) is None
    assert other.damage(name) is None
    return other


@pytest.fixture
def url(s3, tmp_path) -> str:
    """Return the URL of an empty place on the server."""
    return s3(tmp_path / "nothing")


@pytest.fixture(params=["s3", "gs"])
def url_of_each(request, tmp_path) -> str:
    """Return the URL of an empty place on each kind of server."""
    return request.getfixturevalue(request.param)(tmp_path / "nothing")


def test_a_copy_is_the_checkpoint(url_of_each, store, tmp_path) -> None:
    url = url_of_each
    name, seen = save(store, 1200), []
    remote = opened(url)
    assert remote.names() == []
    remote.upload(store, name, seen.append, lambda: None)
    remote.point("latest", [name])
    again = opened(url)
    assert again.names() == [name]
    assert again.pointed("latest") == name
    assert again.pointed("best") is None
    assert sum(seen) >= sum(map(len, FILES.values()))

    other = fetched(url, name, tmp_path)
    original = {path.name: path.read_bytes() for path in (store.root / name).iterdir()}
    assert {path.name: path.read_bytes() for path in (other.root / name).iterdir()} == original
    newer = save(store, 1300)
    upload(again, store, newer)
    again.retain(keep_last=1)
    assert again.names() == [newer, name]  # `latest` names the older one
    again.point("latest", [newer])
    again.retain(keep_last=1)
    assert opened(url).names() == [newer]


def test_a_large_file_goes_in_parts(url_of_each, store, tmp_path) -> None:
    name, seen = save(store, 1, large=os.urandom(20 << 20)), []
    opened(url_of_each).upload(store, name, seen.append, lambda: None)
    assert max(seen) == 8 << 20
    fetched(url_of_each, name, tmp_path)


class Killed(BaseException):
    """An exception in place of a kill."""


@pytest.fixture
def kill_at() -> Iterator[Callable[[int], None]]:
    """Yield a function that lets so many changes to the store succeed, and raises `Killed` at the next one."""
    patch = pytest.MonkeyPatch()

    def arrange(number: int) -> None:
        patch.undo()
        left = [number]
        for method in ("put", "write", "_remove"):
            original = getattr(WritableStore, method)

            def counted(self, *args, original=original):  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return original(self, *args)

            patch.setattr(WritableStore, method, counted)

    yield arrange
    patch.undo()


def test_a_kill_at_any_write_leaves_no_incomplete_checkpoint(store, url, kill_at) -> None:
    first, second = save(store, 1), save(store, 2)
    upload(opened(url), store, first)
    for number in range(WRITES):
        kill_at(number)
        with pytest.raises(Killed):
            upload(opened(url), store, second)
        assert opened(url).names() == [first], number
    kill_at(WRITES)
    upload(opened(url), store, second)
    assert opened(url).names() == [second, first]


def test_a_kill_at_any_removal_leaves_no_incomplete_checkpoint(store, url, kill_at) -> None:
    for step in (1, 2):
        upload(opened(url), store, save(store, step))
    kill_at(1)
    with pytest.raises(Killed):
        opened(url).retain(keep_last=1)
    left = opened(url)
    assert left.names() == [checkpoint_name(2)]
    kill_at(100)
    left.retain(keep_last=1)  # this also removes what the kill left
    assert {name.split("/")[1] for name in WritableStore(url).files()} == {checkpoint_name(2)}


def test_the_same_step_again_is_never_a_mixture(store, url, tmp_path, kill_at) -> None:
    upload(opened(url), store, save(store, 1))
    name = save(store, 1, other=b"another")
    kill_at(2)
    with pytest.raises(Killed):
        upload(opened(url), store, name)
    assert opened(url).names() == []
    kill_at(100)
    upload(opened(url), store, name)
    fetched(url, name, tmp_path)


def test_retention_is_that_of_the_directory(store, url) -> None:
    remote = opened(url)
    names = [save(store, step) for step in range(1, 7)]
    for name in names:
        upload(remote, store, name)
    remote.point("best", [names[1]])
    remote.point("latest", [names[5]])
    remote.point("pinned", [names[0], "step-00000099"])
    remote.retain(keep_last=2)
    assert remote.names() == [names[5], names[4], names[1], names[0]]
    remote.point("best", [names[5]])
    remote.point("pinned", ["step-00000099"])
    remote.retain(keep_last=2, damaged=[names[4]])  # a damaged one does not count
    assert remote.names() == [names[5], names[1]]
    upload(remote, store, names[0])
    remote.point("pinned", [names[0]])
    (store.root / names[0] / "b.pt").write_bytes(b"b")  # a local file that is cut is not copied
    empty = opened(f"{url}/other")
    with pytest.raises(OSError, match=r"b\.pt of step-00000001 has 1 bytes, not 5000"):
        upload(empty, store, names[0])
    assert empty.names() == []


def test_a_step_that_is_saved_again_while_it_is_copied_is_never_a_mixture(store, url, tmp_path) -> None:
    name, remote = save(store, 1), opened(url)
    with pytest.raises(OSError, match="step-00000001 was saved again meanwhile"):
        remote.upload(store, name, lambda size: None, lambda: save(store, 1, other=b"another"))
    assert opened(url).names() == []
    upload(remote, store, name)
    fetched(url, name, tmp_path)


def test_a_local_file_that_goes_meanwhile_is_no_missing_bucket(store, url, monkeypatch) -> None:
    name, put = save(store, 1), WritableStore._put

    def put_too_late(self: WritableStore, file: Path, *arguments: Any) -> None:
        file.unlink(missing_ok=True)
        put(self, file, *arguments)

    monkeypatch.setattr(WritableStore, "_put", put_too_late)
    with pytest.raises(FileNotFoundError, match=re.escape(str(store.root / name))):
        upload(opened(url), store, name)


def test_an_upload_that_got_further_has_its_whole_time_again(url, tmp_path, monkeypatch) -> None:
    clock, parts = Clock(), [3, 5, 8]

    def put(self: WritableStore, file: Path, name: str, part: int, on_bytes: Callable[[int], None], _: float) -> None:
        clock.go(1000)  # longer than all tries may take that come to nothing
        on_bytes(parts.pop(0))
        if parts:
            raise ConnectionError

    monkeypatch.setattr("karat_scale.foundation.stores.time", SimpleNamespace(monotonic=clock, sleep=clock.go))
    monkeypatch.setattr(WritableStore, "_put", put)
    file, seen = tmp_path / "large", []
    file.touch()
    WritableStore(url).put("large", file, seen.append)
    assert seen == [3, 5, 8]
    parts += [3, 3, 8]
    with pytest.raises(StoreError, match=r"the connection failed \(ConnectionError\), 2 times in 200\d s"):
        WritableStore(url).put("large", file, seen.append)


HARMS: dict[str, Callable[[WritableStore], object]] = {
    "b.pt flipped": lambda there: there.write("b.pt", b"b" * 4999 + b"c"),
    "b.pt short": lambda there: there.write("b.pt", b"b" * 4000),
    "b.pt gone": lambda there: there.remove(["b.pt"]),
    f"{MANIFEST} gone": lambda there: there.remove([MANIFEST]),
    f"{MANIFEST} broken": lambda there: there.write(MANIFEST, b"{}"),
}


def test_damage_is_found_and_leaves_nothing(store, url, tmp_path) -> None:
    name = save(store, 1)
    for number, (harm, do) in enumerate(HARMS.items()):
        place = f"{url}/{number}"
        upload(opened(place), store, name)
        remote = opened(place)
        do(WritableStore(f"{place}/checkpoints/{name}"))
        other = CheckpointStore(tmp_path / "other" / "checkpoints")
        damage = remote.download(name, other, lambda size: None)
        assert harm.split()[0] in (damage or "")
        assert not list(other.root.glob("*")) + list(other.root.glob(".*"))


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.slow) for fault in ("503", "slow")] + ["cut"])
def test_a_fault_that_ends_is_not_noticed(fault, store, s3, s3_port, tmp_path) -> None:
    name = save(store, 1)
    with FaultyProxy(s3_port, spoil=lambda number, asked: fault if number % 4 == 1 else None) as proxy:
        url = s3(tmp_path / "nothing", proxy.port)
        upload(opened(url), store, name)
        fetched(url, name, tmp_path)
        assert len(proxy.requests) < 80


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("403", r"access is refused \(HTTP 403\); check the credentials|access is refused; check the credentials"),
        pytest.param("503", r"it failed|the connection failed|no answer came in time", marks=pytest.mark.slow),
        pytest.param(
            "stall",
            r"no answer came in time, \d+ times in \d+ s; check the URL and the store, or raise checkpoint\.timeout",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_store_that_takes_nothing_is_one_line_in_time(fault, line, store, s3, s3_port, tmp_path) -> None:
    def spoil(number: int, asked: object) -> str | None:
        return fault if asked.method == "PUT" else None  # type: ignore[attr-defined]

    with FaultyProxy(s3_port, spoil=spoil) as proxy:  # type: ignore[arg-type]
        url = s3(tmp_path / "nothing", proxy.port)
        with pytest.raises(StoreError, match=rf"^{re.escape(url)}/checkpoints/step-00000001/\S+: ({line})"):
            upload(opened(url, timeout=15), store, save(store, 1))  # a loaded machine is slow
    assert opened(s3(tmp_path / "nothing")).names() == []


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_no_incomplete_checkpoint(store, s3, s3_port, tmp_path) -> None:
    """A SIGKILL leaves no incomplete checkpoint, at 12 moments of a process that copies and removes in a loop."""
    program = f"""
import sys
from pathlib import Path
from karat_scale.checkpoint.store import CheckpointStore
from tests.checkpoint.test_remote import opened, upload
store, remote = CheckpointStore(Path({str(store.root)!r})), opened(sys.argv[1])
print("begins", flush=True)
while True:
    for name in reversed(store.names()):
        upload(remote, store, name)
        remote.point("latest", [name])
        remote.retain(keep_last=1)
"""
    names = [save(store, step) for step in range(1, 5)]
    met = set()
    with FaultyProxy(s3_port, latency=0.005) as proxy:
        url = s3(tmp_path / "nothing", proxy.port)
        for number in range(12):
            command = [sys.executable, "-c", program, url]
            with subprocess.Popen(command, env=karat_environment(), stdout=subprocess.PIPE, cwd=ROOT) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"begins\n"
                time.sleep(0.037 * number)
                process.send_signal(signal.SIGKILL)
            remote = opened(url)
            for name in remote.names():
                fetched(url, name, tmp_path / str(number))
                met.add(name)
            assert remote.pointed("latest") in {None, *names}
    assert met


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_named(kind, store, tmp_path, request) -> None:
    request.getfixturevalue(kind)(tmp_path / "nothing")
    remote = RemoteCheckpoints(WritableStore(f"{kind}://no-such-bucket/run", timeout=20))
    with pytest.raises(
        StoreError, match=rf"^{kind}://no-such-bucket/run/\S+ cannot be written: there is no such bucket"
    ):
        upload(remote, store, save(store, 1))
