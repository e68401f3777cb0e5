"""The HTML report: one file that opens offline, with every figure inside and every text escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from karat_scale.commands.analyze.output import Written, WrittenFigure, themed
from karat_scale.commands.analyze.result import Table, Tile
from karat_scale.foundation.files import replace_file
from karat_scale.foundation.html_page import render_page

TITLES = {
    "training": "Training",
    "accuracy": "Accuracy",
    "calibration": "Calibration",
    "mistakes": "Mistakes and close calls",
    "robustness": "Other test sets",
    "spectrum": "Spectral behaviour",
    "content": "What S depends on",
    "maps": "Attention maps",
    "functions": "Learned functions",
    "distributions": "Weight distributions",
    "landscape": "Loss landscape and optimizer path",
    "sharpness": "Sharpness",
}
INTRODUCTIONS = {
    "accuracy": "Every validation image counts once.",
    "calibration": "A calibrated model that says 80 % is right in 80 of 100 cases.",
    "mistakes": "Each picture is shown as the model sees it, and beside it with the last block's attention on it.",
    "spectrum": "A is the matrix of scores of queries and keys. S is what the operator, or softmax, makes of it.",
    "content": "A is the matrix of scores of queries and keys. S is what the operator, or softmax, makes of it.",
    "maps": "A is the matrix of scores of queries and keys. S is what the operator, or softmax, makes of it.",
    "distributions": "A smaller tail index means a heavier tail.",
}


@dataclass(frozen=True)
class RunSummary:
    """The report's information about a run: its name, its score in large letters, and facts, shown unchanged."""

    label: str
    facts: Mapping[str, str]
    score: str = ""


@dataclass(frozen=True)
class Problem:
    """Analyses of a run that were not possible, for one reason. It is `harmless` if they do not apply to the run."""

    analyses: Sequence[str]
    label: str
    message: str
    harmless: bool = False


@dataclass(frozen=True)
class Cell:
    """What one run (or, without a label, all runs together) has of a row of the report."""

    label: str
    figure: WrittenFigure | None = None
    table: Table | None = None
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True)
class Row:
    """The same figure, table or gallery of several runs, which stand side by side."""

    kind: str
    title: str
    cells: Sequence[Cell]

    @property
    def caption(self) -> str:
        """The figures' caption if they all have the same one."""
        captions = {cell.figure.caption for cell in self.cells if cell.figure}
        return captions.pop() if len(captions) == 1 else ""


@dataclass(frozen=True)
class Section:
    """One analysis of all runs."""

    name: str
    title: str
    introduction: str
    notes: Sequence[tuple[str, str]]
    rows: Sequence[Row]


def write_report(
    path: Path,
    runs: Sequence[RunSummary],
    written: Mapping[str, Mapping[str, Written]],
    problems: Sequence[Problem],
) -> None:
    """Write the report.

    Args:
        written: by analysis, then by the run's label; "" is of all runs together.
    """
    page = render_page(
        "karat_scale.commands.analyze",
        "report.html.j2",
        runs=runs,
        sections=[_section(name, by_run) for name, by_run in written.items()],
        problems=[problem for problem in problems if not problem.harmless],
        harmless=[problem for problem in problems if problem.harmless],
        titles=TITLES,
        themed=themed,
    )
    replace_file(path, page)


def _section(name: str, by_run: Mapping[str, Written]) -> Section:
    notes = [(label, note) for label, made in by_run.items() for note in made.notes]
    early = "made by an earlier command, whose options may have been others"
    notes += [(label, early) for label, made in by_run.items() if made.earlier]
    return Section(name, TITLES[name], INTRODUCTIONS.get(name, ""), notes, _rows(by_run))


def _rows(by_run: Mapping[str, Written]) -> list[Row]:
    """Return what the runs have, by name, in the order of the run that has most."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for label, made in sorted(by_run.items(), key=lambda item: -len(item[1].figures)):
        for figure in made.figures:
            found.setdefault(("figure", figure.name), []).append(Cell(label, figure=figure))
        for table in made.tables:
            found.setdefault(("table", table.title), []).append(Cell(label, table=table))
        for title, tiles in made.galleries.items():
            found.setdefault(("gallery", title), []).append(Cell(label, tiles=tiles))
    if "" in by_run:  # one figure has all runs, so different figures stand side by side
        figures = [cells[0] for (kind, _), cells in found.items() if kind == "figure"]
        found = {key: cells for key, cells in found.items() if key[0] != "figure"} | {("figure", ""): figures}
    places = {label: number for number, label in enumerate(by_run)}
    kinds = ("figure", "gallery", "table")
    rows = [Row(kind, title, sorted(c, key=lambda cell: places[cell.label])) for (kind, title), c in found.items()]
    return sorted(rows, key=lambda row: kinds.index(row.kind))
