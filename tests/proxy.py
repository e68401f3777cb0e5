"""A proxy that stands between a client and a real server, counts what passes, and spoils some answers."""

import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

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
    """Passes requests on to a server on this machine.

    spoil: from the request's number and itself to what is done to its answer. latency: seconds before each answer.
    """

    upstream: int
    latency: float = 0.0
    spoil: Callable[[int, Asked], Fault | None] = lambda number, asked: None
    requests: list[Asked] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> "FaultyProxy":
        proxy, self._ending = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):  # the client gave up
                    self.close_connection = True

            def pass_on(self) -> None:
                proxy.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, suffix: str = ".tar") -> list[Asked]:
        """The requests for parts of files with this suffix."""
        return [asked for asked in self.requests if asked.method == "GET" and asked.path.endswith(suffix)]

    def answer(self, client: BaseHTTPRequestHandler) -> None:
        asked = Asked(client.command, client.path.partition("?")[0], client.headers.get("Range", ""))
        self.requests.append(asked)
        fault = self.spoil(len(self.requests) - 1, asked)
        body = client.rfile.read(int(client.headers.get("Content-Length", 0)))
        time.sleep(self.latency)
        if fault == "stall":
            self._ending.wait()
            client.close_connection = True
            return
        if fault == "slow":
            self._ending.wait(1.0)
        if fault in ("503", "403"):
            client.send_response(int(fault))
            client.send_header("Content-Length", "0")
            client.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream)
        try:
            kept = {name: value for name, value in client.headers.items() if name.lower() not in HOP_BY_HOP}
            upstream.request(client.command, client.path, body, kept)
            self._relay(upstream.getresponse(), client, fault)
        finally:
            upstream.close()

    def _relay(self, response: http.client.HTTPResponse, client: BaseHTTPRequestHandler, fault: Fault | None) -> None:
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
