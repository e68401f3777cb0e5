"""`karat compare RUN...`: reads the runs, prints the tables, and writes the files that were asked for."""

import sys
from collections.abc import Sequence
from pathlib import Path

from karat_scale.commands.compare.comparison import compare_groups
from karat_scale.commands.compare.finished import FinishedRun, read_run
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, on_one_line

_SHOWN_KEYS = 3  # of those that differ, on a terminal


def compare_runs(paths: Sequence[str], score: str | None, out: str | None, json_file: str | None) -> int:
    """Compare runs over their seeds; returns the exit code.

    Args:
        paths: directories of runs. The group of the first usable one is what the others are compared with.
        score: what the groups are compared by; None is top-1, or box AP of detectors.
        out: a directory for Markdown, CSV, HTML and figures.
        json_file: a file for all figures.

    Raises:
        UserError: no run is usable, the runs cannot be compared, or a file cannot be written.
    """
    runs, notes = _read(paths)
    if not runs:
        raise UserError(f"no run to compare: {notes[0]}" if len(notes) == 1 else _none_of(notes))
    comparison, repeated = compare_groups(runs, score)
    notes += [f"left out: {line}" for line in repeated]
    machines = dict.fromkeys(run.machine for run in runs)
    if len(machines) > 1:
        notes.append(f"note: images a second and hours are of different machines: {'; '.join(machines)}")
    notes = [on_one_line(line) for line in notes]
    for line in notes:
        print(line, file=sys.stderr)
    for table in comparison.tables(_SHOWN_KEYS):
        print_table(*table)
    for line in comparison.warnings:
        print(f"\nwarning: budgets differ: {on_one_line(line)}", file=sys.stderr)
    write_json(json_file, {**comparison.to_json(), "notes": notes})
    if out:
        from karat_scale.commands.compare.page import write_files

        print()
        for path in write_files(Path(out), comparison, notes):
            print(path)
    return 0


def _read(paths: Sequence[str]) -> tuple[list[FinishedRun], list[str]]:
    """Return the usable runs, each once, and a line for what is left out."""
    runs: dict[Path, FinishedRun] = {}
    notes = []
    for path in paths:
        place = Path(path).expanduser().resolve()
        if place in runs:
            notes.append(f"left out: {path} is the directory of {runs[place].path}")
            continue
        try:
            runs[place] = read_run(path)
        except UserError as error:
            notes.append(f"left out: {error}")
            continue
        if note := runs[place].damage:
            notes.append(f"note: {note}")
    return list(runs.values()), notes


def _none_of(notes: Sequence[str]) -> str:
    for line in notes:
        print(on_one_line(line), file=sys.stderr)
    return f"no run to compare: none of the {len(notes)} is finished and whole; the lines above say why"
