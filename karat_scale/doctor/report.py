"""The output of the doctor: tables on a terminal, plain lines elsewhere, and JSON."""

import json
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from karat_scale import __version__
from karat_scale.doctor.finding import Finding, plural
from karat_scale.errors import UserError
from karat_scale.files import write_atomically

COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


Row = tuple[str, str, str]


class Voice(Protocol):
    """Prints the report. The subclasses differ only in layout."""

    def findings(self, title: str, findings: Iterable[Finding]) -> None:
        """Show the findings of one part."""

    def table(self, title: str, header: Row, rows: Iterable[Row]) -> None:
        """Show figures: a name, a number, and a detail."""

    def say(self, text: str) -> None:
        """Show a sentence."""

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show the current work until it is done."""


class Silent:
    """Prints nothing, for ranks other than 0."""

    def findings(self, title: str, findings: Iterable[Finding]) -> None:
        """Print nothing."""

    def table(self, title: str, header: Row, rows: Iterable[Row]) -> None:
        """Print nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Print nothing."""
        return nullcontext()


class Plain:
    """One line per finding. Needs no library, so that it works when all of them are missing."""

    def findings(self, title: str, findings: Iterable[Finding]) -> None:
        """Lines below a title."""
        self.say(f"\n{title}")
        for finding in findings:
            fix = f" -> {finding.fix}" if finding.fix else ""
            self.say(f"  {finding.level:<8} {finding.name}: {finding.value}{fix}")

    def table(self, title: str, header: Row, rows: Iterable[Row]) -> None:
        """Columns below a title."""
        lines = [header, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        self.say(f"\n{title}")
        for name, number, more in lines:
            self.say(f"  {name:<{widths[0]}}  {number:>{widths[1]}}  {more}".rstrip())

    def say(self, text: str) -> None:
        """Print."""
        print(text, flush=True)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Print the work that starts."""
        self.say(f"  {text} ...")
        return nullcontext()


class Terminal:
    """rich's tables, and its spinner during work."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def findings(self, title: str, findings: Iterable[Finding]) -> None:
        """A table of three columns."""
        from rich.markup import escape

        table = self._table(title, ("", "", ""), show_header=False)
        for finding in findings:
            colour = COLOURS[finding.level]
            fix = f"\n[dim]{escape(finding.fix)}[/dim]" if finding.fix else ""
            table.add_row(f"[{colour}]{finding.level}[/{colour}]", finding.name, escape(finding.value) + fix)
        self._console.print(table)

    def table(self, title: str, header: Row, rows: Iterable[Row]) -> None:
        """A table with the numbers on the right."""
        table = self._table(title, header)
        table.columns[1].justify = "right"
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    @staticmethod
    def _table(title: str, header: Row, show_header: bool = True) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
        table.show_header = show_header
        return table

    def say(self, text: str) -> None:
        """Print."""
        self._console.print(text, markup=False)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show a spinner beside the text."""
        return self._console.status(text)


def choose_voice(is_main: bool = True) -> Voice:
    """Return tables if standard output is a terminal and rich is installed; nothing on ranks other than 0."""
    if not is_main:
        return Silent()
    if sys.stdout.isatty():
        try:
            return Terminal()
        except ImportError:
            pass
    return Plain()


class Report:
    """Collects the findings, prints each at once, and knows the exit code."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        self.figures: dict[str, Any] = {}
        self._sections: dict[str, list[Finding]] = {}

    def add(self, key: str, title: str, findings: list[Finding]) -> None:
        """Add and print the findings of one part."""
        self._sections.setdefault(key, []).extend(findings)
        self.voice.findings(title, findings)

    @property
    def problems(self) -> list[Finding]:
        """The findings that keep training from working."""
        return [finding for section in self._sections.values() for finding in section if finding.level == "problem"]

    @property
    def exit_code(self) -> int:
        """0 without a problem, 1 with at least one."""
        return 1 if self.problems else 0

    def conclude(self) -> None:
        """Print the last line."""
        notes = sum(finding.level == "note" for section in self._sections.values() for finding in section)
        problems = len(self.problems)
        names = f" ({', '.join(finding.name for finding in self.problems)})" if problems else ""
        self.voice.say(f"\n{plural(problems, 'problem')}{names}, {plural(notes, 'note')}")

    def write(self, path: Path) -> None:
        """Write everything as JSON. Raises UserError if the file cannot be written."""
        content = {
            "version": __version__,
            "exit": self.exit_code,
            "problems": [finding.name for finding in self.problems],
            **{key: [finding.to_json() for finding in section] for key, section in self._sections.items()},
            **self.figures,
        }
        try:
            write_atomically(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {path}: {error.strerror}; name a file in an existing directory") from None
