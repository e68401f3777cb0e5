"""Progress of the analyses on the terminal."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Show = Callable[[str, int, int], None]


class ProgressDisplay:
    """A bar with the time left on a terminal; elsewhere one line at the start of each piece of work."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task("", total=None)
        self._before = ""

    def __enter__(self) -> Show:
        if self._bar is not None:
            self._bar.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, what: str, done: int, total: int) -> None:
        began, self._before = what != self._before, what
        if self._bar is None or self._task is None:
            if began:
                print(what, file=sys.stderr, flush=True)
            return
        if began:
            self._bar.reset(self._task, total=total, description=what)
        self._bar.update(self._task, completed=done, total=total)
