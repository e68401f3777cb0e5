"""`karat analyze`: run every analysis on every run, and write the report. A failed analysis is one line.

The report is one HTML file that opens offline, with every figure inside and every text escaped.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from torch import Tensor

from karat_scale.commands.analyze.analyses import ANALYSES
from karat_scale.commands.analyze.history import achieved, described, read_history
from karat_scale.commands.analyze.landscape import NEEDED, PROBES, PRODUCTS
from karat_scale.commands.analyze.predictions import FILE, PREDICT
from karat_scale.commands.analyze.result import (
    WORTH_TELLING,
    NothingToShowError,
    Result,
    Settings,
    read_written,
    safe_name,
    write_result,
)
from karat_scale.commands.analyze.summary import not_shown
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from karat_scale.commands.compare.comparison import compare_groups, separating
from karat_scale.commands.compare.finished import read_run
from karat_scale.commands.figures import share_axes, themed
from karat_scale.engine import distributed
from karat_scale.engine.distributed import ALONE
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.foundation.console import duration, printable, render_page, work_display
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import json_sha256, make_folder, replace_file
from karat_scale.foundation.machine import launch_environment
from karat_scale.models.factory import layer_sizes

PASSES = 20
"""Passes of a model that take as long as one of its Hessian-vector products."""
FIGURE = 0.8
"""Seconds to draw a figure and to write it as PNG and SVG."""
_SUMMARISED = {"content": 2, "functions": 1}
"""The number of an analysis's findings in the summary."""
_KINDS = ("figure", "gallery", "table")
_EMPTY = dict.fromkeys(_KINDS)


Show = Callable[[str, float, float], None]
Problems = dict[tuple[str, str, bool], list[str]]
"""The titles of the analyses that were not possible, by the run's label, the reason, and whether the reason is harmless
(the analyses do not apply to the run).
"""


def write_report(
    path: Path,
    runs: Sequence[Mapping[str, Any]],
    written: Mapping[str, Mapping[str, Result]],
    problems: Problems,
    summary: Sequence[str] = (),
) -> None:
    """Write the report.

    Args:
        runs: for each run its `label`, its `score` in large letters, `facts` by name, and in `summary` sentences, each
            with the analysis that found it, or with "".
        written: the results by analysis, then by the run's label; "" stands for all runs together.
        summary: sentences about all runs.
    """
    page = render_page(
        "karat_scale.commands.analyze",
        "report.html.j2",
        runs=runs,
        summary=summary,
        linked=linked,
        sections=[(name, ANALYSES[name].title, by_run, _rows(by_run)) for name, by_run in written.items()],
        problems=problems,
        themed=themed,
    )
    replace_file(path, page)


def linked(text: str, glossary: Mapping[str, str]) -> Markup:
    """Return escaped text in which the first mention of each term links to the glossary and shows its entry."""
    terms = sorted(glossary, key=len, reverse=True)
    any_form = [f"{term[:-1]}(?:y|ies)" if term.endswith("y") else f"{re.escape(term)}s?" for term in terms]
    pattern = "|".join(f"({form})" if len(form) == 3 else f"((?i:{form}))" for form in any_form)
    parts: list[Markup] = []
    end, seen = 0, set[str]()
    for found in re.finditer(rf"\b(?:{pattern})\b", text):
        term = terms[(found.lastindex or 1) - 1]
        if term not in seen:
            link = Markup('<a class="term" href="#term-{}" title="{}">{}</a>')
            link = link.format(term.replace(" ", "-"), glossary[term], found[0])
            parts += [escape(text[end : found.start()]), link]
            seen, end = {*seen, term}, found.end()
    return Markup("").join([*parts, escape(text[end:])])


def _rows(by_run: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Return rows of the same figure, table or gallery of several runs, in the order of the run with most figures."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for label, made in sorted(by_run.items(), key=lambda item: -len(item[1].svgs)):
        # Figures of all runs together stand side by side in one row.
        parts: list[tuple[str, str, Any]] = [("figure", one.name if label else "", one) for one in made.svgs]
        parts += [("gallery", title, tiles) for title, tiles in made.galleries.items()]
        parts += [("table", table.title, table) for table in made.tables]
        for kind, title, part in parts:
            found.setdefault((kind, title), []).append({**_EMPTY, "label": label, kind: part})
    rows = []
    for (kind, title), cells in sorted(found.items(), key=lambda item: _KINDS.index(item[0][0])):
        captions = {cell["figure"].caption for cell in cells if kind == "figure"}
        caption = captions.pop() if len(captions) == 1 else ""
        cells = sorted(cells, key=lambda cell: [*by_run].index(cell["label"]))
        rows.append({"kind": kind, "title": title, "caption": caption, "cells": cells})
    return rows


SHARED = "landscape"
"""The analysis whose work the ranks share."""


def analyze_paths(
    runs: Sequence[str],
    only: Sequence[str],
    out: str | None,
    data: str | None,
    checkpoint: str,
    weights: str,
    settings: Settings,
) -> int:
    """Run the analyses `only` on each run and write OUT/report.html; return the exit code.

    OUT/<analysis>/<run>/ holds figures and numbers. The report also shows what an earlier command wrote there for the
    same models. The exit code is 0 if any analysis ran; else it is 2 and no report is written. Ctrl-C leaves a report
    of the finished analyses. Under torchrun, the ranks share the landscape. The landscape comes first, so that the
    other ranks need not wait for rank 0, which does the rest.

    Raises:
        UserError: the run does not exist, or OUT cannot be written.
    """
    opened = [open_run(path, data, weights, checkpoint) for path in runs]
    own = opened[0].path / "analysis"
    if not out and own.is_symlink():  # in a run of somebody else, it may lead anywhere
        raise RunDirectoryError(f"{own}: is a link, and nothing is written where it leads; add --out DIR")
    directory = Path(out) if out else own
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"--out {directory}: {error.strerror}; choose another directory") from None
    if not os.access(directory, os.W_OK):
        raise RunDirectoryError(f"{directory} is not writable; choose another directory by --out")
    is_alone = launch_environment(os.environ)[1] == 1
    with (
        nullcontext(ALONE) if is_alone else distributed.joined("auto") as world,
        work_display("all") if world.is_main else nullcontext(lambda what, done, total: None) as show,
    ):
        names = only if is_alone else sorted(only, key=lambda name: name != SHARED)
        work = _Work(opened, names, replace(settings, world=world), directory, show)
        if not world.is_main:
            if SHARED in names:
                work.assist()
            return 0
        report = directory / "report.html"
        try:
            for name in names:
                work.make(name)
        finally:
            if work.written:
                work.report(report)
    if not work.written:
        print(f"error: no analysis was possible, so {report} was not written", file=sys.stderr)
        return 2
    print(f"report: {report}")
    return 0


@torch.no_grad()
def _expected(run: TrainedRun, names: Sequence[str], settings: Settings) -> dict[tuple[str, str], float]:
    """Return the expected seconds by analysis and by the name of its work, timed on random weights and images."""
    model, side, sizes = run.new_model(), run.recipe.model.image_size, layer_sizes(run.recipe.model)
    pictures = torch.rand(settings.batch, 3, side, side, device=run.device)
    matrices = torch.rand(2 * sizes[-1].heads * sizes[-1].sets, sizes[-1].tokens, sizes[-1].tokens, device=run.device)
    image = _seconds(lambda: model(pictures)) / len(pictures)
    spectra = len(sizes) * _seconds(lambda: torch.linalg.svdvals(matrices))
    tested = max((point["images"] for point in read_history(run).evaluations if point["images"] > 0), default=0.0)
    predicting = next((name for name in names if name in ("accuracy", "calibration", "mistakes")), "")
    once = settings.images * image
    grid = settings.grid**2 * settings.samples * image / settings.world.size
    products = PRODUCTS * settings.eigenvalues + PROBES
    figures = {"accuracy": 1, "calibration": 1, "spectrum": 2, "content": 1, "maps": 4, "functions": 2 + len(sizes)}
    figures |= {"distributions": 2, "landscape": 3}
    seconds = {
        (predicting, PREDICT): 0.0 if (run.path / FILE).is_file() else tested * image,
        ("spectrum", "spectrum"): once + settings.images * spectra,
        ("content", "content"): once,
        ("content", "top-1 with averaged S"): 3 * once,
        ("functions", "scores"): once,
        ("functions", "distance from softmax"): once,
        ("landscape", "landscape, path"): grid if len(run.in_order) >= NEEDED else 0.0,
        ("landscape", "landscape, random"): grid,
        ("sharpness", "sharpness"): products * PASSES * settings.hessian_samples * image,
        **{(name, "draw figures"): FIGURE * count for name, count in figures.items()},
    }
    return {key: cost for key, cost in seconds.items() if key[0] in names}


def _seconds(call: Callable[[], Tensor]) -> float:
    call().cpu()  # warms up
    started = time.perf_counter()
    call().cpu()
    return time.perf_counter() - started


class _Work:
    """Makes one analysis after the other for all runs, and remembers what could not be made.

    runs: the runs by their labels. written: the analyses that were made, with the run's label; "" stands for all runs
    together.
    """

    def __init__(
        self, runs: Sequence[TrainedRun], names: Sequence[str], settings: Settings, out: Path, show: Show
    ) -> None:
        self.runs = dict(zip(unique_labels(runs), runs, strict=True))
        self.written: set[tuple[str, str]] = set()
        self.problems: Problems = {}
        self._settings, self._out, self._show = settings, out, show
        # For each piece of work: the expected seconds and the share that is done.
        self._seconds: dict[tuple[str, str, str], float] = {}
        if "training" in names:
            self._seconds["training", "", "draw figures"] = 5 * FIGURE
        own = [name for name in names if not ANALYSES[name].of_all]
        for label, run in self.runs.items() if own and settings.world.is_main else ():  # to time a model takes seconds
            with suppress(UserError), one_line_out_of_memory(str):  # its analyses will report the error
                costs = _expected(run, own, settings)
                self._seconds |= {(name, label, what): cost for (name, what), cost in costs.items()}
        self._done = dict.fromkeys(self._seconds, 0.0)
        of_names = {name: sum(cost for key, cost in self._seconds.items() if key[0] == name) for name in names}
        if (total := sum(of_names.values())) > WORTH_TELLING:
            parts = [f"{name} {duration(cost)}" for name, cost in of_names.items() if cost > WORTH_TELLING]
            longest = f"; {', '.join(parts)}" if parts else ""
            print(f"note: up to about {duration(total)} in all{longest}", file=sys.stderr, flush=True)

    def make(self, name: str) -> None:
        """Make an analysis. Results are written when all runs have theirs, since their figures get the same axes."""
        results: dict[str, Result] = {}
        for label in self._labels(name):
            with self._told_if_impossible(name, label):
                results[label] = self._made(name, label)
        for figure in dict.fromkeys(figure for result in results.values() for figure in result.figures):
            found = [result.figures[figure][0] for result in results.values() if figure in result.figures]
            share_axes([one for one in found if isinstance(one, Figure)])
        for label, result in results.items():
            with self._told_if_impossible(name, label):
                write_result(result, self._fingerprint(label), self._settings_of(name, label))
                self.written.add((name, label))
                for note in result.notes:
                    print(printable(f"note: {_named(name, label)}: {note}"), file=sys.stderr)
        self._done |= {key: 1.0 for key in self._done if key[0] == name}

    def assist(self) -> None:
        """Compute this rank's share. Rank 0 reports what is not possible."""
        for label in self.runs:
            with suppress(UserError, OSError):
                self._made(SHARED, label)

    def report(self, path: Path) -> None:
        """Write the report of the new results, and of earlier ones of the same models, in the order of ANALYSES."""
        shown: dict[str, dict[str, Result]] = {}
        for name in ANALYSES:
            for label in self._labels(name):
                made = read_written(self._settings_of(name, label).directory, self._fingerprint(label))
                if made:
                    made.is_earlier = (name, label) not in self.written
                    shown.setdefault(name, {})[label] = made
        cards, several = [], len(self.runs) > 1
        together = self._together("robustness" in shown)
        of_score = next((name for name in ("accuracy", "training") if name in shown), "")
        for label, run in self.runs.items():
            score, facts, accuracy = achieved(run)
            facts |= described(run)
            model, attention, budget = (facts.pop(name) for name in ("model", "attention", "budget"))
            name, _, size = model.partition(", ")
            trained = f"The model {name} ({size}) with {attention} was trained for {budget}."
            sentences = [("", trained), (of_score, accuracy)]
            sentences += [
                (name, text)
                for name, count in _SUMMARISED.items()
                if label in shown.get(name, {})
                for text in shown[name][label].findings[:count]
            ]
            sentences += [("", text) for text in together if not several]
            said = [one for one in sentences if one[1]]
            cards.append({"label": label, "facts": facts, "score": score, "summary": said})
        write_report(path, cards, shown, self.problems, together if several else ())

    def _together(self, has_other_tests: bool) -> list[str]:
        """Return sentences that compare several runs by their last evaluations, and one on what they cannot show."""
        sections = [run.recipe.attention for run in self.runs.values()]
        kinds = {one.kind for one in sections if not (one.blocks or one.transfer_from)}  # else it is not a single kind
        seeds = {(json_sha256(separating(run.recipe)), run.recipe.run.seed) for run in self.runs.values()}
        absent = not_shown(kinds, len({recipe for recipe, _ in seeds}) < len(seeds), has_other_tests)
        if len(self.runs) > 1:
            try:
                finished = [read_run(str(run.path)) for run in self.runs.values()]
                return [*compare_groups(finished, None)[0].summary, *absent]
            except UserError as error:
                return [f"The runs are not compared: {error}.", *absent]
        return absent

    def _labels(self, name: str) -> list[str]:
        return [""] if ANALYSES[name].of_all else [*self.runs]

    def _made(self, name: str, label: str) -> Result:
        settings = self._settings_of(name, label)
        if label:
            make_folder(settings.directory)
        shares = name == SHARED and settings.world.size > 1  # then one rank must not give up alone
        with nullcontext() if shares else one_line_out_of_memory(lambda: f"lower --batch (now {settings.batch})"):
            found: Result = ANALYSES[name](self.runs[label], settings) if label else ANALYSES[name](self.runs)
        return found

    @contextmanager
    def _told_if_impossible(self, name: str, label: str) -> Iterator[None]:
        """Catch an error, add it to the problems, and print it unless another analysis of this run has printed it."""
        try:
            yield
        except (UserError, OSError) as error:
            message, harmless = " ".join(str(error).split()), isinstance(error, NothingToShowError)
            # These keys are not options of this command.
            message = re.sub(r"set data\.path=(.+), which has it$", r"use --data \1, which has it", message)
            if "data.path" in message or "data.backend" in message:
                message = f"{message.partition(';')[0]}; give the directory of the data by --data"
            if (label, message, harmless) not in self.problems:
                told = f"{'note' if harmless else 'error'}: {_named(name, label)}: {message}"
                print(printable(told), file=sys.stderr)
            self.problems.setdefault((label, message, harmless), []).append(ANALYSES[name].title)

    def _fingerprint(self, label: str) -> str:
        return self.runs[label].fingerprint if label else " ".join(run.fingerprint for run in self.runs.values())

    def _settings_of(self, name: str, label: str) -> Settings:
        """Return the settings with the directory of the analysis, and with functions that name the run."""

        def tell(text: str) -> None:
            if self._settings.world.is_main:
                print(printable(f"note: {label}{': ' if label else ''}{text}"), file=sys.stderr, flush=True)

        return replace(
            self._settings,
            directory=self._out / name / safe_name(label) if label else self._out / name,
            progress=partial(self._progress, name, label),
            expect=partial(self._expect, name, label),
            tell=tell,
        )

    def _progress(self, name: str, label: str, what: str, done: int, total: int) -> None:
        self._done |= {key: done / total for key in self._done if key == (name, label, what)}
        work = sum(self._seconds[key] * share for key, share in self._done.items())
        shown = f"{label}: {what}" if label else what
        self._show(shown, 100 * work / (sum(self._seconds.values()) or 1), 100)

    def _expect(self, name: str, label: str, seconds: float) -> None:
        """Scale the expected seconds of an analysis of a run to the measured ones."""
        own = {key: cost for key, cost in self._seconds.items() if key[:2] == (name, label)}
        self._seconds |= {key: cost * seconds / (sum(own.values()) or 1) for key, cost in own.items()}


def _named(name: str, label: str) -> str:
    return f"{name} of {label}" if label else name


def unique_labels(runs: Sequence[TrainedRun]) -> list[str]:
    """Return the names of the run directories, with numbers added to names that have the same `safe_name`."""
    labels: dict[str, str] = {}
    for run in runs:
        names = chain([run.label], (f"{run.label} ({number})" for number in count(2)))
        label = next(name for name in names if safe_name(name) not in labels)
        labels[safe_name(label)] = label
    return [*labels.values()]
