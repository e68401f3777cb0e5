"""Servers on loopback: one that a test programs, a proxy that spoils answers, and nginx, S3 and Google's storage."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from tests.conftest import free_port, wait_until


class Answering(BaseHTTPRequestHandler):
    """The base of a handler that prints nothing. It has a method `get`, `put`, ... for each method that it answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        getattr(self, self.command.lower())()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def head(self) -> None:
        self.get()

    def get(self) -> None:
        raise NotImplementedError

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        """Answer with bytes, or with anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client gave up
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(handler: type[Answering], **attributes: Any) -> Iterator[str]:
    """Run a server with handlers that have these attributes; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Fault = Literal["503", "cut", "short", "slow", "stall", "403", "flip"]
HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive")


@dataclass
class Asked:
    """One request: its method, path and Range."""

    method: str
    path: str
    range: str


@dataclass
class FaultyProxy:
    """A proxy that passes requests on to a server on this machine.

    Attributes:
        upstream: the port of the server.
        latency: the seconds before each answer.
        spoil: a function that takes a request's number and the request, and returns the fault of the answer, if any.
    """

    upstream: int
    latency: float = 0.0
    spoil: Callable[[int, Asked], Fault | None] = lambda number, asked: None
    requests: list[Asked] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> "FaultyProxy":
        self._ending = threading.Event()
        self._running = serving(_PassingOn, proxy=self)
        self.url = self._running.__enter__()
        self.port = int(self.url.rpartition(":")[2])
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._running.__exit__(None, None, None)

    def gets(self, suffix: str = ".tar") -> list[Asked]:
        """Return the GET requests for files with this suffix."""
        return [asked for asked in self.requests if asked.method == "GET" and asked.path.endswith(suffix)]

    def answer(self, client: Answering) -> None:
        asked = Asked(client.command, client.path.partition("?")[0], client.headers.get("Range", ""))
        self.requests.append(asked)
        fault = self.spoil(len(self.requests) - 1, asked)
        body = client._body()
        time.sleep(self.latency)
        if fault == "stall":
            self._ending.wait()
            client.close_connection = True
            return
        if fault == "slow":
            self._ending.wait(1.0)
        if fault in ("503", "403"):
            client._answer(b"", int(fault))
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream)
        try:
            kept = {name: value for name, value in client.headers.items() if name.lower() not in HOP_BY_HOP}
            upstream.request(client.command, client.path, body, kept)
            self._relay(upstream.getresponse(), client, fault)
        finally:
            upstream.close()

    def _relay(self, response: http.client.HTTPResponse, client: Answering, fault: Fault | None) -> None:
        data = response.read()
        length = response.headers.get("Content-Length", str(len(data)))
        if fault == "short" and data:
            data = data[: len(data) // 2]
            length = str(len(data))
        if fault == "flip":  # in another way each time
            flipped = len(self.requests) % 255 + 1
            data = bytes(byte ^ flipped if place % 50 == 0 else byte for place, byte in enumerate(data))
        client.send_response(response.status)
        for name, value in response.headers.items():
            if name.lower() not in (*HOP_BY_HOP, "content-length", "date", "server"):
                client.send_header(name, value)
        client.send_header("Content-Length", length)
        client.end_headers()
        if fault == "cut":
            data = data[: len(data) // 2]
            client.close_connection = True
        client.wfile.write(data)
        client.wfile.flush()
        self.sent += len(data)


class _PassingOn(Answering):
    proxy: FaultyProxy

    def get(self) -> None:
        self.proxy.answer(self)

    head = put = post = delete = get


BUCKET = "images"


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Yield a function that serves a directory by nginx, with pages that list it, and returns the port.

    If `certificate` is given, a file with the certificate and its key, nginx serves https.
    """
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    running: list[subprocess.Popen[bytes]] = []

    def serve(directory: Path, certificate: Path | None = None) -> int:
        home, port = tmp_path / f"nginx{len(running)}", free_port()
        home.mkdir()
        paths = "".join(
            f"{name}_temp_path {home / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        secure = f" ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate}" if certificate else ""
        (home / "nginx.conf").write_text(
            f"""daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
events {{}}
http {{ access_log off; {paths}
  server {{ listen 127.0.0.1:{port}{secure}; root {directory}; autoindex on; }} }}
"""
        )
        command = [program, "-p", str(home), "-e", f"{home}/error.log", "-c", f"{home}/nginx.conf"]
        running.append(subprocess.Popen(command))
        wait_for(port)
        return port

    yield serve
    for process in running:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    """Wait until a server listens."""

    def listens() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    wait_until(listens, what=f"port {port}")


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Run an S3 server for the session; yield its port."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e '.[dev]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that puts a directory into a bucket of its own and returns its URL.

    If `port` is given, clients use the server at that port, such as a proxy.
    """
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3
    from s3fs import S3FileSystem

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")
    made: list[str] = []

    def put(directory: Path, port: int | None = None) -> str:
        bucket = f"{BUCKET}-{threading.get_native_id()}-{time.monotonic_ns()}"
        client.create_bucket(Bucket=bucket)
        made.append(bucket)
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                client.upload_file(str(file), bucket, f"set/{file.relative_to(directory)}")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port or s3_port}")
        S3FileSystem.clear_instance_cache()  # which has connections to another endpoint
        return f"s3://{bucket}/set"

    return put


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Yield a function that puts a directory into a bucket of an emulator of Google's storage and returns its URL."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e '.[remote]'")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install -e '.[dev]'")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    wait_for(port)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(__import__("fsspec.config").config.conf, "gs", {"token": "anon"})

    def put(directory: Path) -> str:
        for file in directory.rglob("*"):
            if file.is_file():
                name = quote(f"set/{file.relative_to(directory)}", safe="")
                where = f"http://127.0.0.1:{port}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
                with urlopen(Request(where, file.read_bytes(), {"Content-Type": "application/octet-stream"})):
                    pass
        return f"gs://{BUCKET}/set"

    yield put
    server.stop()
