"""Follow a run's files and tell one tracker what is new: a process beside the training, or one of `karat track`.

Its standard input is a pipe. When that ends, the trainer has ended, however it did: what is left is sent, and this
process ends. Lines on standard output are for the person. What libraries print goes nowhere.

Exit code 0: the tracker has everything. 1: it has not. The last line is `FAREWELL`: a library may end the process, too.
"""

import fcntl
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from karat_scale.errors import on_one_line, one_line
from karat_scale.files import append_to, make_folder, parse_json, read_text
from karat_scale.recipe.files import read_run_recipe
from karat_scale.recipe.loading import leaves
from karat_scale.tables import load
from karat_scale.tracking.cursor import FILES, Cursor, cursor_file, how_to_send
from karat_scale.tracking.tracker import Event, TrackedRun, Tracker
from karat_scale.versions import library_versions

FAREWELL = "\x04\n"
POLL_SECONDS = 1.0
_FIRST_RETRY, _LAST_RETRY = 5.0, 300.0
_PROGRESS_SECONDS = 10.0
# Sent when they are there: of the run, and of `karat analyze`.
_DOCUMENTS = ("recipe.yaml", "summary.json", "analysis/**/*.html", "analysis/**/*.png", "analysis/**/*.json")

Say = Callable[[str], None]


class Follower:
    """Brings one tracker up to date. Where it fails, the next call goes on after the last piece that was sent."""

    def __init__(self, run: Path, name: str, place: str, say: Say) -> None:
        self._run, self._place, self._say = run, place, say
        self._file = cursor_file(run, name)
        self._cursor = Cursor.load(self._file)
        self._tracker: Tracker | None = None
        self._told = 0.0

    def advance(self) -> None:
        """Send the events that are new."""
        tracker = self._open()
        self._told = time.monotonic()
        for name in FILES:
            file = self._run / name
            while True:
                events, after = self._cursor.take(file)
                if after.offsets[name] == self._cursor.offsets.get(name, 0):
                    break
                if events:
                    tracker.write(events)
                self._keep(after)
                self._tell_progress(file)

    def finish(self) -> None:
        """Send what the run has left, once it has ended."""
        self.advance()
        summary = _read_mapping(self._run / "summary.json")
        self._upload(_documents(self._run, with_checkpoints=summary.get("exit") == 0))
        self._open().close(summary)
        self._tracker = None

    def drop(self) -> None:
        """Give up a tracker that has failed; the next call makes another one."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(Exception):
                tracker.close({})

    def _open(self) -> Tracker:
        if self._tracker is None:
            self._keep(self._cursor)  # another start must find the id, however this one ends
            tracker: Tracker = load(self._place)(_tracked(self._run, self._cursor.id))
            self._tracker = tracker
            arrived = getattr(tracker, "steps", None)
            if arrived is not None:  # read from the start, and pass over what has arrived
                self._keep(self._cursor.back_to(arrived))
            if tracker.url:
                self._say(f"the run is at {tracker.url}")
            self._upload(_documents(self._run, with_checkpoints=False))
        return self._tracker

    def _upload(self, files: Sequence[Path]) -> None:
        for file in files:
            name, status = str(file.relative_to(self._run)), file.stat()
            print_of = f"{status.st_size} {status.st_mtime_ns}"
            if self._cursor.sent.get(name) != print_of:
                assert self._tracker is not None
                self._tracker.upload(file, name)
                self._cursor.sent[name] = print_of
                self._keep(self._cursor)

    def _keep(self, cursor: Cursor) -> None:
        cursor.save(self._file)
        self._cursor = cursor

    def _tell_progress(self, file: Path) -> None:
        left = file.stat().st_size - self._cursor.offsets[file.name]
        now = time.monotonic()
        if left > 0 and now - self._told > _PROGRESS_SECONDS:
            self._told = now
            self._say(f"{left / 1e6:.1f} MB of {file.name} are left to send")


def _tracked(run: Path, identifier: str) -> TrackedRun:
    recipe = read_run_recipe(run / "recipe.yaml")
    name, project = (recipe.get(section, {}).get(key, "") for section, key in (("run", "name"), ("log", "project")))
    directory = run.resolve().name
    settings = {
        **dict(leaves(recipe)),
        **{f"versions.{library}": version for library, version in library_versions().items()},
    }
    return TrackedRun(
        identifier, name if name == directory else f"{name} {directory}", project, run.absolute(), settings
    )


def _documents(run: Path, with_checkpoints: bool) -> list[Path]:
    patterns = list(_DOCUMENTS)
    if with_checkpoints and _read_log_section(run).get("track_checkpoints"):
        names = {_pointed(run / "checkpoints" / pointer) for pointer in ("latest", "best")} - {""}
        patterns += [f"checkpoints/{name}/*" for name in sorted(names)]
    inside = run.resolve()  # a run of somebody else's may link to files of ours
    found = [file for pattern in patterns for file in sorted(run.glob(pattern)) if file.is_file()]
    return [file for file in found if file.resolve().is_relative_to(inside)]


def _read_log_section(run: Path) -> Mapping[str, Any]:
    section = read_run_recipe(run / "recipe.yaml").get("log")
    return section if isinstance(section, dict) else {}


def _pointed(pointer: Path) -> str:
    with suppress(OSError, ValueError):
        name = read_text(pointer, 4096).strip()
        return name if re.fullmatch(r"step-\d+", name) else ""
    return ""


def _read_mapping(file: Path) -> Event:
    with suppress(OSError, ValueError):
        content = parse_json(read_text(file))
        return content if isinstance(content, dict) else {}
    return {}


def follow(follower: Follower, ended: threading.Event, say: Say, hint: str) -> int:
    """Keep the tracker up to date until the trainer has ended; returns the exit code.

    A failure is told once, and tried again after a while. After the trainer's end there is one more try; `hint` says
    what to do if it fails.
    """
    problem, retry = "", _FIRST_RETRY
    while True:
        is_last = ended.is_set()  # asked before: what the trainer wrote until then is sent
        try:
            follower.finish() if is_last else follower.advance()
        except Exception as error:  # of any kind: a tracker is another's library, often behind a network
            follower.drop()
            now = one_line(error).rstrip(".")
            if is_last:
                say(f"warning: has not got everything ({now}); {hint}")
                return 1
            if ended.is_set():
                continue
            if now != problem:
                problem = now
                say(f"warning: gets no figures for now ({problem}); they stay in metrics.jsonl, and it tries again")
            ended.wait(retry)
            retry = min(2 * retry, _LAST_RETRY)
            continue
        if problem:
            say("gets the figures again, without a gap")
        problem, retry = "", _FIRST_RETRY
        if is_last:
            return 0
        ended.wait(POLL_SECONDS)


def without_credentials(text: str) -> str:
    """Return a message without the user and password of an address in it."""
    return re.sub(r"://[^/@\s]*@", "://", text)


@contextmanager
def alone(run: Path, name: str, ended: threading.Event) -> Iterator[bool]:
    """Hold the tracker's lock, so that two processes never send the same. False: another one has it, and we ended."""
    file = cursor_file(run, name).with_suffix(".lock")
    make_folder(file.parent)
    with append_to(file) as lock:
        while not (held := _lock(lock.fileno())) and not ended.wait(POLL_SECONDS):
            pass
        yield held


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _wait_for_trainer(ended: threading.Event, seconds: float) -> None:
    """Set `ended` at the first byte or the end of standard input; unless `seconds` is 0, end so long after it."""
    os.read(0, 1)
    ended.set()
    if seconds:
        time.sleep(seconds)
        os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Follow `RUN NAME PLACE SECONDS`; 0 seconds after the trainer's end are any number."""
    run, name, place, seconds = Path(arguments[0]), arguments[1], arguments[2], float(arguments[3])
    messages, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)

    def say(text: str) -> None:
        with suppress(OSError):  # nobody listens any more
            os.write(messages, f"{without_credentials(on_one_line(text))}\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):  # for the trainer, which saves; its end is ours
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    ended = threading.Event()
    threading.Thread(target=_wait_for_trainer, args=(ended, seconds), daemon=True).start()
    with alone(run, name, ended) as held:
        if held:
            code = follow(Follower(run, name, place, say), ended, say, how_to_send(run))
        else:
            say("warning: another process sends to it now")
            code = 1
    sys.stdout.flush()
    with suppress(OSError):
        os.write(messages, FAREWELL.encode())
    os._exit(code)  # a library's threads and exit handlers must not keep this process
