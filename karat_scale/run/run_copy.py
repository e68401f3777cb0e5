"""Copying a run to `checkpoint.url` while it trains, by a thread of rank 0 that training never waits for.

The thread makes the URL like the run's directory: it copies what is missing there, the best and the newest checkpoint
first, and removes what the run does not keep. So the next copy, or the next start, makes up for one that failed or was
cut off.
"""

import json
import math
import threading
import time
from collections import deque
from contextlib import suppress

from karat_scale.checkpoint.locks import holding
from karat_scale.checkpoint.store import PINNED
from karat_scale.engine.distributed import World
from karat_scale.engine.peers import END_SECONDS
from karat_scale.errors import EXIT_STOPPED, one_line
from karat_scale.files import replace_file
from karat_scale.reporting.progress import Reporter
from karat_scale.run.run_directory import RunDirectory
from karat_scale.run.run_url import RunUrl
from karat_scale.run.signals import StopSignals
from karat_scale.run.waiting import follow

# How long the last copy may take, by exit code. A job's signal comes two minutes before its end; after an error, other
# ranks have ended, and this one is ended END_SECONDS after it hears of them.
COPY_SECONDS = {0: math.inf, EXIT_STOPPED: 60.0, 2: END_SECONDS - 10.0, 1: 5.0}
_SOON = 1.0


class RunCopy:
    """The thread; see above.

    Args:
        url: this start is the one that writes there.
        notes: what `messages` returns first.
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
        """Bytes that the store has taken."""

    def begin(self) -> None:
        """Start the thread, which first copies what is missing."""
        self._directory.store.on_change = self.wake
        threading.Thread(target=self._work, name="copy", daemon=True).start()
        self.wake()

    def wake(self) -> None:
        """Something has changed in the directory. Any thread may call it."""
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until the URL is like the directory, or cannot be; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._handled == self._asked, seconds)

    def ask_last(self) -> None:
        """Copy the end of the run; `end` tells of its failure."""
        self._is_last = True
        self.wake()
        if not self.wait(_SOON):
            self._notes.append(f"waiting for the last copy to {self._url.url}")

    def end(self) -> None:
        """Copy nothing more, and say in one line if something is missing. No save may be under way."""
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
        """What there is to tell since the last call."""
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
            names = store.names()  # before the log is sent, which then has the lines of their steps
            self._url.upload_files(self._directory.path, self._count)
            remote.look()
            # The best one first: the state of a newer one names it.
            for name in sorted(names, key=lambda name: name != store.pointed("best")):
                with holding(store.root / name) as is_there:
                    if is_there and (problem := self._upload(name)):
                        problems.append(problem)
            for pointer in ("best", "latest"):
                if (pointed := store.pointed(pointer)) is not None and pointed in remote.names():
                    remote.point(pointer, [pointed])
            remote.point(PINNED, remote.pinned() | set(store.pinned()))
            self._url.check_mine()
            remote.retain(self._keep_last)
            self._copied = next(iter(remote.names()), None)
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
        """For `karat status`."""
        outcome = {"url": self._url.url, "checkpoint": self._copied, "problem": self._problem, "time": time.time()}
        with suppress(OSError):
            replace_file(self._directory.copy_file, json.dumps(outcome) + "\n")


def finish_copy(copy: RunCopy | None, world: World, reporter: Reporter, signals: StopSignals, code: int) -> None:
    """Wait for the copy of a run's end, for as long as the run's exit code allows. Collective.

    Args:
        copy: rank 0's.
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
