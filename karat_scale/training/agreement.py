"""Signals that ask a run to stop, and what the ranks decide together between steps: whether to save, and to stop.

SIGTERM, SIGINT, SIGUSR2 and SIGHUP set a flag that the loop reads. SIGUSR1 is left alone: NCCL may use it. srun sends a
signal to a rank's whole process group, where SIGUSR2 would kill the compiler that the rank waits for. So SIGUSR2 is
blocked, children inherit that, and a thread waits for the signal. The end of the launcher, if one started this process,
counts as SIGTERM. Otherwise the rank would train on, and the next start would find its run in use.

Comparing wishes takes a collective, which makes each rank's host wait for the slowest. So the ranks compare only about
once a second. All must do it after the same step, and only rank 0's clock is asked: at each agreement rank 0 tells the
others how many steps later the next one is.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.goodput import WallTime
from karat_scale.foundation.console import duration
from karat_scale.foundation.errors import EXIT_INTERRUPTED
from karat_scale.foundation.machine import LAUNCHER, STOP_SIGNALS, catch_stop_signals

_POLL_SECONDS = 1.0
# How long a rank that should stop waits for the others: to wait for a rank that has ended would take long.
_MEETING_SECONDS = 5.0


class StopSignals:
    """Remembers the first stop signal. Ctrl-C is answered, and a second one quits the process.

    Python calls a handler when the running operation has ended, which may take minutes. The signal's number is in its
    pipe at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = math.inf
        self._is_interrupted = False

    def install(self) -> "StopSignals":
        """Catch the stop signals from here on, in this process, whose main thread calls this."""
        numbers, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into)
        catch_stop_signals(lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        threads: dict[str, Callable[[], None]] = {
            "signals": partial(self._hear, numbers),
            "SIGUSR2": self._wait_for_usr2,
        }
        if LAUNCHER.is_there:
            threads["launcher"] = self._stop_with_launcher
        for name, run in threads.items():
            threading.Thread(target=run, name=name, daemon=True).start()
        return self

    def _hear(self, numbers: int) -> None:
        while True:
            for number in os.read(numbers, 1):
                self._remember(number)

    def _wait_for_usr2(self) -> None:
        while True:
            self._remember(signal.sigwait({signal.SIGUSR2}))

    def _stop_with_launcher(self) -> None:
        while not LAUNCHER.is_gone:
            time.sleep(_POLL_SECONDS)
        self._remember(signal.SIGTERM)
        _tell(b"the launcher has ended; this rank stops, too\n")

    def _remember(self, number: int) -> None:
        if number in STOP_SIGNALS and self.received is None:
            self._since = time.monotonic()
            self.received = signal.Signals(number)
        if number != signal.SIGINT:
            return
        if self._is_interrupted:
            _tell(b"\nquit at once; what came after the last checkpoint is lost\n")
            os._exit(EXIT_INTERRUPTED)
        self._is_interrupted = True
        if os.environ.get("RANK", "0") == "0":
            _tell(b"\nstopping: the state is saved first; Ctrl-C again quits at once\n")

    def check(self) -> None:
        """Raise StoppedError some seconds after a stop signal: the ranks that are starting meet, and stop together."""
        if time.monotonic() - self._since > _MEETING_SECONDS:
            raise StoppedError


def _tell(line: bytes) -> None:
    with suppress(OSError):  # the terminal may have been closed
        os.write(2, line)


class StoppedError(Exception):
    """All ranks agreed to stop on a signal; `saved` says whether the state is in a checkpoint."""

    saved = False


SECONDS, MOST_STEPS = 1.0, 50
Clock = Callable[[], float]


class Agreement:
    """Decides after which steps the ranks compare their wishes, and compares them.

    The next agreement comes after the number of steps that take SECONDS, at the speed since the last one. This is at
    least one, and at most twice the number before: the first steps of a run say little about the others. With several
    ranks it is at most MOST_STEPS, as steps may become slow all at once.
    """

    def __init__(self, world: World, clock: Clock = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._last: tuple[int, float] | None = None
        self._distance = 0
        self._next = 0

    def is_due(self, step: int) -> bool:
        """Return whether the ranks compare their wishes after `step` finished steps; the same on all ranks."""
        return step >= self._next

    def maxima(self, step: int, *wishes: int) -> list[int] | None:
        """Return the largest of all ranks' values of each wish, or None if no agreement is due. Collective if it is.

        A single rank gets its own wishes back after each step.
        """
        if not self.is_due(step):
            return list(wishes) if self._world.size == 1 else None
        *agreed, self._distance = self._world.maxima(*wishes, self._choose_distance(step))
        self._next = step + self._distance
        self._last = step, self._clock()
        return agreed

    def _choose_distance(self, step: int) -> int:
        if self._last is None or not self._world.is_main:
            return 1
        last_step, last_time = self._last
        seconds = max(self._clock() - last_time, 1e-9)
        fitting = int(SECONDS * max(step - last_step, 1) / seconds)
        most = 2 * self._distance if self._world.size == 1 else min(2 * self._distance, MOST_STEPS)
        return max(1, min(fitting, most))


@dataclass(frozen=True)
class Decision:
    """The decision of all ranks after a step. `is_idle`: none of them is busy. `save_near`: save only on each node."""

    save: bool = False
    stop: bool = False
    is_idle: bool = False
    save_near: bool = False


NEAR = 10
_SAVE = 2


class SavePoints:
    """Decides after each step whether to save and whether to stop, the same on all ranks.

    A save each `every_steps` needs no agreement. Rank 0's clock says when `every_minutes` are over, and a stop signal
    may reach any rank: both are noticed at the next agreement. Saves only on each node come NEAR times as often.
    """

    def __init__(
        self,
        world: World,
        signals: StopSignals,
        every_steps: int | None,
        every_minutes: float | None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._world, self._signals, self._clock = world, signals, clock
        self._every_steps, self.every_minutes = every_steps, every_minutes
        self.agreement = Agreement(world, clock)
        """It decides after which steps `decide` compares the ranks' wishes."""
        self._saved_at = self._saved_near_at = clock()

    def note_save(self, near: bool = False) -> None:
        """Note that a save begins, so that a failed one is retried an interval later, not after each step."""
        self._saved_near_at = self._clock()
        if not near:
            self._saved_at = self._saved_near_at

    def decide(self, step: int, is_busy: bool = False) -> Decision:
        """Return what to do after `step` finished steps. `is_busy`: this rank still writes the last save."""
        every = self._every_steps
        save, near = (bool(every) and step % max((every or 1) // often, 1) == 0 for often in (1, NEAR))
        agreed = self.agreement.maxima(step, self._signals.received is not None, self._is_time_to_save, is_busy)
        if agreed is None:
            return Decision(save, save_near=near)
        stop, timely, busy = agreed
        return Decision(save or timely == _SAVE, bool(stop), not busy, near or bool(timely))

    @property
    def _is_time_to_save(self) -> int:
        if not self._world.is_main or not self.every_minutes:
            return 0
        if self._clock() - self._saved_at >= 60 * self.every_minutes:
            return _SAVE
        return int(self._clock() - self._saved_near_at >= 60 * self.every_minutes / NEAR)


# The interval before anything is measured, and the least one.
FIRST_MINUTES, LEAST_SECONDS = 1.0, 10.0
# What is assumed before anything is observed: one failure in a day.
_ASSUMED_SECONDS = 86400.0


class BestInterval:
    """The time between two saves at which failures cost least: Daly's approximation (2006) of Young's optimum (1974).

    Args:
        before: how the time of the run's starts was spent.
    """

    def __init__(self, before: WallTime, clock: Clock = time.monotonic) -> None:
        self._clock, self._began = clock, clock() - (before.seconds - before.parts["queue"])
        self._failures = before.failures
        self._told = 0.0

    def choose(self, stall: float, seconds: float) -> tuple[float, str]:
        """Return the minutes, and a line about them if they have changed.

        Args:
            stall: how long training paused for a save.
            seconds: how long the save took.
        """
        between = (self._clock() - self._began + _ASSUMED_SECONDS) / (self._failures + 1)
        share = stall / (2 * between)
        best = math.sqrt(2 * stall * between) * (1 + math.sqrt(share) / 3 + share / 9) - stall
        best = max(best, 2 * seconds, LEAST_SECONDS)
        said = ""
        if not 0.8 < best / (self._told or math.inf) < 1.25:
            self._told = best
            said = (
                f"checkpoint.every = auto: saves every {duration(best)}, as training waits {stall:.2g} s for one and a "
                f"failure is expected every {duration(between)}"
            )
        return best / 60, said
