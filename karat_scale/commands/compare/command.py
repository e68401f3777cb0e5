"""`karat compare RUN...`: reads the runs, prints the tables, and writes the files of `--out`.

The files are Markdown, CSV, figures, and one HTML page that opens offline. A curve is a score over steps, samples or
hours: the mean of a group, and its spread as a band.
"""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.commands.compare.comparison import Comparison, Group, compare_groups
from karat_scale.commands.compare.finished import MEASURES, SCORES, FinishedRun, read_run
from karat_scale.commands.figures import COLOURS, new_axes, rendered
from karat_scale.foundation.console import print_table, printable, render_page, wrapped, write_json
from karat_scale.foundation.errors import UserError, on_one_line
from karat_scale.foundation.files import write_atomically

AXES = ("steps", "samples", "hours")
_STYLES = ("-", "--", ":")  # for groups with the same colour
_LONGEST = 60  # characters of a label in a legend
Array = npt.NDArray[np.float64]
_SHOWN_KEYS = 3  # of the differing keys, on a terminal
_LEFT_OUT = "left out: "


def compare_runs(
    runs: Sequence[str],
    metric: str | None = None,
    match: str | None = None,
    out: str | None = None,
    json_file: str | None = None,
) -> int:
    """Compare runs over their seeds; returns the exit code.

    Args:
        runs: the runs' directories. The other groups are compared with the group of the first usable run.
        metric: the score to compare the groups by; None is top-1, or box AP for detectors.
        match: one of MEASURES; groups that differ in it from the first one are left out.
        out: a directory for Markdown, CSV, HTML and figures.
        json_file: a file for all figures.

    Raises:
        UserError: no run is usable, the runs cannot be compared, or a file cannot be written.
    """
    usable, notes = _read(runs)
    if not usable:
        for line in notes if len(notes) > 1 else ():
            print(on_one_line(line), file=sys.stderr)
        several = f"none of the {len(notes)} is finished and whole; the lines above say why"
        raise UserError(f"no run to compare: {several if len(notes) > 1 else notes[0].removeprefix(_LEFT_OUT)}")
    comparison, left_out = compare_groups(usable, metric, match)
    notes += [f"{_LEFT_OUT}{line}" for line in left_out]
    machines = dict.fromkeys(run.machine for run in usable)
    if len(machines) > 1:
        notes.append(f"note: images a second and hours are of different machines: {'; '.join(machines)}")
    notes = [on_one_line(line) for line in notes]
    for line in notes:
        print(line, file=sys.stderr)
    for table in comparison.tables(_SHOWN_KEYS):
        print_table(*table)
    print(f"\n{wrapped(on_one_line(' '.join(comparison.summary)), '')}")
    for line in comparison.warnings:
        print(f"\nwarning: budgets differ: {on_one_line(line)}", file=sys.stderr)
    write_json(json_file, {**comparison.to_json(), "notes": notes})
    if out:
        print()
        for path in write_files(Path(out), comparison, notes):
            print(path)
    return 0


def _read(paths: Sequence[str]) -> tuple[list[FinishedRun], list[str]]:
    """Return the usable runs, each once, and a line for each run that is left out or damaged."""
    runs: dict[Path, FinishedRun] = {}
    notes = []
    for path in paths:
        place = Path(path).expanduser().resolve()
        if place in runs:
            notes.append(f"{_LEFT_OUT}{path} is named twice")
            continue
        try:
            runs[place] = read_run(path)
        except UserError as error:
            notes.append(f"{_LEFT_OUT}{error}")
            continue
        if note := runs[place].damage:
            notes.append(f"note: {note}")
    return list(runs.values()), notes


def write_files(directory: Path, comparison: Comparison, notes: Sequence[str]) -> list[Path]:
    """Write all files and return their paths. Raises UserError if the directory cannot be written."""
    pictures = draw_curves(comparison.groups, comparison.score)
    contents: dict[str, bytes | str] = {f"curve_{axis}.png": picture for axis, picture in pictures.items()}
    contents["compare.md"] = markdown(comparison, notes, list(contents))
    contents["compare.csv"] = run_lines(comparison)
    values = {"comparison": comparison, "title": title(comparison), "score": SCORES[comparison.score].title}
    page = render_page("karat_scale.commands.compare", "compare.html.j2", **values, notes=notes, pictures=pictures)
    contents["compare.html"] = page
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(directory / name, content)
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}; choose another directory") from error
    return [directory / name for name in contents]


def markdown(comparison: Comparison, notes: Sequence[str], pictures: Sequence[str]) -> str:
    """Return the comparison as Markdown that shows the pictures of these names."""
    parts = [f"# {title(comparison)}", _escaped(" ".join(comparison.summary))]
    for table in comparison.tables():
        rule = ["---" if column in table.texts else "---:" for column in range(len(table.header))]
        lines = [table.header, rule, *([_escaped(cell) for cell in row] for row in table.rows)]
        parts += [f"## {_escaped(table.title)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if said := [*(f"Budgets differ: {line}" for line in comparison.warnings), *notes]:
        parts.append("\n".join(f"- {_escaped(line)}" for line in said))
    parts += [f"![{SCORES[comparison.score].title} over the run]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def run_lines(comparison: Comparison) -> str:
    """Return a line of CSV for each run, with its group, seed, figures and budget."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    used = [name for name in MEASURES if any(group.by_seed(name) for group in comparison.groups)]
    budget = [field for field in comparison.groups[0].budget._fields if field != "classes_sha256"]
    writer.writerow(["group", "run", "seed", *used, *budget])
    for group in comparison.groups:
        for run in group.runs:
            figures = [run.values.get(name, "") for name in used] + [getattr(run.budget, field) for field in budget]
            writer.writerow([group.label, printable(str(run.path)), run.seed, *figures])
    return text.getvalue()


def title(comparison: Comparison) -> str:
    """Return the heading of the page."""
    labels = [group.label for group in comparison.groups]
    return f"{labels[0]} over its seeds" if len(labels) == 1 else f"Runs compared with {labels[0]}"


def _escaped(text: str) -> str:
    text = printable(text).replace("\\", "\\\\").replace("\n", " ")
    for sign in "|<*`[":
        text = text.replace(sign, f"\\{sign}")
    return text


def draw_curves(groups: Sequence[Group], score: str) -> dict[str, bytes]:
    """Return a PNG for each axis. A group whose runs share no range of steps is not in it."""
    pictures = {}
    for axis in AXES:
        figure, axes = new_axes(6, 3.6 + 0.2 * len(groups))
        for number, group in enumerate(groups):
            if (band := mean_and_spread(group, score, axis)) is None:
                continue
            x, mean, deviation = band
            label = f"{group.label[:_LONGEST]}, n = {len(group.runs)}".replace("$", r"\$")
            style = _STYLES[number // len(COLOURS) % len(_STYLES)]
            (line,) = axes.plot(x, mean, style, marker="o", markersize=3, label=label)
            axes.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel=axis, ylabel=SCORES[score].title)
        if axes.lines:
            figure.legend(loc="outside lower center")
        pictures[axis] = rendered(figure)
    return pictures


def mean_and_spread(group: Group, score: str, axis: str) -> tuple[Array, Array, Array] | None:
    """Return x, mean and standard deviation (0 of a single run); None if the runs share no range of steps.

    Runs are compared at equal steps, over all steps at which any of them was evaluated; the others are interpolated.
    Over hours, x is the mean of the runs' hours at those steps.
    """
    evaluated = [[point for point in run.curve if score in point.scores] for run in group.runs]
    curves = [np.array([(p.step, p.samples, p.hours, p.scores[score]) for p in own]) for own in evaluated if own]
    if not curves:
        return None
    low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    steps = np.unique(np.concatenate([curve[:, 0] for curve in curves]))
    steps = steps[(steps >= low) & (steps <= high)]
    if not len(steps):
        return None
    column = AXES.index(axis)
    x = np.mean([np.interp(steps, curve[:, 0], curve[:, column]) for curve in curves], axis=0)
    values = np.array([np.interp(steps, curve[:, 0], curve[:, -1]) for curve in curves])
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return x, values.mean(axis=0), deviation
