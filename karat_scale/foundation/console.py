"""How commands show results: tables, units, durations and progress, HTML pages, and the file that `--json` names.

rich and jinja2 are imported only where something is drawn: `karat --help` stays quick, and `karat doctor` and `karat
bench gpu` run without rich. Pages open offline: every text is escaped, and every image is inside.
"""

import base64
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from karat_scale import __version__
from karat_scale.foundation.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 110  # columns of a terminal with room for all of a bar
PLAIN_LINE_SECONDS = 10.0


def write_json(file: str | Path | None, content: Any) -> None:
    """Write `content` as indented JSON to a file; without a file, do nothing."""
    if file:
        write_atomically(Path(file), json.dumps(content, indent=2) + "\n")


def printable(text: str) -> str:
    """Return text whose control characters are written out, as `\\x1b`: recipes, paths and events may hold some.

    Line breaks and tabs stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def terminal(stderr: bool = False) -> "Console | None":
    """Return rich's console of standard output or error; None if that is not a terminal or rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    screen = _Screen(sys.stderr if stderr else sys.stdout)
    console = Console(file=cast("IO[str]", screen), highlight=False)
    return console if console.is_terminal else None


class _Screen:
    """A standard stream. If its terminal is closed, the command goes on, and its output is dropped."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write and flush the text."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # also for what is still in the buffer


def make_table(header: Sequence[str] = (), texts: Collection[int] = (0,)) -> "Table":
    """Return an empty table of rich in our style. Columns that are not in `texts` are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for number, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="left" if number in texts else "right", overflow="fold")
    return table


def print_titled(console: "Console", title: str, table: "Table") -> None:
    """Print a table below its title, which rich's own title would wrap to the width of the columns."""
    from rich.text import Text

    console.print(Text(f"\n{printable(title)}", style="bold"))
    console.print(table)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int] = (0,)
) -> None:
    """Print a table: rich's on a terminal, aligned lines elsewhere. Columns that are not in `texts` hold figures."""
    console = terminal()
    if console is None:
        lines = [[printable(cell) for cell in line] for line in (header, *rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        print(f"\n{printable(title)}")
        for line in lines:
            cells = (f"{cell:{'<' if i in texts else '>'}{widths[i]}}" for i, cell in enumerate(line))
            print(f"  {'  '.join(cells)}".rstrip(), flush=True)
        return
    from rich.text import Text

    table = make_table(header, texts)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_titled(console, title, table)


def gigabytes(size: float) -> str:
    """Format bytes as GB (1e9), or as MB (1e6) below a hundredth of that."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Format a duration: "3 d 4 h" or "12 min 5 s" in at most two units; below a minute "4.5 s" or "120 ms"."""
    if seconds < 59.5:
        return f"{seconds:.3g} s" if seconds >= 0.9995 or seconds == 0 else f"{1e3 * seconds:.3g} ms"
    left, parts = round(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def plural(number: int, noun: str) -> str:
    """Return a count with its noun."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of these names; "..." stands for others."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def wrapped(line: str, indent: str) -> str:
    """Return a line wrapped to the terminal, with `indent` from its second on; as it is where there is no terminal."""
    console = terminal()
    if console is None:
        return line
    return textwrap.fill(line, console.width, subsequent_indent=indent, break_on_hyphens=False)


def _print_past_bars() -> None:
    """Give a forked process the plain stdout and stderr: rich's wait for a lock that a thread may have held."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, getattr(stream, "rich_proxied_file", stream))


os.register_at_fork(after_in_child=_print_past_bars)


class ProgressBars:
    """Bars on a terminal, one for each name, with the time left. A full bar disappears unless it is kept.

    On a narrow terminal, names and texts are cut, so that the numbers stay whole.
    """

    def __init__(self, console: "Console") -> None:
        from rich import progress
        from rich.table import Column
        from rich.text import Text

        def whole() -> Column:
            return Column(no_wrap=True)

        class TimeLeft(progress.TimeRemainingColumn):
            def render(self, task: progress.Task) -> Text:
                time = super().render(task)  # empty for work without a total
                return time.append(" left") if time.plain.strip() else time

        is_wide = console.width >= _WIDE
        bar, gone = 24 if is_wide else 8, (progress.TimeElapsedColumn(whole()), progress.TextColumn("gone,"))
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", style="bold", markup=False),
            progress.BarColumn(bar_width=bar),
            progress.MofNCompleteColumn(table_column=whole()),
            progress.TextColumn("{task.fields[text]}", markup=False),
            *(gone if is_wide else ()),
            TimeLeft(table_column=whole()),
            console=console,
            speed_estimate_period=120,
        )
        self._name_room = 32 if is_wide else 20
        # A time takes 7 columns, and one separates two.
        self._room = console.width - bar - (30 if is_wide else 16)
        self._tasks: dict[str, progress.TaskID] = {}
        self._progress.start()

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(printable(text), markup=False, highlight=False)

    def move(self, name: str, done: float, total: float | None, text: str | None = None, keep: bool = False) -> None:
        """Move the bar `name`, which is added if there is none. `text` stays beside the bar until it is replaced."""
        shown = printable(name)[: self._name_room]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(shown, total=total, text="")
        numbers = 2 * len(str(total)) + 1
        fields: dict[str, Any] = (
            {} if text is None else {"text": printable(text)[: max(self._room - len(shown) - numbers, 0)]}
        )
        self._progress.update(self._tasks[name], completed=done, total=total, **fields)
        if total is not None and done >= total and not keep:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a bar, if there is one of this name."""
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def stop(self) -> None:
        """Leave the bars as they are."""
        self._progress.stop()


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show `what` advancing to `total`: a bar with its rate on a terminal, elsewhere a line every ten seconds.

    Yields a function that takes by how much the work has advanced.
    """
    what, console = printable(what), terminal(stderr=True)
    bars = ProgressBars(console) if console else None
    done = told = 0
    started = reported = time.monotonic()

    def advance(count: int, is_last: bool = False) -> None:
        nonlocal done, reported, told
        done += count  # at once: several threads count, and a call would let another one in between
        now = time.monotonic()
        rate = per_second(done, now - started)
        if bars is not None:
            bars.move(what, done, total, f"{rate} {unit}/s", keep=True)
        elif is_last or now - reported >= PLAIN_LINE_SECONDS:
            reported, told = now, done
            left = (total - done) * (now - started) / done if done else 0
            print(f"{what}: {done} of {total} {unit}, {rate} a second, {left:.0f} s left", flush=True)

    try:
        yield advance
    finally:
        if bars is not None:
            bars.stop()
    if bars is None and told != done:
        advance(0, is_last=True)


@contextmanager
def work_display(title: str = "", line_seconds: float | None = None) -> Iterator[Callable[[str, float, float], None]]:
    """Show one piece of work after another: a bar on a terminal, elsewhere a line for a new name and every ten seconds.

    Yields a function that takes the current work, the steps done and their total number. With a title, there is one bar
    of this name, and the steps are percent of all work. Lines have the time left once a few steps, or a tenth, are
    done; the first step, which includes the startup, does not count.
    """
    console = terminal(stderr=True)
    bars = ProgressBars(console) if console else None
    current, first, is_warm, said = "", 0.0, False, set[str]()
    started = reported = time.monotonic()

    def show(what: str, done: float, total: float) -> None:
        nonlocal current, first, is_warm, started, reported
        what, now = printable(what), time.monotonic()
        if what != current:
            if bars is None and what not in said:
                print(f"{what} ...", file=sys.stderr, flush=True)
            said.add(what)
            if bars is not None and not title:
                bars.remove(current)
            if not title or not current:
                first, is_warm, started, reported = done, False, now, now
            current = what
        if not is_warm and done > first:
            first, is_warm, started = done, True, now
        if console is not None and bars is not None:
            bars.move(title or what, done, total, f"%, {what}" if title else None, keep=True)
        elif now - reported >= (PLAIN_LINE_SECONDS if line_seconds is None else line_seconds):
            told = f"{done:.0f} % of all" if title else f"{done} of {total}"
            if done - first >= (10 if title else 2):
                rate, left = (done - first) / (now - started), (total - done) * (now - started) / (done - first)
                told += f"{'' if title else f', {per_second(rate)} a second'}, about {duration(left)} left"
            print(f"{what}: {told}", file=sys.stderr, flush=True)
            reported = now

    try:
        yield show
    finally:
        if bars is not None:
            bars.stop()


def per_second(count: float, seconds: float = 1.0) -> str:
    """Return a rate with at least two digits, as on a CPU it may be below 10."""
    found = count / max(seconds, 1e-9)
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


def render_page(package: str, template: str, **values: Any) -> str:
    """Return the page of a template in a package's `templates`. Templates also know `version` and the filters below."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    kinds = {"png": "image/png", "jpeg": "image/jpeg", "svg": "image/svg+xml"}
    environment.filters |= {name: partial(_data_url, kind) for name, kind in kinds.items()}
    environment.filters |= {"cell": _cell, "sort_key": lambda value: "" if _is_undefined(value) else str(value)}
    return environment.get_template(template).render(version=__version__, **values)


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _cell(value: Any) -> str:
    """Format a number to four figures, a whole one with commas; a dash if it is undefined."""
    if _is_undefined(value):
        return "-"
    if isinstance(value, float):
        return f"{value:#.4g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _is_undefined(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
