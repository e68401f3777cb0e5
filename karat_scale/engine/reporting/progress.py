"""Reports a run's progress to the person, as a live bar or plain lines, and to files that the trackers follow.

The bar is for a terminal, the lines are for elsewhere. The files are `metrics.jsonl`, one event a line, and
`histograms.jsonl`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from karat_scale.engine.heartbeat import Heartbeat
from karat_scale.engine.reporting.goodput import Stopwatch, queued
from karat_scale.engine.run_state import RunState
from karat_scale.engine.tracking.follow import Trackers
from karat_scale.foundation.console import ProgressBars, duration, per_second, printable, terminal
from karat_scale.foundation.errors import not_written, one_line, say_in_one_write
from karat_scale.foundation.files import append_to, open_to_read, parse_json
from karat_scale.recipe.files import mapped

if TYPE_CHECKING:
    from karat_scale.data.batch import BadSample


class MetricsLog:
    """Appends events; the system has each line at once, so a killed run loses none.

    Raises:
        RunDirectoryError: the disk does not take the file.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._file: IO[str] = append_to(file)
        except OSError as error:
            raise not_written(file, error) from error
        self._path = file
        self._histograms = file.with_name("histograms.jsonl")
        # A disk that was full has left half a line: the next event must not join it.
        self._begins_line = not _ends_with_newline(file)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """Append one event. A figure that is not finite is written as null: JSON has no NaN.

        Raises RunDirectoryError when the disk does not take it.
        """
        try:
            self._file.write(("\n" if self._begins_line else "") + _line(event, step, figures))
            self._file.flush()
        except OSError as error:
            raise not_written(self._path, error) from error
        self._begins_line = False

    def histograms(self, step: int, histograms: Mapping[str, Mapping[str, Any]]) -> str:
        """Append distributions by name, which only trackers read. Returns why the disk does not take them, if so."""
        try:
            is_whole = not self._histograms.exists() or _ends_with_newline(self._histograms)
            with append_to(self._histograms) as file:
                file.write(("" if is_whole else "\n") + _line("histograms", step, {"histograms": histograms}))
        except OSError as error:
            return f"{self._histograms}: {one_line(error)}"
        return ""

    def close(self) -> None:
        """Flush and close the file."""
        with suppress(OSError):  # a write that failed was reported when it happened
            self._file.close()


def _line(event: str, step: int, figures: Mapping[str, Any]) -> str:
    record = {"event": event, "step": step, "time": round(time.time(), 3), **figures}
    return json.dumps(mapped(record, _finite_or_none), allow_nan=False) + "\n"


def read_events(path: Path, damaged: Callable[[str], None] = lambda line: None) -> Iterator[dict[str, Any]]:
    """Yield the events of a run's `metrics.jsonl`. Other lines are skipped, and `damaged` is called with each.

    A last line without its end may be one that is being written: it is skipped, but does not count as damaged.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = parse_json(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                yield event
            elif line.strip() and line.endswith("\n"):
                damaged(line)


def _ends_with_newline(file: Path) -> bool:
    with open_to_read(file) as content:
        content.seek(0, 2)
        if content.tell() == 0:
            return True
        content.seek(-1, 2)
        return content.read(1) == b"\n"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A check of fewer bytes is over before a person has read about it.
_LARGE = 10**8
_STDOUT = 1


# Without a bar, the longest time without a line.
_QUIET_SECONDS = 60.0


class PlainDisplay:
    """Prints one line per report, with the time of day, and the progress if no line was printed for a minute."""

    def __init__(self) -> None:
        self._told = time.monotonic()
        self._first: tuple[int, float] | None = None

    def line(self, text: str) -> None:
        """Print a line that stays. A run continues if nobody reads its output any more, or its disk is full."""
        self._told = time.monotonic()
        try:
            print(f"{time.strftime('%H:%M:%S')} {printable(text)}", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # also for what is still in Python's buffer
            say_in_one_write(f"warning: standard output cannot be written ({error.strerror}), so printing stops")

    def advance(self, done: int, total: int) -> None:
        """Take note of a finished training step without a report."""
        now = time.monotonic()
        first, begun = self._first = self._first or (done, now)  # the first step also pays for the start
        if now - self._told >= _QUIET_SECONDS:
            left = f", about {duration((total - done) * (now - begun) / (done - first))} left" if done > first else ""
            self.line(f"step {done}/{total}{left}")

    def train(self, done: int, total: int, text: str, left: float | None = None) -> None:
        """Show what was measured since the last report, and about how many seconds of training are left."""
        self.line(f"step {done}/{total} {text}{f', about {duration(left)} left' if left else ''}")

    def evaluate(self, done: int, total: int) -> None:
        """Show the progress of an evaluation."""
        if time.monotonic() - self._told >= _QUIET_SECONDS:
            self.line(f"evaluated {done} of {total} batches")

    def verify(self, done: int, total: int) -> None:
        """Show how many bytes of a checkpoint are verified; only a bar shows it. Any thread may call it."""

    def close(self) -> None:
        """Leave the terminal as it was."""


_EVALUATE, _VERIFY = "evaluate", "verify, MB"


class TerminalDisplay(PlainDisplay):
    """Live bars: training, and below it an evaluation or a check of files while there is one."""

    def __init__(self, console: Console, title: str) -> None:
        self._bars, self._title = ProgressBars(console), title
        self._bars.move(title, 0, None, keep=True)

    def line(self, text: str) -> None:
        """Print above the bars."""
        self._bars.line(text)

    def advance(self, done: int, total: int) -> None:
        """Move the training bar."""
        self._bars.move(self._title, done, total, keep=True)

    def train(self, done: int, total: int, text: str, left: float | None = None) -> None:
        """Show next to the training bar what was measured; the bar shows the time left itself."""
        self._bars.move(self._title, done, total, text, keep=True)

    def evaluate(self, done: int, total: int) -> None:
        """Move the evaluation bar; it disappears when it is full."""
        self._bars.move(_EVALUATE, done, total)

    def verify(self, done: int, total: int) -> None:
        """Move the bar of the check, in MB; it disappears when it is full."""
        if total >= _LARGE:
            self._bars.move(_VERIFY, done // 10**6, total // 10**6)

    def close(self) -> None:
        """Leave the training bar where it is; remove unfinished other bars."""
        for name in (_EVALUATE, _VERIFY):
            self._bars.remove(name)
        self._bars.stop()


class SilentDisplay(PlainDisplay):
    """For ranks other than 0: only warnings, on standard error."""

    def line(self, text: str) -> None:
        """Print nothing."""


def choose_display(is_main: bool, title: str) -> PlainDisplay:
    """A live bar when standard output is a terminal, and nothing on ranks other than 0."""
    if not is_main:
        return SilentDisplay()
    console = terminal()
    return TerminalDisplay(console, title) if console else PlainDisplay()


class Reporter:
    """Tells the person and the log the same things. `log` is None on ranks other than 0."""

    def __init__(
        self, display: PlainDisplay, log: MetricsLog | None, rank: int = 0, heartbeat: Heartbeat | None = None
    ) -> None:
        self.display, self._log, self._rank, self._heartbeat = display, log, rank, heartbeat
        self._trackers: Trackers | None = None
        self._others: list[Callable[[], list[str]]] = []
        self._has_histograms = True
        self._stopwatch: Stopwatch | None = None

    @property
    def is_recording(self) -> bool:
        """Return whether figures go to files here; True only on rank 0."""
        return self._log is not None

    def start_trackers(self, run: Path, names: Sequence[str], anew: bool) -> None:
        """Start the trackers, on rank 0. `anew`: this is not the run that they know."""
        if self._log is not None:
            self._trackers = Trackers(run, names, anew)
            self.hear(self._trackers.messages)

    def hear(self, messages: Callable[[], list[str]]) -> None:
        """Print the lines that `messages` returns, now and after each event; they come from work besides training."""
        self._others.append(messages)
        self.tell_of_others()

    def begin(self, step: int, anew: bool, last_sign: float | None, world_size: int, device: str) -> None:
        """Log that training begins after `step`, and on what. `anew`: this is not the run of the earlier events.

        `last_sign` is when the previous start was last seen, in seconds since the epoch.
        """
        if self._log is not None:
            self._stopwatch = Stopwatch()
            asked, started = queued() or (None, None)
            times = {"last_sign": last_sign, "submitted": asked, "started": started}
            machine = {"world_size": world_size, "device": device}
            self._write("start", step, began=self._stopwatch.began, anew=anew, **times, **machine)

    def beat(self, doing: str, step: int = 0) -> None:
        """Record that this rank begins `doing` now, for whoever watches for hangs."""
        if self._stopwatch is not None:
            self._stopwatch.begin(doing)
        if self._heartbeat is not None:
            self._heartbeat.beat(doing, step)

    def move(self, doing: str) -> None:
        """Record that this rank makes progress within `doing`, which other ranks may not do."""
        if self._stopwatch is not None:
            self._stopwatch.begin(doing)
        if self._heartbeat is not None:
            self._heartbeat.move(doing)

    def verify(self, done: int, total: int) -> None:
        """Show how many bytes of a checkpoint are verified."""
        self.move("starting")
        self.display.verify(done, total)

    def pace(self, own_seconds: float) -> None:
        """Record this rank's own seconds in a step, for whoever watches for slow ranks."""
        if self._heartbeat is not None:
            self._heartbeat.pace(own_seconds)

    def info(self, text: str) -> None:
        """Print a line for the person."""
        self.display.line(text)

    def warn(self, text: str) -> None:
        """Print a warning, on any rank."""
        if isinstance(self.display, SilentDisplay):
            say_in_one_write(f"[rank {self._rank}] warning: {text}")
        else:
            self.display.line(f"warning: {text}")

    def bad_samples(self, samples: Sequence["BadSample"]) -> None:
        """Warn of samples that could not be read, with their places."""
        for sample in samples:
            self.warn(f"unreadable image {sample.key} in {sample.shard}: {sample.reason}")

    def train(self, step: int, total: int, figures: dict[str, Any]) -> None:
        """Report the figures of the steps since the last report."""
        rate = figures["images_per_second"]
        text = f"epoch {figures['epoch'] + 1} loss {figures['loss']:.4f} lr {figures['lr']:.2e}"
        text += f" {per_second(rate)} img/s" if rate else ""
        text += f" MFU {figures['mfu']:.1%}" if figures.get("mfu") else ""
        left = (total - step) * figures["samples"] / step / rate if rate else None
        self.display.train(step, total, text, left)
        self._write("train", step, **figures)

    def event(self, event: str, step: int, text: str, figures: Mapping[str, Any]) -> None:
        """Report an event, in words, and as figures for the log."""
        self.info(text)
        self._write(event, step, **figures)

    def histograms(self, step: int, histograms: Mapping[str, Mapping[str, Any]]) -> None:
        """Log distributions of weights, by name."""
        if self._log is not None and self._has_histograms and (problem := self._log.histograms(step, histograms)):
            self._has_histograms = False
            self.warn(f"{problem}; no further histograms are written")

    def checkpoint(self, state: RunState, name: str, seconds: float, stall: float, near: bool = False) -> None:
        """Report a complete checkpoint; training paused for `stall` of its seconds. `near`: it is only on each node."""
        if not near:  # there are too many of these to print
            self.info(f"saved {name} in {seconds:.1f} s, of which training paused {stall:.1f} s")
        figures = {"seconds": round(seconds, 3), "stall_seconds": round(stall, 3), **({"near": True} if near else {})}
        self._write("checkpoint", state.step, samples=state.samples, name=name, **figures)

    def spike(self, step: int, loss: float, limit: float, advice: str) -> None:
        """Report that the loss of a step is far above those before."""
        self.warn(f"step {step} has a loss of {loss:.4g}, above the limit of {limit:.4g} for a spike; {advice}")
        self._write("spike", step, loss=loss, limit=limit)

    def beyond_reach(self, step: int, block: int, share: float, reach: float) -> None:
        """Report that the scores of a block have grown beyond what its functions tell apart."""
        if self.is_recording:
            self.warn(
                f"{share:.0%} of the scores of block {block} lie beyond +-{reach:.3g}, where its functions repeat or "
                "end, so training may become unstable; start again with a lower optim.lr or "
                f"attention.bound={reach:.3g}"
            )
        self._write("beyond_reach", step, block=block, share=share, reach=reach)

    def end(self, state: RunState, exit_code: int, reason: str) -> None:
        """Log the last event of this process."""
        self._write("end", state.step, samples=state.samples, exit=exit_code, reason=reason)

    def close(self) -> None:
        """Restore the terminal and close the files."""
        self.display.close()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._log is not None:
            self._log.close()

    def _write(self, event: str, step: int, **figures: Any) -> None:
        if self._log is not None:
            if self._stopwatch is not None:
                figures["spent"] = self._stopwatch.read()
            self._log.write(event, step, **figures)
            self.tell_of_others()

    def finish_trackers(self, seconds: float) -> None:
        """Let the trackers send the rest, for at most `seconds`; print a line for each that has not received it all."""
        if self._trackers is not None:
            self._trackers.finish(seconds)
            self.tell_of_others()

    def tell_of_others(self) -> None:
        """Print now what the functions given to `hear` return."""
        for messages in self._others:
            for message in messages():
                self.info(message)
