"""What the doctor found, and its output: tables on a terminal, plain lines elsewhere, and JSON. Needs no library."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from karat_scale import __version__
from karat_scale.foundation.console import make_table, plural, print_table, printable, terminal, write_json
from karat_scale.foundation.errors import DataError, UserError

Level = Literal["ok", "note", "problem"]
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    level: "ok", "note" (works, but worth knowing) or "problem" (training fails or goes wrong). fix: how to fix
    it. figures: the same as numbers, for the JSON file.
    """

    name: str
    level: Level
    value: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for JSON. Scripts read the fix by its old name, `mend`."""
        return {"name": self.name, "level": self.level, "value": self.value, "mend": self.fix, **self.figures}


def found(name: str, value: str, fix: str = "", *, wrong: bool = False, **figures: Any) -> Finding:
    """Return a finding with its level: a problem if `wrong`, else a note if there is something to fix."""
    return Finding(name, "problem" if wrong else "note" if fix else "ok", value, fix, figures)


def examine(name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings, or a problem if the check fails: a broken library must not stop the doctor.

    A wrong recipe is the caller's mistake, so its error is raised.
    """
    try:
        return list(examination())
    except DataError as error:
        return [Finding(name, "problem", str(error))]
    except UserError:
        raise
    except Exception as error:  # any error of a broken library or driver
        reason = " ".join(str(error).split()) or "no reason given"
        return [Finding(name, "problem", f"cannot be examined: {type(error).__name__}: {reason}")]


class Printer:
    """Prints the report on rank 0, and nothing on other ranks."""

    def __init__(self, is_main: bool = True) -> None:
        self._is_main = is_main
        self._console = terminal() if is_main else None

    def findings(self, title: str, findings: Iterable[Finding]) -> None:
        """Print the findings of one part: a table on a terminal, else a line per finding."""
        if self._console is None:
            self.line(f"\n{title}")
            for finding in findings:
                fix = f" -> {finding.fix}" if finding.fix else ""
                self.line(f"  {finding.level:<8} {finding.name}: {finding.value}{fix}")
            return
        from rich.text import Text

        table = make_table(title, ("", "", ""), texts=(0, 1, 2))
        table.show_header = False
        for finding in findings:
            said = Text(printable(finding.value))
            if finding.fix:
                said.append(f"\n{printable(finding.fix)}", style="dim")
            table.add_row(Text(finding.level, style=COLOURS[finding.level]), Text(finding.name), said)
        self._console.print(table)

    def table(self, title: str, header: Row, rows: Sequence[Row]) -> None:
        """Print figures: a name, a number, and a detail."""
        if self._is_main:
            print_table(title, header, rows, texts=(0, 2))

    def line(self, text: str) -> None:
        """Print a line."""
        if self._is_main:
            print(text, flush=True)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show the current work until it is done: a spinner on a terminal, else a line."""
        if self._console is not None:
            return self._console.status(text)
        self.line(f"  {text} ...")
        return nullcontext()


class Report:
    """Collects the findings, prints each at once, and knows the exit code."""

    def __init__(self, printer: Printer) -> None:
        self.printer = printer
        self.figures: dict[str, Any] = {}
        self._sections: dict[str, list[Finding]] = {}

    def add(self, key: str, title: str, findings: list[Finding]) -> None:
        """Add and print the findings of one part."""
        self._sections.setdefault(key, []).extend(findings)
        self.printer.findings(title, findings)

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
        self.printer.line(f"\n{plural(problems, 'problem')}{names}, {plural(notes, 'note')}")

    def write(self, file: str) -> None:
        """Write everything as JSON. Raises UserError if the file cannot be written."""
        content = {
            "version": __version__,
            "exit": self.exit_code,
            "problems": [finding.name for finding in self.problems],
            **{key: [finding.to_json() for finding in section] for key, section in self._sections.items()},
            **self.figures,
        }
        try:
            write_json(file, content)
        except OSError as error:
            raise UserError(f"--json {file}: {error.strerror}; name a file in an existing directory") from None
