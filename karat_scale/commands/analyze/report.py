"""The HTML report: one file that opens offline, with every figure inside and every text escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karat_scale.commands.analyze.analyses import ANALYSES
from karat_scale.commands.analyze.result import Written
from karat_scale.commands.figures import themed
from karat_scale.foundation.files import replace_file
from karat_scale.foundation.html_page import render_page

_KINDS = ("figure", "gallery", "table")
_EMPTY = dict.fromkeys(_KINDS)


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
        themed=themed,
    )
    replace_file(path, page)


def _section(name: str, by_run: Mapping[str, Written]) -> dict[str, Any]:
    """Return one analysis of all runs, for the template."""
    notes = [(label, note) for label, made in by_run.items() for note in made.notes]
    early = "made by an earlier command, whose options may have been others"
    notes += [(label, early) for label, made in by_run.items() if made.earlier]
    title, _, introduction, _ = ANALYSES[name]
    return {"name": name, "title": title, "introduction": introduction, "notes": notes, "rows": _rows(by_run)}


def _rows(by_run: Mapping[str, Written]) -> list[dict[str, Any]]:
    """Return rows of the same figure, table or gallery of several runs, in the order of the run that has most."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, made in sorted(by_run.items(), key=lambda item: -len(item[1].figures)):
        for kind, parts in {
            "figure": {figure.name: figure for figure in made.figures},
            "gallery": made.galleries,
            "table": {table.title: table for table in made.tables},
        }.items():
            for title, part in parts.items():
                found.setdefault((kind, title), []).append({**_EMPTY, "label": label, kind: part})
    if "" in by_run:  # one figure has all runs, so different figures stand side by side
        figures = [cells[0] for (kind, _), cells in found.items() if kind == "figure"]
        found = {key: cells for key, cells in found.items() if key[0] != "figure"} | {("figure", ""): figures}
    rows = []
    for (kind, title), cells in sorted(found.items(), key=lambda item: _KINDS.index(item[0][0])):
        captions = {cell["figure"].caption for cell in cells if kind == "figure"}
        caption = captions.pop() if len(captions) == 1 else ""
        cells = sorted(cells, key=lambda cell: [*by_run].index(cell["label"]))
        rows.append({"kind": kind, "title": title, "caption": caption, "cells": cells})
    return rows
