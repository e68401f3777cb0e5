"""A run's copy at `checkpoint.url`: read when the run starts, and updated while it trains.

A start checks who owns the files there, and fetches those that the run's directory lacks. While the run trains, a
thread of rank 0 copies, and training never waits for it. It makes the URL like the run's directory: it copies what is
missing there, the best and the newest checkpoint first, and removes what the run does not keep. So the next copy, or
the next start, makes up for one that failed or was cut off.

All ranks wait for what rank 0 does with a store, which may be slow. The URL holds the files that the run needs
elsewhere, its checkpoints, and its owner.

URL/
  owner.json       the run's id and name, and which start of it writes here
  recipe.yaml ...  the files of COPIED in run_directory.py
  checkpoints/     see checkpoint/remote.py
"""

import json
import math
import secrets
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Protocol

from pydantic import TypeAdapter

from karat_scale.checkpoint.remote import OnBytes, RemoteCheckpoints
from karat_scale.checkpoint.store import PINNED, holding
from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.foundation.errors import EXIT_LOST_PEER, EXIT_STOPPED, RecipeError, RunDirectoryError, one_line
from karat_scale.foundation.files import commit_file, name_in_errors, read_text, replace_file, temporary_file
from karat_scale.foundation.machine import Background
from karat_scale.foundation.stores import DEFAULT_TIMEOUT, MissingFileError, StoreError, WritableStore
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.loading import differing_keys, load_run_recipe
from karat_scale.training.agreement import StoppedError, StopSignals
from karat_scale.training.run_directory import COPIED, FIXED, RunDirectory, describe_keys

_POLL_SECONDS = 1.0


class Work(Protocol):
    """Work of rank 0 in a thread. `moved` grows while the store takes or gives something."""

    moved: int

    def wait(self, seconds: float) -> bool:
        """Wait for its end; return whether it has come."""


def follow(
    world: World, work: Work | None, beat: Callable[[], object], is_late: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until rank 0's work is done, or late; return whether it is done. Collective.

    While the work moves, each rank calls `beat`, so that nobody takes a slow store for a hang.
    """
    seen = -1
    while True:
        told = (work.wait(_POLL_SECONDS), work.moved, is_late()) if work is not None else (False, 0, False)
        is_done, moved, is_over = world.broadcast(told)
        if moved != seen:
            seen = moved
            beat()
        if is_done or is_over:
            return is_done


_OWNER, _ID = "owner.json", "run_id"
_OWNER_BYTES, _HEAD_BYTES = 65536, 2**20


@dataclass(frozen=True)
class Owner:
    """The run, and the start of it, that writes at a URL. `start` is different for each start of the run."""

    run: str
    name: str
    start: str
    host: str
    time: float


class RunUrl:
    """Reads and writes a run at a URL. Each method that asks the store raises StoreError."""

    def __init__(self, url: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._store = WritableStore(url, timeout)
        self.url = self._store.url
        self.checkpoints = RemoteCheckpoints(self._store)
        self._sent: dict[str, tuple[int, int]] = {}
        self._mine: Owner | None = None

    def owner(self) -> Owner | None:
        """The owner of the files; None if there is no run.

        Raises:
            RunDirectoryError: the owner file is damaged.
        """
        try:
            return TypeAdapter(Owner).validate_json(self._store.read_small(_OWNER, _OWNER_BYTES), strict=True)
        except MissingFileError:
            return None
        except ValueError:
            raise RunDirectoryError(f"{self._store.where(_OWNER)} is damaged; remove it, or use another URL") from None

    def take(self, run: str, name: str) -> None:
        """Become the owner: an earlier start of the run copies nothing more."""
        self._mine = Owner(run, name, secrets.token_hex(8), socket.gethostname(), round(time.time(), 3))
        self._store.write(_OWNER, (json.dumps(asdict(self._mine)) + "\n").encode())

    def check_mine(self) -> None:
        """Raise RunDirectoryError if another start writes here by now."""
        if (owner := self.owner()) != self._mine:
            who = f"run {owner.name} on {owner.host}" if owner else "its owner.json is gone"
            raise RunDirectoryError(f"{self.url} was taken over by another start ({who}); stop one of the two starts")

    def upload_files(self, run: Path, on_bytes: OnBytes) -> None:
        """Copy the run's own files that have changed since the last call. Raises OSError, too."""
        found = (path for pattern in COPIED for path in sorted(run.glob(pattern)) if path.is_file())
        for name, path in ((path.relative_to(run).as_posix(), path) for path in found):
            facts = path.stat()
            mark = facts.st_size, facts.st_mtime_ns
            if not _is_own(name) or self._sent.get(name) == mark:
                continue
            if path.suffix != FIXED:
                data = path.read_bytes()  # of a log, whole lines
                self._store.write(name, data[: data.rfind(b"\n") + 1] if path.suffix == ".jsonl" else data)
            elif not self._has(name, path):
                self._store.put(name, path, on_bytes)
            self._sent[name] = mark

    def download_files(self, run: Path, on_bytes: OnBytes) -> None:
        """Copy the run's own files to its directory, in place of those there. Raises OSError, too."""
        for name, facts in self._store.files().items():
            if not _is_own(name):
                continue
            path = run / name
            path.parent.mkdir(exist_ok=True)
            with name_in_errors(path), temporary_file(path) as temporary:
                with temporary.open("wb") as file:
                    for piece in self._store.pieces(name, facts.bytes):
                        on_bytes(file.write(piece))
                commit_file(temporary, path)

    def read_recipe(self, to: Path) -> bool:
        """Copy only the recipe to a file; return whether there is one."""
        try:
            data = self._store.read_small("recipe.yaml", 2**20)
        except MissingFileError:
            return False
        to.write_bytes(data)
        return True

    def _has(self, name: str, path: Path) -> bool:
        """Return whether the file there is like the one here in size and in its head, which has a recipe or digest."""
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        try:
            is_as_long = self._store.facts(name).bytes == path.stat().st_size
            return is_as_long and self._store.read(name, 0, len(head)) == head
        except MissingFileError:
            return False


def run_id(run: Path) -> str:
    """The id of the run in a directory; empty if it has none. Raises OSError."""
    try:
        return read_text(run / _ID, 256).strip()
    except FileNotFoundError:
        return ""


def keep_run_id(run: Path, name: str) -> None:
    """Record the id of a run in its directory. Raises OSError."""
    if run_id(run) != name:
        replace_file(run / _ID, f"{name}\n")


def _is_own(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return ".." not in parts and any(
        name.count("/") == pattern.count("/") and not parts[-1].startswith(".") and fnmatchcase(name, pattern)
        for pattern in COPIED
    )


# How long the last copy may take, by exit code. A job's signal comes two minutes before its end; after another rank's
# error, the launcher ends this one sooner.
COPY_SECONDS = {0: math.inf, EXIT_STOPPED: 60.0, 2: 20.0, 1: 5.0, EXIT_LOST_PEER: 5.0}
_SOON = 1.0


class RunCopy:
    """The thread that copies; see the module.

    Args:
        url: the URL, which this start owns.
        notes: the first lines that `messages` returns.
    """

    def __init__(self, url: RunUrl, directory: RunDirectory, keep_last: int, notes: list[str]) -> None:
        self._url, self._directory, self._keep_last = url, directory, keep_last
        self._changed = threading.Condition()
        self._asked = self._handled = 0
        self._is_last = self._is_over = False
        self._problem = ""
        self._copied: str | None = None
        self._notes = deque(notes)
        self.moved = 0
        """The number of bytes that the store has taken."""

    def begin(self) -> None:
        """Start the thread, which first copies what is missing."""
        self._directory.store.on_change = self.wake
        threading.Thread(target=self._work, name="copy", daemon=True).start()
        self.wake()

    def wake(self) -> None:
        """Copy again: something has changed in the directory. Any thread may call it."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until the URL is like the directory, or the copy has failed; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._handled == self._asked, seconds)

    def ask_last(self) -> None:
        """Copy the end of the run; `end` reports its failure."""
        self._is_last = True
        self.wake()
        if not self.wait(_SOON):
            self._notes.append(f"waiting for the last copy to {self._url.url}")

    def end(self) -> None:
        """Copy nothing more, and report in one line if something is missing. No save may be under way."""
        with self._changed:
            if self._handled != self._asked:
                self._problem = self._problem or "there was no time to finish it"
            self._is_over = True
            self._changed.notify_all()
        if self._problem:
            self._notes.append(
                f"warning: the last copy to {self._url.url} is not complete: {self._problem}; the next start copies "
                "what is missing"
            )
        self._keep_outcome()
        # Saves have left alone what was being copied.
        self._notes.extend(f"warning: {problem}" for problem in self._directory.store.retain(self._keep_last))

    def messages(self) -> list[str]:
        """Return the new lines since the last call."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._handled or self._is_over)
                if self._is_over:
                    return
                asked = self._asked
            problem = self._copy()
            with self._changed:
                if self._is_over:
                    return
                if problem not in ("", self._problem) and not self._is_last:
                    self._notes.append(f"warning: not copied: {problem}; the next save tries again")
                self._problem, self._handled = problem, asked
                self._keep_outcome()
                self._changed.notify_all()

    def _copy(self) -> str:
        """Make the URL like the directory; returns what prevents that, in a few words."""
        store, remote = self._directory.store, self._url.checkpoints
        problems: list[str] = []
        try:
            self._url.check_mine()
            # Before the log is sent, which then has the lines of their steps.
            names = [name for name in store.names() if name not in store.passed_over]
            self._url.upload_files(self._directory.path, self._count)
            remote.look()
            # The best one first: the state of a newer one names it.
            for name in sorted(names, key=lambda name: name != store.pointed("best")):
                with holding(store.root / name) as is_there:
                    if is_there and (problem := self._upload(name)):
                        problems.append(problem)
                    elif not is_there and name in store.names():
                        problems.append(f"{store.root / name} cannot be read")
            for pointer in ("best", "latest"):
                if (pointed := store.pointed(pointer)) is not None and pointed in remote.names():
                    remote.point(pointer, [pointed])
            remote.point(PINNED, remote.pinned() | set(store.pinned()))
            self._url.check_mine()
            damaged = store.passed_over | remote.damaged
            remote.retain(self._keep_last, damaged)
            self._copied = next((name for name in remote.names() if name not in damaged), None)
        except Exception as error:  # whatever it is, training goes on
            problems.append(one_line(error))
        return "; ".join(problems)

    def _upload(self, name: str) -> str | None:
        try:
            self._url.checkpoints.upload(self._directory.store, name, self._count, self._url.check_mine)
        except (OSError, ValueError) as error:  # of this checkpoint; others may be good
            return one_line(error) if name in self._directory.store.names() else None
        return None

    def _count(self, size: int) -> None:
        self.moved += size

    def _keep_outcome(self) -> None:
        """Write the outcome for `karat status`."""
        outcome = {"url": self._url.url, "checkpoint": self._copied, "problem": self._problem, "time": time.time()}
        with suppress(OSError):
            replace_file(self._directory.copy_file, json.dumps(outcome) + "\n")


def finish_copy(copy: RunCopy | None, world: World, reporter: Reporter, signals: StopSignals, code: int) -> None:
    """Wait for the copy of a run's end, for as long as the run's exit code allows. Collective.

    Args:
        copy: rank 0's copy; None on other ranks.
    """
    if copy is None and world.size == 1:  # another rank than 0, which is alone here
        return
    limits = [time.monotonic() + COPY_SECONDS[code]]

    def is_late() -> bool:
        now = time.monotonic()
        if signals.received is not None and len(limits) == 1:
            limits.append(now + COPY_SECONDS[EXIT_STOPPED])
        return now > min(limits)

    if copy is not None:
        copy.ask_last()
    reporter.tell_of_others()
    follow(world, copy, lambda: reporter.beat("copying"), is_late)
    if copy is not None:
        copy.end()
    reporter.tell_of_others()


def open_copy(recipe: RunRecipe, world: World, directory: RunDirectory, signals: StopSignals) -> RunCopy | None:
    """Take `checkpoint.url` for this start, and bring a newer checkpoint from there; the directory is claimed.

    Collective. Returns the `RunCopy`, on rank 0 only; None without `checkpoint.url`.

    Raises:
        StoppedError: a signal asked to stop.
        RunDirectoryError: the files there are another run's, or the store does not answer.
    """
    if not recipe.checkpoint.url:
        return None
    heartbeat = directory.start_heartbeat(world)
    try:
        start = _Start(recipe, directory) if world.is_main else None
        if not follow(world, start, lambda: heartbeat.beat("fetching"), lambda: signals.received is not None):
            raise StoppedError
        with world.together():
            return start.result() if start is not None else None
    finally:
        heartbeat.stop()


class _Start(Background[RunCopy]):
    """Rank 0's part of `open_copy`, in a thread."""

    def __init__(self, recipe: RunRecipe, directory: RunDirectory) -> None:
        self.moved = 0
        super().__init__(lambda: _begin(recipe, directory, self._count))

    def _count(self, size: int) -> None:
        self.moved += size


def _begin(recipe: RunRecipe, directory: RunDirectory, on_bytes: OnBytes) -> RunCopy:
    checkpoint = recipe.checkpoint
    try:
        url = RunUrl(checkpoint.url, checkpoint.timeout)
        _take(recipe, directory, url)
        notes = _bring(recipe, directory, url, on_bytes)
    except StoreError as error:
        kept = directory.store.pointed("latest")
        way = f"resume from {kept}, the newest in run.dir," if kept else "train from the beginning"
        raise RunDirectoryError(
            f"checkpoint.url: {error}; fix that, or {way} without a copy by checkpoint.url="
        ) from None
    return RunCopy(url, directory, checkpoint.keep_last, notes)


def _take(recipe: RunRecipe, directory: RunDirectory, url: RunUrl) -> None:
    """Let this start write at the URL, if the run there is this one or there is none."""
    mine, owner = run_id(directory.path), url.owner()
    url.checkpoints.look()
    there = url.checkpoints.names()
    if owner is None and there:
        raise RunDirectoryError(
            f"checkpoint.url = {url.url} has an unknown run's checkpoints; use another checkpoint.url"
        )
    if owner is not None and (other := _difference(recipe, directory, url, owner, mine)):
        raise RunDirectoryError(
            f"checkpoint.url = {url.url} belongs to another run, {owner.name} ({other}); use another checkpoint.url"
        )
    if there and recipe.resume.mode == "never":
        raise RunDirectoryError(
            f"checkpoint.url = {url.url} has checkpoints and resume.mode = never; choose another checkpoint.url or use "
            "resume.mode=auto"
        )
    name = owner.run if owner is not None else mine or secrets.token_hex(8)
    keep_run_id(directory.path, name)
    url.take(name, recipe.run.name)


def _difference(recipe: RunRecipe, directory: RunDirectory, url: RunUrl, owner: Owner, mine: str) -> str:
    """Return why the run at a URL is not this one; empty if it is.

    A directory without an id may be a new one of that run.
    """
    if mine:
        return "" if mine == owner.run else f"run.dir = {directory.path} has another run_id"
    if directory.store.names():
        return f"run.dir = {directory.path} has checkpoints that were never copied there"
    if owner.name != recipe.run.name:
        return f"run.name = {recipe.run.name}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        if not url.read_recipe(file):
            return ""
        try:
            theirs = load_run_recipe(file, (), type(recipe))
        except RecipeError as error:
            said = str(error).replace(str(file), f"checkpoint.url = {url.url}: recipe.yaml")
            raise RecipeError(f"{said}; fix it, or use another checkpoint.url") from None
    keys = [key for key in differing_keys(theirs, recipe, recipe.resume.allow) if key != "train.epochs"]
    return describe_keys(theirs, recipe, keys)


def _bring(recipe: RunRecipe, directory: RunDirectory, url: RunUrl, on_bytes: OnBytes) -> list[str]:
    """Copy the newest intact checkpoint that is newer than the directory's, and the best one; returns lines."""
    store, remote = directory.store, url.checkpoints
    there = remote.names()
    newest = store.newest_intact(lambda *_: on_bytes(1)) if there else ""
    newer = [name for name in there if name > newest]
    if newer:
        url.download_files(directory.path, on_bytes)
    notes = []
    for name in newer:
        damage = remote.download(name, store, on_bytes)
        if damage is None:
            store.point("latest", name)
            notes.append(f"{name} and the log were fetched from {url.url}")
            break
        notes.append(f"warning: checkpoint {name} at {url.url} cannot be used: {damage}; trying the one before")
    else:
        if newer and not store.names():
            raise RunDirectoryError(
                f"checkpoint.url = {url.url} has no checkpoint that can be used ({damage}); choose another "
                "checkpoint.url to start from the beginning"
            )
    if recipe.checkpoint.keep_best:
        notes += _bring_best(directory, url, on_bytes, bool(newer))
    return notes


def _bring_best(directory: RunDirectory, url: RunUrl, on_bytes: OnBytes, has_newer: bool) -> list[str]:
    """Copy the best checkpoint of the newest state here, if only the URL has it: an earlier start was cut off.

    If newer ones came from there, also copy the one that `best` names there: a kill may have come in between.
    """
    store, remote, notes = directory.store, url.checkpoints, []
    with suppress(*(() if has_newer else (OSError,))):
        pointed = remote.pointed("best") if has_newer else None
        best = {pointed, store.best_by_state()}
        for name in [name for name in remote.names() if name in best and name not in store.names()]:
            if (damage := remote.download(name, store, on_bytes)) is not None:
                notes.append(f"warning: the best checkpoint, {name}, cannot be used at {url.url}: {damage}")
            elif not has_newer:
                store.point("best", name)
                notes.append(f"{name}, the best checkpoint, was fetched from {url.url}")
        if pointed is not None and pointed in store.names():
            store.point("best", pointed)
    return notes
