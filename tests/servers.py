"""Servers on loopback, as fixtures: nginx, moto's S3 server, an emulator of Google's."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from tests.conftest import free_port

BUCKET = "images"


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[[Path], int]]:
    """Serves a directory by nginx, with pages that list it; returns the port. `certificate`: of https, with its key."""
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
    """Until a server listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server for the session."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install -e '.[dev]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a directory into a bucket of its own; returns its URL. `port`: of the server that clients are to use."""
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
    """Puts a directory into a bucket of a server that speaks Google's protocol; returns its URL."""
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
