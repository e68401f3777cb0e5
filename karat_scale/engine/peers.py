"""What ranks tell each other beside their collectives, through the store at which they have met.

A rank that fails alone leaves the others in a collective. So it puts its one line into the store before it ends, and
all end with it. Each rank gives a sign of life there, and rank 0 says for which one it waits. Nobody waits longer than
`run.peer_timeout_minutes`.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch.distributed as dist

from karat_scale.errors import PeerError, UserError, of_the_machine, one_line, say_in_one_write
from karat_scale.launcher import LAUNCHER

_POLL_SECONDS = 1.0
_SIGN_SECONDS = 5.0
_FIRST_NOTICE_SECONDS = 30.0
_FIRST_NOTICE_AT_MEETING = 10.0
# What the ranks get to hear of a failure before the one that failed ends, and to end in themselves.
_HEAR_SECONDS, END_SECONDS = 5.0, 30.0
_CALL = timedelta(seconds=10)
_MEETING_POLL_SECONDS = 0.2
_FAILURE, _ARRIVED = "failure", "arrived"


class Place(NamedTuple):
    """Where ranks meet, and who this one is."""

    host: str
    port: int
    rank: int
    size: int
    patience: timedelta
    meeting: int
    """How often this process has met before: a later meeting must not hear of an earlier one's failure."""

    @property
    def is_host(self) -> bool:
        """Whether this rank keeps the store. torchrun keeps one itself."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def connect(self, timeout: timedelta) -> dist.Store:
        """A connection of its own to the store. Raises torch's DistError, or an OSError, after `timeout`."""
        if not self.is_host:  # torch tells of each try with a stack of its own
            socket.create_connection((self.host, self.port), timeout.total_seconds()).close()
        store = dist.TCPStore(
            self.host, self.port, self.size, self.is_host, timeout, wait_for_workers=False, multi_tenant=True
        )
        prefix = f"karat-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{self.meeting}"
        return dist.PrefixStore(prefix, store)


class Notices:
    """Lines on what is waited for, each after twice the time of the one before."""

    def __init__(self, rank: int, patience: timedelta, first: float) -> None:
        self._rank, self._patience = rank, patience
        self._next = first

    def waited(self, seconds: float, whom: Callable[[], str]) -> bool:
        """`whom` has been waited for, which is asked where a line is due; whether that is long enough."""
        if seconds >= self._next:
            self._next = 2 * seconds
            limit = f"at most {self._patience.total_seconds() / 60:g} minutes (run.peer_timeout_minutes)"
            say_in_one_write(f"[rank {self._rank}] has waited {seconds:.0f} s for {whom()}; {limit}")
        return seconds >= self._patience.total_seconds()


def meet(place: Place) -> dist.Store:
    """Wait until all ranks are there, and return the store.

    Raises:
        UserError: one did not come in time, or the port is taken.
        PeerError: the launcher has ended.
    """
    begun, notices = time.monotonic(), Notices(place.rank, place.patience, _FIRST_NOTICE_AT_MEETING)
    at = f"{place.host}:{place.port}"

    def wait(whom: Callable[[], str]) -> None:
        if LAUNCHER.is_gone:
            raise PeerError("the launcher has ended before all ranks had met")
        if notices.waited(time.monotonic() - begun, whom):
            minutes = place.patience.total_seconds() / 60
            raise UserError(f"{whom()} did not come in {minutes:g} minutes (run.peer_timeout_minutes); see why")

    store = None
    while store is None:
        try:
            store = place.connect(min(_CALL, place.patience))
        except (RuntimeError, OSError) as error:
            if place.is_host:
                raise UserError(f"MASTER_PORT = {place.port}: {one_line(error)[:200]}; choose another") from None
            wait(lambda: f"rank 0 at {at}")
            time.sleep(_MEETING_POLL_SECONDS)
    try:
        store.set(_sign_of(place.rank), _sign(0))
        store.add(_ARRIVED, 1)
        while store.add(_ARRIVED, 0) < place.size:
            wait(lambda: f"rank {_absent(store, place.size)} of {place.size} at {at}")
            time.sleep(_MEETING_POLL_SECONDS)
    except RuntimeError as error:
        raise PeerError(f"lost rank 0 at {at} before all ranks had met: {one_line(error)[:200]}") from None
    store.set_timeout(place.patience)  # the group asks it for what a slower rank has yet to put there
    return store


def _absent(store: dist.Store, size: int) -> str:
    absent = [str(rank) for rank in range(size) if not store.check([_sign_of(rank)])]
    return ", ".join(absent[:8]) + (" and others" if len(absent) > 8 else "")


class Peers:
    """The other ranks, seen from this one. A thread with a connection of its own looks after them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._heard: PeerError | UserError | None = None
        self._ended = threading.Event()
        self._store = place.connect(_CALL)
        self._thread = threading.Thread(target=self._look_after, name="peers", daemon=True)
        self._thread.start()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What ends this rank inside the block, the others hear."""
        try:
            with self.explaining():
                yield
        except PeerError:
            raise
        except Exception as error:
            text, code = (str(error), 2) if isinstance(error, UserError) else _described(error)
            self._tell(code, text)
            raise

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """A collective that breaks inside the block raises what ended another rank, in its words."""
        try:
            yield
        except Exception as error:
            if _is_of_a_collective(error):
                raise self._why(error) from error
            raise

    def stop(self) -> None:
        """They are needed no more."""
        self._ended.set()
        self._thread.join(_CALL.total_seconds())

    def _tell(self, code: int, text: str) -> None:
        """Put a failure into the store, and wait until the others have heard of it."""
        if self._heard is not None:
            return
        me, others = self._place.rank, [rank for rank in range(self._place.size) if rank != self._place.rank]
        with suppress(RuntimeError, OSError):
            store = self._place.connect(_CALL)
            store.compare_set(_FAILURE, "", json.dumps({"rank": me, "code": code, "text": text}))
            store.set(_heard_by(me), "")
            store.wait([_heard_by(rank) for rank in others], timedelta(seconds=_HEAR_SECONDS))

    def _why(self, error: Exception) -> Exception:
        """The failure behind a collective that broke, in the words of the rank that failed."""
        deadline = time.monotonic() + 2 * _POLL_SECONDS
        while self._heard is None and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._heard is not None:
            return self._heard
        lost = "the launcher" if LAUNCHER.is_gone else self._who_is_gone()
        return PeerError(f"{lost} has ended without a word ({one_line(error)[:160]})")

    def _who_is_gone(self) -> str:
        """A rank whose process has ended, so far as this machine knows."""
        others = [rank for rank in range(self._place.size) if rank != self._place.rank]
        try:
            store = self._place.connect(_CALL)
            signs = store.multi_get([_sign_of(rank) for rank in others])
        except (RuntimeError, OSError):
            return "rank 0, or the launcher"
        for rank, sign in zip(others, signs, strict=True):
            host, process, _ = sign.decode().rsplit(" ", 2)
            if host == socket.gethostname() and not _lives(int(process)):
                return f"rank {rank} on {host} (process {process})"
        return "another rank"

    def _look_after(self) -> None:
        signs, seen, beat, lost_since = 0, _Seen(self._place), 0.0, None
        notices = Notices(self._place.rank, self._place.patience, _FIRST_NOTICE_SECONDS)
        while not self._ended.wait(_POLL_SECONDS) and self._heard is None:
            now = time.monotonic()
            try:
                if self._store.check([_FAILURE]):
                    self._hear(self._store.get(_FAILURE))
                elif now - beat >= _SIGN_SECONDS:
                    signs, beat = signs + 1, now
                    self._store.set(_sign_of(self._place.rank), _sign(signs))
                    if self._place.rank == 0 and (silent := seen.look(self._store, now)):
                        self._heard = PeerError(silent)
                        self._store.compare_set(_FAILURE, "", json.dumps({"rank": 0, "code": 1, "text": silent}))
                lost_since = None
            except (RuntimeError, OSError):
                lost_since = lost_since or now
                if notices.waited(now - lost_since, lambda: "rank 0 or the launcher, which keeps the store"):
                    self._heard = PeerError("rank 0 or the launcher, which keeps the store, cannot be reached")
                with suppress(RuntimeError, OSError):
                    self._store = self._place.connect(_CALL)
        if self._heard is not None and not self._ended.wait(END_SECONDS):
            say_in_one_write(f"[rank {self._place.rank}] error: {self._heard}")
            os._exit(1 if isinstance(self._heard, PeerError) else 2)

    def _hear(self, content: bytes) -> None:
        failure = json.loads(content)
        self._store.set(_heard_by(self._place.rank), "")
        if failure["rank"] == self._place.rank:
            self._ended.set()
            return
        error = UserError if failure["code"] == 2 else PeerError
        self._heard = error(f"rank {failure['rank']}: {failure['text']}")


class _Seen:
    """When rank 0 last saw each rank's sign of life change."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._last: dict[int, tuple[str, float]] = {}
        self._notices: dict[int, Notices] = {}

    def look(self, store: dist.Store, now: float) -> str:
        """Read all signs; returns what to say of a rank that has been silent for too long, mostly nothing."""
        ranks = range(1, self._place.size)
        for rank, sign in zip(ranks, store.multi_get([_sign_of(rank) for rank in ranks]), strict=True):
            text = sign.decode()
            if rank not in self._last or self._last[rank][0] != text:
                self._last[rank] = (text, now)
                self._notices[rank] = Notices(0, self._place.patience, _FIRST_NOTICE_SECONDS)
                continue
            host, process, _ = text.rsplit(" ", 2)
            whom = f"a sign of rank {rank} on {host} (process {process})"
            if self._notices[rank].waited(now - self._last[rank][1], lambda whom=whom: whom):  # type: ignore[misc]
                return f"gave up after {now - self._last[rank][1]:.0f} s without {whom}"
        return ""


def _sign_of(rank: int) -> str:
    return f"sign-{rank}"


def _heard_by(rank: int) -> str:
    return f"heard-{rank}"


def _sign(number: int) -> str:
    return f"{socket.gethostname()} {os.getpid()} {number}"


def _lives(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def _described(error: Exception) -> tuple[str, int]:
    return of_the_machine(error) or (f"{type(error).__name__}: {one_line(error)}", 1)


def _is_of_a_collective(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors; only their text tells."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "peer" in text))
