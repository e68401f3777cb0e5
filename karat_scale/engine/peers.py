"""How ranks and the launchers of several nodes meet, and what a rank reports when it has lost another.

No rank waits longer than `run.peer_timeout_minutes`, and a waiting rank says which ranks it waits for. When a rank
fails, whatever started the ranks (torchrun's agent, or srun with --kill-on-bad-exit) ends the others.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from karat_scale.engine.heartbeat import START
from karat_scale.foundation.errors import PeerError, UserError, one_line, say_in_one_write
from karat_scale.foundation.machine import LAUNCHER

_FIRST_NOTICE_SECONDS = 10.0
_CALL = timedelta(seconds=10)
_POLL_SECONDS = 0.2
_ARRIVED = "arrived"
CONNECTING = timedelta(minutes=1)
"""The longest time that ranks need to connect over gloo once all of them are there."""


class Place(NamedTuple):
    """The place where ranks or nodes meet, and which of them this one is."""

    host: str
    port: int
    rank: int
    size: int
    patience: timedelta
    meeting: str
    """A name that no other meeting of this start has: a meeting must not find what another one left."""
    check: Callable[[], object] = lambda: None
    """A function to call while waiting for the others; it may raise to give up."""
    kind: str = "rank"

    @property
    def is_host(self) -> bool:
        """Return whether this process keeps the store. torchrun keeps one itself."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def connect(self, timeout: timedelta) -> dist.PrefixStore:
        """Return a new connection to the store. Raises torch's DistError, or an OSError, after `timeout`."""
        if not self.is_host:  # torch prints a stack at each failed try
            socket.create_connection((self.host, self.port), timeout.total_seconds()).close()
        store = dist.TCPStore(
            self.host, self.port, self.size, self.is_host, timeout, wait_for_workers=False, multi_tenant=True
        )
        start = os.environ.get(START, ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore("-".join(("karat", *start, self.meeting)), store)


def meet(place: Place) -> dist.PrefixStore:
    """Wait until all are there, and return the store.

    Raises:
        UserError: one did not come in time, or the port is taken.
        PeerError: the launcher has ended.
    """
    kind, at, patience = place.kind, f"{place.host}:{place.port}", place.patience.total_seconds()
    limit = f"{patience / 60:g} minutes{' (run.peer_timeout_minutes)' if kind == 'rank' else ''}"
    longer = ", or raise run.peer_timeout_minutes" if kind == "rank" else ""
    begun, next_notice = time.monotonic(), _FIRST_NOTICE_SECONDS

    def wait(whom: Callable[[], str]) -> None:
        nonlocal next_notice
        place.check()
        if LAUNCHER.is_gone:
            raise PeerError(f"the launcher has ended before all {kind}s had met")
        waited = time.monotonic() - begun
        if waited >= patience:
            raise UserError(f"{whom()} did not come in {limit}; read its output{longer}")
        if waited >= next_notice:
            next_notice = 2 * waited
            say_in_one_write(f"[{kind} {place.rank}] has waited {waited:.0f} s for {whom()}; at most {limit}")
        time.sleep(_POLL_SECONDS)

    store = None
    while store is None:
        try:
            store = place.connect(min(_CALL, place.patience))
        except (RuntimeError, OSError) as error:
            if place.is_host:
                raise UserError(f"MASTER_PORT = {place.port}: {one_line(error)[:200]}; choose another") from None
            wait(lambda: f"{kind} 0 at {at}")
    try:
        store.set(f"here-{place.rank}", "")
        store.add(_ARRIVED, 1)
        while store.add(_ARRIVED, 0) < place.size:
            wait(lambda: f"{kind} {_absent(store, place.size)} of {place.size} at {at}")
    except RuntimeError as error:
        raise PeerError(f"lost {kind} 0 at {at} before all {kind}s had met: {one_line(error)[:200]}") from None
    store.set_timeout(place.patience)  # the group asks it for what a slower rank has yet to put there
    return store


def _absent(store: dist.Store, size: int) -> str:
    absent = [str(rank) for rank in range(size) if not store.check([f"here-{rank}"])]
    return ", ".join(absent[:8]) + (" and others" if len(absent) > 8 else "")


@contextmanager
def explaining() -> Iterator[None]:
    """Raise PeerError if a collective inside the block breaks because another rank or the launcher has ended."""
    try:
        yield
    except Exception as error:
        if not _tells_of_a_loss(error):
            raise
        lost = "the launcher" if LAUNCHER.is_gone else "another rank"
        raise PeerError(f"{lost} has ended ({one_line(error)[:160]})") from error


def _tells_of_a_loss(error: Exception) -> bool:
    """Return whether an error is from a connection to another process, and not this rank's own."""
    if isinstance(error, RuntimeError) and _OF_GLOO.search(str(error)):  # gloo's are plain; only their text tells
        return True
    if isinstance(error, dist.DistBackendError):  # NCCL's, for a full /dev/shm or GPU, too
        return any(sign in str(error) for sign in ("remote process exited", "aborted", "store->get"))
    return isinstance(error, dist.DistError)


_OF_GLOO = re.compile(r"\[(enforce fail at )?\S*gloo/\S+\.(cc|h):\d+\]|Connection closed by peer \[")
