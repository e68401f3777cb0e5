"""Trackers during training: how far each has got, the process that follows a run's files, the trainer's side.

The trainer starts a process for each tracker (`Trackers`), and so does `karat track`. The process follows the run's
files and sends one tracker what is new (`Follower`). How far the tracker has got is in `RUN/trackers/NAME.json`
(`Cursor`), which is replaced after each piece that was sent. A restart may go back to an older checkpoint, and then
writes the steps after it once more. Only the first events of a step are sent: of each kind of event, only steps above
the last sent one are new.

The process's standard input is a pipe. When that ends, the trainer has ended, for any reason: the process sends what is
left and ends. Lines on its standard output are for the person. The output of libraries is discarded. Exit code 0: the
tracker has everything. 1: it has not. The last line is `FAREWELL`, because a library may end the process, too.
"""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from karat_scale.engine.tracking.trackers import KINDS, Event, TrackedRun, Tracker
from karat_scale.foundation.errors import UserError, on_one_line, one_line
from karat_scale.foundation.files import (
    append_to,
    lock,
    make_folder,
    open_to_read,
    parse_json,
    read_object,
    read_text,
    replace_file,
)
from karat_scale.foundation.machine import library_versions
from karat_scale.foundation.tables import EXTRAS, TRACKERS, how_to_install, is_installed, load
from karat_scale.recipe.files import read_run_recipe
from karat_scale.recipe.loading import leaves

# Written by reporting/progress.py.
FILES = ("metrics.jsonl", "histograms.jsonl")
_MOST_BYTES = 2**20  # read at a time
FAREWELL = "\x04\n"
POLL_SECONDS = 1.0
_FIRST_RETRY, _LAST_RETRY = 5.0, 300.0
_PROGRESS_SECONDS = 10.0
# Files that are sent if they exist: the run's, and those of `karat analyze`.
_DOCUMENTS = ("recipe.yaml", "summary.json", "analysis/**/*.html", "analysis/**/*.png", "analysis/**/*.json")

# How long the trainer waits for its trackers at its end; less if somebody wants it to stop.
END_SECONDS, STOP_SECONDS = 60.0, 5.0
# How long a process may go on after its trainer was killed.
_ORPHAN_SECONDS = 60.0
# The path comes first: a module of that name in the working directory must not be imported in place of one of ours.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv.pop(1).split(':'); from karat_scale.engine.tracking.follow import main; "
    "sys.exit(main(sys.argv[1:]))"
)

Say = Callable[[str], None]


@dataclass
class Cursor:
    """A record of what a tracker has.

    Attributes:
        id: the id of the run at the tracker.
        begin: the byte at which this run begins in each of `FILES`; mostly 0.
        offsets: the byte up to which each of them was sent.
        steps: the last sent step of each kind of event.
        sent: the size and time of change of each uploaded file.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begin: dict[str, int] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "Cursor":
        """Read a cursor; a new one if there is none, or if it is damaged."""
        try:
            return TypeAdapter(cls).validate_json(read_text(file), strict=True)
        except (OSError, ValueError):
            return cls()

    def save(self, file: Path) -> None:
        """Replace the file."""
        make_folder(file.parent)
        replace_file(file, json.dumps(asdict(self)) + "\n")

    def take(self, file: Path) -> tuple[list[Event], "Cursor"]:
        """Return the next events of one of `FILES` that were not sent, and the cursor after them.

        A last line without its end is still being written. Lines that are no events are skipped.
        """
        lines, offset = _next_lines(file, self.offsets.get(file.name, 0))
        steps = dict(self.steps)
        new = [event for event in map(_parsed, lines) if event is not None and _is_new(event, steps)]
        return new, replace(self, offsets={**self.offsets, file.name: offset}, steps=steps)


def cursor_file(run: Path, name: str) -> Path:
    """Return the file of a tracker's cursor; `name` may be the place of a class."""
    return run / "trackers" / f"{re.sub(r'[^A-Za-z0-9_.]', '.', name)}.json"


def how_to_send(run: Path, name: str) -> str:
    """Return the command that sends a tracker the rest of a run, for messages."""
    return f"`karat track {shlex.quote(str(run))} --to {name}` sends the rest"


def _next_lines(file: Path, offset: int) -> tuple[Sequence[bytes], int]:
    if not file.is_file():
        return [], 0
    with open_to_read(file) as content:
        if content.seek(0, 2) < offset:  # another file of this name
            offset = 0
        content.seek(offset)
        piece = content.read(_MOST_BYTES)
        if b"\n" not in piece:
            piece += content.readline()
    whole, end, _ = piece.rpartition(b"\n")
    return (whole.split(b"\n"), offset + len(whole) + 1) if end else ([], offset)


def _ended_in_order(run: Path) -> bool:
    """Return whether the last event of the log is the end of a start."""
    file = run / FILES[0]
    size = file.stat().st_size if file.is_file() else 0
    last = [_parsed(line) for line in _next_lines(file, max(size - 2**16, 0))[0][-1:]]
    return any(event is not None and event.get("event") == "end" for event in last)


def _parsed(line: bytes) -> Event | None:
    try:
        event: Any = parse_json(line)
    except ValueError:
        return None
    return event if isinstance(event, Mapping) and isinstance(event.get("step"), int) else None


def _is_new(event: Event, steps: dict[str, int]) -> bool:
    kind = event.get("event")
    if kind not in KINDS:
        return True
    if event["step"] <= steps.get(kind, -1):
        return False
    steps[kind] = event["step"]
    return True


class Follower:
    """Brings one tracker up to date. If it fails, the next call goes on after the last piece that was sent."""

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
                if not file.is_file():  # it did not come along with the cursor
                    break
                left, now = file.stat().st_size - after.offsets[name], time.monotonic()
                if left > 0 and now - self._told > _PROGRESS_SECONDS:
                    self._told = now
                    self._say(f"{left / 1e6:.1f} MB of {name} are left to send")

    def finish(self) -> None:
        """Send what the run has left, once it has ended."""
        self.advance()
        summary: Event = {}
        if _ended_in_order(self._run):  # else it is the summary of an earlier start
            summary = read_object(self._run / "summary.json")
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
            if arrived is not None:  # read from the start, and skip what has arrived
                self._keep(replace(self._cursor, offsets=dict(self._cursor.begin), steps=dict(arrived)))
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


def _tracked(run: Path, identifier: str) -> TrackedRun:
    recipe = read_run_recipe(run / "recipe.yaml")
    name, project = (recipe.get(section, {}).get(key, "") for section, key in (("run", "name"), ("log", "project")))
    directory = run.resolve().name
    title = name if name == directory else f"{name} {directory}"
    settings = dict(leaves({**recipe, "versions": library_versions()}))
    return TrackedRun(identifier, title, project, run.absolute(), settings)


def _documents(run: Path, with_checkpoints: bool) -> list[Path]:
    patterns = list(_DOCUMENTS)
    log = read_run_recipe(run / "recipe.yaml").get("log") if with_checkpoints else None
    if isinstance(log, dict) and log.get("track_checkpoints"):
        for pointer in ("best", "latest"):
            with suppress(OSError, ValueError):
                name = read_text(run / "checkpoints" / pointer, 4096).strip()
                patterns += [f"checkpoints/{name}/*"] if re.fullmatch(r"step-\d+", name) else []
    inside = run.resolve()  # a run of somebody else's may link to files of ours
    found = [file for pattern in dict.fromkeys(patterns) for file in sorted(run.glob(pattern)) if file.is_file()]
    return [file for file in found if file.resolve().is_relative_to(inside)]


def follow(follower: Follower, ended: threading.Event, say: Say, hint: str) -> int:
    """Keep the tracker up to date until the trainer has ended; returns the exit code.

    A failure is reported once, and retried after a while. After the trainer's end there is one more try; `hint` says
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


@contextmanager
def alone(run: Path, name: str, ended: threading.Event) -> Iterator[bool]:
    """Hold the tracker's lock, so that two processes never send the same.

    Yields False if the trainer ends while another process has the lock.
    """
    file = cursor_file(run, name).with_suffix(".lock")
    make_folder(file.parent)
    with append_to(file) as handle:
        while not (held := lock(handle, wait=False)) and not ended.wait(POLL_SECONDS):
            pass
        yield held


def _wait_for_trainer(ended: threading.Event, seconds: float) -> None:
    """Set `ended` at the first byte or the end of standard input; unless `seconds` is 0, exit `seconds` later."""
    os.read(0, 1)
    ended.set()
    if seconds:
        time.sleep(seconds)
        os._exit(1)


def main(arguments: Sequence[str]) -> int:
    """Follow `RUN NAME PLACE SECONDS`; SECONDS limits the time after the trainer's end, and 0 is no limit."""
    run, name, place, seconds = Path(arguments[0]), arguments[1], arguments[2], float(arguments[3])
    messages, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)

    def say(text: str) -> None:
        with suppress(OSError):  # nobody listens any more
            shown = re.sub(r"://[^/@\s]*@", "://", on_one_line(text))  # without the user and password of an address
            os.write(messages, f"{shown}\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):  # for the trainer, which saves; its end is ours
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    ended = threading.Event()
    threading.Thread(target=_wait_for_trainer, args=(ended, seconds), daemon=True).start()
    code = 1
    try:
        with alone(run, name, ended) as held:
            if held:
                code = follow(Follower(run, name, place, say), ended, say, how_to_send(run, name))
            else:
                say("warning: another process sends to it now")
    except OSError as error:  # of the lock, or of a file of ours
        say(f"warning: {error.filename or name}: {error.strerror or error}; {how_to_send(run, name)}")
    sys.stdout.flush()
    with suppress(OSError):
        os.write(messages, FAREWELL.encode())
    os._exit(code)  # a library's threads and exit handlers must not keep this process


def check_trackers(names: Sequence[str], what: str = "log.trackers =") -> None:
    """Raise UserError for the first tracker whose package or module is not installed. what: the key or option."""
    for name in names:
        row, module = TRACKERS.get(name), name.partition(":")[0]
        if row is not None and row.extra and not is_installed(EXTRAS[row.extra].module):
            raise UserError(f"{what} {name}: {name} is not installed; {how_to_install(row.extra)}")
        if row is None:
            with suppress(ModuleNotFoundError):  # of its parent package
                if find_spec(module) is not None:
                    continue
            raise UserError(f"{what} {name}: no module {module}; put its directory on PYTHONPATH")


class Trackers:
    """One process for each tracker of a run. A process that cannot be started is reported in `messages`."""

    def __init__(
        self, run: Path, names: Sequence[str], anew: bool = False, patient: bool = False, say: Say | None = None
    ) -> None:
        """Start the processes.

        Args:
            run: a directory with recipe.yaml.
            names: names from the table, or places of classes.
            anew: whether the run begins again from step 0, so that it is another run to its trackers.
            patient: whether a process may take as long as it needs, once `finish` is called.
            say: a function that another thread calls with each message at once; without it, `messages` returns them.
        """
        self._run = run
        self._messages: deque[str] = deque()
        self._say = say or self._messages.append
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._listeners: list[threading.Thread] = []
        self._ended: dict[str, bool] = {}  # whether each process that has ended did so in good order
        self._lock = threading.Lock()
        self._never_began: list[str] = []
        for name in names:
            try:
                if anew:  # it begins with what comes from now on
                    sizes = {file: (run / file).stat().st_size for file in FILES if (run / file).is_file()}
                    Cursor(begin=sizes, offsets=sizes).save(cursor_file(run, name))
                self._processes[name] = self._start(run, name, 0.0 if patient else _ORPHAN_SECONDS)
            except OSError as error:
                self._never_began.append(name)
                self._say(f"warning: {name}: cannot be started, so it gets no figures: {error.strerror}")

    def messages(self) -> list[str]:
        """Return what the processes have said since the last call."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def finish(self, seconds: float | None) -> list[str]:
        """Let all send what is left, for at most `seconds`. Return the trackers that have not received everything."""
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.write("\n")  # another process may hold this end of the pipe, too
                process.stdin.close()
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            for name, process in self._processes.items():
                try:
                    process.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))
                except subprocess.TimeoutExpired:
                    self._kill(name, process)
                    self._say(f"warning: {name}: has not got everything in time; {how_to_send(self._run, name)}")
        except KeyboardInterrupt:
            for name, process in self._processes.items():
                self._kill(name, process)
            raise
        for listener in self._listeners:
            listener.join(1.0)  # what the library has left running may hold its pipe for ever
        for name, process in self._processes.items():
            self._tell_of_death(name, process)
        late = [name for name, process in self._processes.items() if process.returncode or not self._ended[name]]
        self._processes, self._listeners = {}, []
        return [*late, *self._never_began]

    def _start(self, run: Path, name: str, seconds: float) -> subprocess.Popen[str]:
        place = TRACKERS[name].place if name in TRACKERS else name
        command = [sys.executable, "-c", _PROGRAM, ":".join(sys.path), str(run), name, place, str(seconds)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        listener = threading.Thread(target=self._listen, args=(name, process), daemon=True)
        listener.start()
        self._listeners.append(listener)
        return process

    def _listen(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if line == FAREWELL:
                    self._note_end(name, in_order=True)
                    continue
                is_warning = line.startswith("warning: ")
                text = line.strip().removeprefix("warning: ")
                self._say(f"{'warning: ' if is_warning else ''}{name}: {text}")
        self._tell_of_death(name, process)

    def _note_end(self, name: str, in_order: bool) -> bool:
        """Note how a process ended; return whether that is new."""
        with self._lock:
            is_new = name not in self._ended
            self._ended.setdefault(name, in_order)
            return is_new

    def _tell_of_death(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait for the end of a process, and report it if nobody has noted how the process ended."""
        code = process.wait()
        if self._note_end(name, in_order=False):
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            then = how_to_send(self._run, name)
            self._say(f"warning: {name}: its process has ended ({how}), so it gets no more figures; {then}")

    def _kill(self, name: str, process: subprocess.Popen[str]) -> None:
        self._note_end(name, in_order=False)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes of the library
        process.wait()
