"""Tests of files at a URL: how the answers and the faults of servers are handled."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores import ChangedFileError, FileFacts, Store, StoreError, check_url, is_url, judged
from tests.conftest import free_port, karat_environment, karat_here
from tests.data.tars import image, write_tar
from tests.servers import Answering, FaultyProxy, serving
from tests.warm import run_code

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")


@pytest.fixture
def files(tmp_path):
    """Return a directory with a few files."""
    directory = tmp_path / "served"
    (directory / "below").mkdir(parents=True)
    (directory / "a.tar").write_bytes(bytes(range(256)) * 40)
    (directory / "below" / "b c.tar").write_bytes(b"b" * 700)
    (directory / "dataset.json").write_text("{}")
    return directory


@pytest.mark.parametrize(
    ("status", "content", "what"),
    [
        (403, b"", "access is refused (HTTP 403); check the credentials that the store's library finds"),
        (400, b'{"error": {"message": "invalid bucket"}}', "it failed (HTTP 400)"),
    ],
)
def test_an_answer_of_google_that_no_try_changes_is_final(status, content, what):
    retry = pytest.importorskip("gcsfs.retry", reason="gcsfs is not installed: pip install -e '.[remote]'")
    with pytest.raises((OSError, ValueError)) as refused:
        retry.validate_response(status, content, "bucket/set")
    assert judged(refused.value) == (what, True)


def test_an_upload_that_stalls_is_tried_again_and_a_name_that_no_bucket_has_is_not():
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
    exceptions = pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": "RequestTimeout"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    stalled = s3fs.errors.translate_boto_error(exceptions.ClientError(answer, "UploadPart"))
    assert judged(stalled) == ("no answer came in time", False)
    what, is_final = judged(exceptions.ParamValidationError(report="Invalid bucket name"))
    assert is_final
    assert what.startswith("ParamValidationError; check the name, ")


def test_urls():
    assert [is_url(text) for text in ("s3://a/b", "HTTPS://a", "data/a", "/a//b", "a:b", None)] == [1, 1, 0, 0, 0, 0]
    assert check_url("hf://datasets/user/set@main/train/") == "hf://datasets/user/set@main/train"
    assert check_url("S3://Bucket/set") == "s3://Bucket/set"
    for wrong, line in {
        "ftp://a/b": "ftp:// is not supported; use s3://, gs://, https://, http:// or hf://",
        "s3://": "s3:// names no bucket or server; write it after the //",
        "https://me:word@host/a": "https://host/a has a user, a query or a fragment, which may be a credential",
        "https://host/a?sig=word": "https://host/a has a user, a query or a fragment",
    }.items():
        with pytest.raises(ValueError, match=re.escape(line)) as error:
            check_url(wrong)
        assert "word" not in str(error.value)


@pytest.mark.parametrize("kind", ["nginx", "s3", "gs"])
def test_a_real_server(kind, files, request):
    serve = request.getfixturevalue(kind)
    where = serve(files)
    store = Store(f"http://127.0.0.1:{where}" if kind == "nginx" else where, timeout=20)
    found = store.files()
    assert set(found) == {"a.tar", "below/b c.tar", "dataset.json"}
    facts = store.facts_of(["a.tar", "below/b c.tar"])
    assert [fact.bytes for fact in facts.values()] == [256 * 40, 700]
    assert all(fact.etag for fact in facts.values())
    content = (files / "a.tar").read_bytes()
    assert store.read("a.tar", 300, 1000, facts["a.tar"].etag) == content[300:1000]
    assert store.read("a.tar", 5, 5) == b""
    assert store.read("below/b c.tar", 0, 700) == b"b" * 700
    assert store.read_small("dataset.json", 100) == b"{}"
    with pytest.raises(StoreError, match=r"a\.tar has 10240 bytes; it should have at most 100"):
        store.read_small("a.tar", 100)
    with pytest.raises(ChangedFileError, match=r"a\.tar has changed since it was indexed"):
        store.read("a.tar", 0, 10, "another")
    # None of these is tried again: the lines end without "... times in ...".
    with pytest.raises(ChangedFileError, match=r"is cut short, or has changed since it was indexed$"):
        store.read("a.tar", 10_000, 11_000)
    with pytest.raises(ChangedFileError, match=r"is cut short, or has changed since it was indexed$"):  # an answer 416
        store.read("a.tar", 11_000, 12_000)
    with pytest.raises(StoreError, match=r"none\.tar: it is missing( \(HTTP 404\))?$"):
        store.read("none.tar", 0, 10)
    with pytest.raises(StoreError, match=r"none\.tar.* is missing( \(HTTP 404\))?$"):
        store.facts_of(["none.tar"])


@pytest.mark.parametrize("fault", ["503", "cut", "short", pytest.param("slow", marks=pytest.mark.slow)])
def test_a_fault_that_ends_is_not_noticed(fault, files, nginx):
    with FaultyProxy(nginx(files), spoil=lambda number, asked: fault if number in (0, 2, 3) else None) as proxy:
        store = Store(proxy.url, timeout=60)
        content = (files / "a.tar").read_bytes()
        for start in range(0, 3000, 1000):
            assert store.read("a.tar", start, start + 1000) == content[start : start + 1000]
        assert len(proxy.requests) <= 12


STAYS = {
    "503": r"it failed \(HTTP 503\), \d+ times in \d+ s; check the URL and the store, or raise data.timeout \(now 3 s",
    "stall": r"no answer came in time, \d times in",
    "cut": r"the connection failed \(\w+\), \d+ times in",
}


def test_a_fault_that_stays_is_one_line_in_time(files, nginx):
    port = nginx(files)

    def stays(fault, line):
        with FaultyProxy(port, spoil=lambda number, asked: fault) as proxy:
            with pytest.raises(StoreError, match=rf"^{proxy.url}/a\.tar: {line}"):
                Store(proxy.url, timeout=3).read("a.tar", 0, 1000)
            assert len(proxy.requests) < 20

    with ThreadPoolExecutor(len(STAYS)) as pool:
        list(pool.map(stays, STAYS, STAYS.values()))


def test_tries_that_take_long_are_told_once(files, nginx, monkeypatch, capsys):
    monkeypatch.setattr("karat_scale.foundation.stores.QUIET", 0.5)
    with (
        FaultyProxy(nginx(files), spoil=lambda number, asked: "503") as proxy,
        pytest.raises(DataError, match=r"it failed \(HTTP 503\)"),
    ):
        read_dataset_record(proxy.url, 5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: {proxy.url}/dataset.json: it failed (HTTP 503); trying for up to 4 s"


def test_a_folder_that_cannot_be_listed_is_no_empty_one(files, nginx):
    faults = {1: "503", 2: "cut"}  # of the folder below
    with FaultyProxy(nginx(files), spoil=lambda number, asked: faults.get(number)) as proxy:
        assert set(Store(proxy.url, timeout=20).files()) == {"a.tar", "below/b c.tar", "dataset.json"}
    with (
        FaultyProxy(nginx(files), spoil=lambda number, asked: "503" if number else None) as proxy,
        pytest.raises(StoreError, match=r"it failed \(HTTP 503\)"),
    ):
        Store(proxy.url, timeout=2).files()


def test_a_try_that_was_given_up_writes_nothing_more(files, nginx):
    """The library may continue a try that was given up, while the next try writes to the same place."""
    content = (files / "a.tar").read_bytes()

    class Slow:
        """A sink that takes so long for the first piece that the try is given up."""

        def __init__(self):
            self.pieces, self.tries = [], 0

        def restart(self):
            self.pieces, self.tries = [], self.tries + 1

        def write(self, data):
            if self.tries == 1:
                time.sleep(2.5)
            self.pieces.append(data)

    sink = Slow()
    store = Store(f"http://127.0.0.1:{nginx(files)}", timeout=6)
    store.copy("a.tar", 0, 5000, sink)
    assert sink.tries >= 2
    time.sleep(0.5)
    assert b"".join(sink.pieces) == content[:5000]


def test_a_server_that_is_not_there_is_not_a_missing_file():
    with pytest.raises(StoreError, match=r"a\.tar: the connection failed .* times"):
        Store(f"http://127.0.0.1:{free_port()}", timeout=1).facts("a.tar")


@pytest.mark.parametrize(
    ("host", "why"), [("127.0.0.1:{}", "Connection refused"), ("nowhere.invalid", r"[\w -]*[Nn]ame[\w -]*")]
)
def test_a_server_that_was_never_reached_is_told_at_once(host, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("karat_scale.foundation.stores.FIRST_CONTACT", 1.5)
    url = f"http://{host.format(free_port())}/set"
    trying = rf"{url}(/dataset\.json)?: the connection failed \({why}\)"
    end = r", \d times? in \d s; check the URL and the store"
    run = ("train", "fashion_mnist_demo", f"data.path={url}", "data.backend=webdataset", f"run.dir={tmp_path / 'run'}")
    for command, fix in (
        (("index", url, "--out", str(tmp_path / "out")), end),
        ((*run, "data.timeout=2"), end + r", or raise data\.timeout \(now 2 s\) if it is only slow"),
    ):
        assert karat_here(*command) == 2
        note, error = [line for line in capsys.readouterr().err.splitlines() if "connection failed" in line]
        assert re.fullmatch(rf"note: {trying}; trying for up to 2 s", note)
        assert re.fullmatch(rf"error: {trying}{fix}", error)


def test_a_server_that_was_reached_is_tried_for_longer_than_one_that_never_was(monkeypatch):
    class Once(Answering):
        protocol_version = "HTTP/1.0"  # which closes the connection

        def get(self):
            self._answer(b"here")

    monkeypatch.setattr("karat_scale.foundation.stores.FIRST_CONTACT", 0.1)
    monkeypatch.setattr("karat_scale.foundation.stores.DEFAULT_TIMEOUT", 2)
    with serving(Once) as url:
        reached = Store(url)
        reached.facts("a")
    for store, tries in ((reached, r"[2-9] times in [12] s"), (Store(url), "1 time in 0 s")):
        with pytest.raises(StoreError, match=tries):
            store.facts("a")


def test_a_server_that_states_no_size_is_named(monkeypatch):
    monkeypatch.setattr(Store, "facts", lambda self, name: FileFacts(-1, ""))
    with pytest.raises(StoreError, match=r"dataset\.json: the server does not say how large the file is"):
        Store("http://127.0.0.1:1").read_small("dataset.json", 100)


def test_refused_access_is_not_tried_again_and_no_server_is_named(files, nginx):
    with FaultyProxy(nginx(files), spoil=lambda number, asked: "403") as proxy:
        with pytest.raises(StoreError, match=r"access is refused \(HTTP 403\); check the credentials"):
            Store(proxy.url).read("a.tar", 0, 1000)
        assert len(proxy.requests) == 1
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9/set/a\.tar: the connection failed"):
        Store("http://127.0.0.1:9/set", timeout=1).read("a.tar", 0, 10)


def test_a_server_without_ranges_and_a_missing_library_are_one_line(files, monkeypatch):
    class Whole(Answering):
        def get(self):
            self._answer((files / "a.tar").read_bytes())

    with serving(Whole) as url, pytest.raises(StoreError, match="does not answer requests for a part of a file"):
        Store(url).read("a.tar", 0, 10)
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3:// needs s3fs, which is not installed; .*pip install -e '\.\[remote\]'"):
        Store("s3://bucket/set")


def test_the_cache_tells_tars_of_one_size_apart_where_a_server_gives_no_etag(tmp_path):
    class Ranges(Answering):
        def get(self):
            if self.path == "/":
                return self._answer(b'<a href="train.tar">train.tar</a>', Content_Type="text/html")
            content, asked = (tmp_path / "train.tar").read_bytes(), self.headers.get("Range")
            if not asked:
                return self._answer(content, Accept_Ranges="bytes")
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            self._answer(content[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(content)}")

    def bitmap(number):
        return image(number, "BMP")

    with serving(Ranges) as url:
        for numbers in ((0, 1), (1, 0)):
            members = [(f"{n}.{end}", data) for n in numbers for end, data in (("jpg", bitmap(n)), ("cls", b"%d" % n))]
            write_tar(tmp_path / "train.tar", members)
            assert karat_here("index", url, "--out", str(tmp_path / "index")) == 0
            split = ShardSplit(tmp_path / "index", "train", 2)
            assert [(int(split.labels[at]), split.read(at)) for at in range(2)] == [(n, bitmap(n)) for n in numbers]


# It has its own process: to collect the garbage of all that earlier tests have loaded is not safe after a fork.
FORKED = """
import gc, os, sys
from karat_scale.foundation.stores import Store

store = Store(sys.argv[1], timeout=60)
facts = store.facts("a.tar")
child = os.fork()
if child == 0:
    other = store.facts("a.tar")
    gc.collect()
    os._exit(0 if other == facts else 1)
assert os.waitpid(child, 0)[1] == 0
assert store.facts("a.tar") == facts
"""


def test_another_process_closes_no_connection_of_its_parent(files, nginx):
    """A fork has copies of its parent's connections, and both processes share the epoll that watches the sockets."""
    with FaultyProxy(nginx(files)) as proxy:
        done = run_code(FORKED, proxy.url, environments=[karat_environment()], directory=files)
        assert done.returncode == 0, done.stderr
        assert len(proxy.requests) == 3  # no try was without an answer
