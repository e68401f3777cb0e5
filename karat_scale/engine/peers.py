"""What ranks tell each other beside their collectives, through the store at which they have met.

A rank that fails alone leaves the others in a collective. So it puts its one line into the store before it ends, and
all end with it. A rank that is killed cannot: the others on its machine see that its process is gone, and tell all.
Each rank gives a sign of life there, and rank 0 says for which one it waits. Nobody waits longer than
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
from pathlib import Path
from typing import NamedTuple

import psutil
import torch.distributed as dist

from karat_scale.foundation.errors import PeerError, UserError, of_the_machine, one_line, say_in_one_write
from karat_scale.foundation.machine import LAUNCHER

_POLL_SECONDS = 1.0
_SIGN_SECONDS = 5.0
_FIRST_NOTICE_SECONDS = 30.0
_FIRST_NOTICE_AT_MEETING = 10.0
# What the ranks get to hear of a failure before the one that failed ends, and to end in themselves.
_HEAR_SECONDS, END_SECONDS = 5.0, 30.0
_CALL = timedelta(seconds=10)
_MEETING_POLL_SECONDS = 0.2
# Keys of the store, beside sign-RANK, process-RANK, heard-RANK and done-RANK.
_FAILURE, _ARRIVED = "failure", "arrived"
_BOOT, _PROCESS_IDS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


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


class Process(NamedTuple):
    """The process of a rank. `machine` tells whose process ids are the same: those of one kernel and one container."""

    host: str
    machine: str
    id: int

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        try:
            machine = f"{_BOOT.read_text().strip()} {_PROCESS_IDS.readlink()}"
        except OSError:  # not Linux
            machine = ""
        return cls(socket.gethostname(), machine, os.getpid())


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
        store.set(f"process-{place.rank}", json.dumps(Process.this()))
        store.set(f"sign-{place.rank}", "0")
        store.add(_ARRIVED, 1)
        while store.add(_ARRIVED, 0) < place.size:
            wait(lambda: f"rank {_absent(store, place.size)} of {place.size} at {at}")
            time.sleep(_MEETING_POLL_SECONDS)
    except RuntimeError as error:
        raise _lost(place, error) from None
    store.set_timeout(place.patience)  # the group asks it for what a slower rank has yet to put there
    return store


def _lost(place: Place, error: Exception) -> PeerError:
    at = f"{place.host}:{place.port}"
    return PeerError(f"lost rank 0 at {at} before all ranks had met: {one_line(error)[:200]}")


def _absent(store: dist.Store, size: int) -> str:
    absent = [str(rank) for rank in range(size) if not store.check([f"process-{rank}"])]
    return ", ".join(absent[:8]) + (" and others" if len(absent) > 8 else "")


class Peers:
    """The other ranks, seen from this one, once all have met. A thread with a connection of its own looks after them.

    Raises:
        PeerError: rank 0, or the launcher, which keeps the store, has ended.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._heard: PeerError | UserError | None = None
        self._ended = threading.Event()
        self._makes_a_group = False
        self._others = [rank for rank in range(place.size) if rank != place.rank]
        try:
            self._store = place.connect(_CALL)
            found = self._store.multi_get([f"process-{rank}" for rank in range(place.size)])
        except (RuntimeError, OSError) as error:
            raise _lost(place, error) from None
        self._processes = [Process(*json.loads(process)) for process in found]
        here = self._processes[place.rank].machine
        self._beside = [rank for rank in self._others if here and self._processes[rank].machine == here]
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

    @contextmanager
    def making_a_group(self) -> Iterator[None]:
        """A rank that hears of a failure inside the block ends soon: it may wait in a call that nothing interrupts."""
        self._makes_a_group = True
        try:
            yield
        finally:
            self._makes_a_group = False

    def say_that_it_is_done(self) -> None:
        """From here on this rank may end without a word."""
        with suppress(RuntimeError, OSError):
            self._place.connect(_CALL).set(f"done-{self._place.rank}", "")

    def stop(self) -> None:
        """They are needed no more."""
        self._ended.set()
        self._thread.join(_CALL.total_seconds())

    def _tell(self, code: int, text: str) -> None:
        """Put a failure into the store, and wait until the others have heard of it."""
        if self._heard is not None:
            return
        with suppress(RuntimeError, OSError):
            store = self._place.connect(_CALL)
            self._put_failure(store, code, text)
            store.set(f"heard-{self._place.rank}", "")
            store.wait([f"heard-{rank}" for rank in self._others], timedelta(seconds=_HEAR_SECONDS))

    def _put_failure(self, store: dist.Store, code: int, text: str) -> None:
        store.compare_set(_FAILURE, "", json.dumps({"rank": self._place.rank, "code": code, "text": text}))

    def _why(self, error: Exception) -> Exception:
        """The failure behind a collective that broke, in the words of the rank that failed."""
        deadline = time.monotonic() + 2 * _POLL_SECONDS
        while self._heard is None and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._heard is not None:
            return self._heard
        if LAUNCHER.is_gone:
            lost = "the launcher"
        elif gone := self._gone():
            lost = self._named(gone[0])
        else:
            lost = "another rank" if self._reaches_the_store() else "rank 0, or the launcher"
        return PeerError(f"{lost} has ended without a word ({one_line(error)[:160]})")

    def _gone(self) -> list[int]:
        """The ranks of this machine whose processes have ended."""
        return [rank for rank in self._beside if not _lives(self._processes[rank].id)]

    def _named(self, rank: int) -> str:
        return f"rank {rank} on {self._processes[rank].host} (process {self._processes[rank].id})"

    def _reaches_the_store(self) -> bool:
        with suppress(RuntimeError, OSError):
            return self._place.connect(_CALL).check(["process-0"])
        return False

    def _look_after(self) -> None:
        signs, seen, beat, lost_since = 0, _Seen(self._place, self._named), 0.0, None
        notices = Notices(self._place.rank, self._place.patience, _FIRST_NOTICE_SECONDS)
        while not self._ended.wait(_POLL_SECONDS) and self._heard is None:
            now, failure = time.monotonic(), ""
            try:
                if self._store.check([_FAILURE]):
                    self._hear(self._store.get(_FAILURE))
                elif gone := [rank for rank in self._gone() if not self._store.check([f"done-{rank}"])]:
                    failure = f"{self._named(gone[0])} has ended without a word"
                elif now - beat >= _SIGN_SECONDS:
                    signs, beat = signs + 1, now
                    self._store.set(f"sign-{self._place.rank}", str(signs))
                    failure = seen.look(self._store, now) if self._place.rank == 0 else ""
                if failure:
                    self._heard = PeerError(failure)
                    self._put_failure(self._store, 1, failure)
                lost_since = None
            except (RuntimeError, OSError):
                lost_since = lost_since or now
                if notices.waited(now - lost_since, lambda: "rank 0 or the launcher, which keeps the store"):
                    self._heard = PeerError("rank 0 or the launcher, which keeps the store, cannot be reached")
                with suppress(RuntimeError, OSError):
                    self._store = self._place.connect(_CALL)
        if self._heard is not None:
            self._end_with(self._heard)

    def _end_with(self, heard: PeerError | UserError) -> None:
        """End this process, unless it ends by itself soon."""
        begun = time.monotonic()
        while not self._ended.wait(_POLL_SECONDS):
            if time.monotonic() - begun > (_HEAR_SECONDS if self._makes_a_group else END_SECONDS):
                say_in_one_write(f"[rank {self._place.rank}] error: {heard}")
                os._exit(1 if isinstance(heard, PeerError) else 2)

    def _hear(self, content: bytes) -> None:
        failure = json.loads(content)
        self._store.set(f"heard-{self._place.rank}", "")
        if failure["rank"] == self._place.rank:
            self._ended.set()
            return
        error = UserError if failure["code"] == 2 else PeerError
        self._heard = error(f"rank {failure['rank']}: {failure['text']}")


class _Seen:
    """When rank 0 last saw each rank's sign of life change."""

    def __init__(self, place: Place, named: Callable[[int], str]) -> None:
        self._place, self._named = place, named
        self._last: dict[int, tuple[str, float]] = {}
        self._notices: dict[int, Notices] = {}

    def look(self, store: dist.Store, now: float) -> str:
        """Read all signs; returns what to say of a rank that has been silent for too long, mostly nothing."""
        ranks = range(1, self._place.size)
        for rank, sign in zip(ranks, store.multi_get([f"sign-{rank}" for rank in ranks]), strict=True):
            text = sign.decode()
            if rank not in self._last or self._last[rank][0] != text:
                self._last[rank] = (text, now)
                self._notices[rank] = Notices(0, self._place.patience, _FIRST_NOTICE_SECONDS)
                continue
            whom = f"a sign of {self._named(rank)}"
            if self._notices[rank].waited(now - self._last[rank][1], lambda whom=whom: whom):  # type: ignore[misc]
                return f"gave up after {now - self._last[rank][1]:.0f} s without {whom}"
        return ""


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
