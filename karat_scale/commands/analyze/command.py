"""`karat analyze`: run every analysis on every run, and write the report. A failed analysis is one line."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from matplotlib.figure import Figure

from karat_scale.commands.analyze.curvature import analyze_sharpness
from karat_scale.commands.analyze.functions import analyze_distributions, analyze_functions
from karat_scale.commands.analyze.history import achieved, analyze_training, described
from karat_scale.commands.analyze.landscape import analyze_landscape
from karat_scale.commands.analyze.maps import analyze_maps
from karat_scale.commands.analyze.matrices import analyze_content, analyze_spectrum
from karat_scale.commands.analyze.output import Written, read_written, safe_name, share_axes, write_result
from karat_scale.commands.analyze.predictions import analyze_accuracy, analyze_calibration, analyze_mistakes
from karat_scale.commands.analyze.report import TITLES, Problem, RunSummary, write_report
from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings
from karat_scale.commands.analyze.robustness import analyze_robustness
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from karat_scale.engine import distributed
from karat_scale.foundation.console import printable, work_display
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import make_folder

Analysis = Callable[[TrainedRun, Settings, Path], Result]
JointAnalysis = Callable[[Mapping[str, TrainedRun]], Result]

# Of all runs together, by their labels.
JOINT: dict[str, JointAnalysis] = {"training": analyze_training, "robustness": analyze_robustness}
# Of each run.
OWN: dict[str, Analysis] = {
    "accuracy": lambda run, settings, out: analyze_accuracy(run, settings),
    "calibration": lambda run, settings, out: analyze_calibration(run, settings),
    "mistakes": lambda run, settings, out: analyze_mistakes(run, settings),
    "spectrum": lambda run, settings, out: analyze_spectrum(run, settings),
    "content": lambda run, settings, out: analyze_content(run, settings),
    "maps": lambda run, settings, out: analyze_maps(run, settings),
    "functions": lambda run, settings, out: analyze_functions(run, settings),
    "distributions": lambda run, settings, out: analyze_distributions(run, settings),
    "landscape": analyze_landscape,
    "sharpness": lambda run, settings, out: analyze_sharpness(run, settings),
}
ANALYSES = tuple(TITLES)
SHARED = "landscape"


def analyze_paths(options: Namespace) -> int:
    """Call `analyze` with the options of the command line. Under torchrun, the ranks share the landscape.

    Raises:
        UserError: the run does not exist.
    """
    runs = [open_run(path, options.data, options.weights, options.checkpoint) for path in options.runs]
    settings = Settings(
        images=options.images,
        image_ids=tuple(options.image) if options.image else None,
        block=options.block,
        batch=options.batch,
        grid=options.grid,
        range=options.range,
        samples=options.samples,
        hessian_samples=options.hessian_samples,
        seed=options.seed,
    )
    own = runs[0].path / "analysis"
    if not options.out and own.is_symlink():  # in a run of somebody else, it may lead anywhere
        raise RunDirectoryError(f"{own}: is a link, and nothing is written where it leads; add --out DIR")
    out = Path(options.out) if options.out else own
    if distributed.launch_environment(os.environ)[1] == 1:
        return analyze(runs, options.only, settings, out)
    world = distributed.start("auto")
    try:
        return analyze(runs, options.only, replace(settings, world=world), out)
    finally:
        distributed.stop()


def analyze(runs: Sequence[TrainedRun], names: Sequence[str], settings: Settings, out: Path) -> int:
    """Run the analyses `names` on each run and write OUT/report.html; return the exit code.

    OUT/<analysis>/<run>/ holds figures and numbers. The report also shows what an earlier command wrote there for the
    same models. The exit code is 0 if any analysis ran; else it is 2 and no report is written. Work that ranks share
    comes first, so that they need not wait for rank 0, which does the rest.

    Raises:
        UserError: OUT cannot be written.
    """
    labels = unique_labels(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"--out {out}: {error.strerror}; choose another directory") from None
    if settings.world.size > 1:
        names = [name for name in names if name == SHARED] + [name for name in names if name != SHARED]
    if not settings.world.is_main:
        return _assist(runs, labels, settings, out) if SHARED in names else 0
    named = dict(zip(labels, runs, strict=True))
    with work_display() as show:
        work = _Work(named, settings, out, show)
        for name in names:
            work.make(name)
    report = out / "report.html"
    if not work.written:
        print(f"error: no analysis was possible, so {report} was not written", file=sys.stderr)
        return 2
    write_report(report, [_card(run, label) for label, run in named.items()], work.with_earlier(), work.problems)
    print(f"report: {report}")
    return 0


class _Work:
    """Makes one analysis after the other for all runs, and remembers what could not be made.

    written: by analysis, then by the run's label; "" is of all runs together.
    """

    def __init__(
        self, runs: Mapping[str, TrainedRun], settings: Settings, out: Path, show: Callable[[str, int, int], None]
    ) -> None:
        self._runs, self._settings, self._out, self._show = runs, settings, out, show
        self._together = " ".join(run.fingerprint for run in runs.values())
        self.written: dict[str, dict[str, Written]] = {}
        self.problems: list[Problem] = []

    def make(self, name: str) -> None:
        """Make an analysis. It is written when all runs have it, since their figures get the same axes."""
        results: dict[str, Result] = {}
        for label in [""] if name in JOINT else self._runs:
            with self._told_if_impossible(name, label):
                results[label] = self._result(name, label)
        _share_axes(list(results.values()))
        for label, result in results.items():
            with self._told_if_impossible(name, label):
                directory, settings = self._place(name, label), self._telling(label)
                written = write_result(result, directory, self._fingerprint(label), settings)
                self.written.setdefault(name, {})[label] = written
                for note in result.notes:
                    print(printable(f"note: {_named(name, label)}: {note}"), file=sys.stderr)

    def with_earlier(self) -> dict[str, dict[str, Written]]:
        """Return the new results, and earlier ones of the same models, in the order of ANALYSES."""
        shown: dict[str, dict[str, Written]] = {}
        for name in ANALYSES:
            for label in [""] if name in JOINT else self._runs:
                made = self.written.get(name, {}).get(label)
                made = made or read_written(self._place(name, label), self._fingerprint(label))
                if made:
                    shown.setdefault(name, {})[label] = made
        return shown

    def _result(self, name: str, label: str) -> Result:
        if name in JOINT:
            return JOINT[name](self._runs)
        directory = self._place(name, label)
        make_folder(directory)
        return OWN[name](self._runs[label], self._telling(label), directory)

    @contextmanager
    def _told_if_impossible(self, name: str, label: str) -> Iterator[None]:
        """Add a problem, and print it, unless it was printed for another analysis of this run."""
        try:
            yield
        except (UserError, OSError) as error:
            message, harmless = " ".join(str(error).split()), isinstance(error, NothingToShowError)
            for number, known in enumerate(self.problems):
                if (known.label, known.message) == (label, message):
                    self.problems[number] = replace(known, analyses=(*known.analyses, TITLES[name]))
                    return
            self.problems.append(Problem((TITLES[name],), label, message, harmless))
            print(printable(f"{'note' if harmless else 'error'}: {_named(name, label)}: {message}"), file=sys.stderr)

    def _place(self, name: str, label: str) -> Path:
        return self._out / name / safe_name(label) if label else self._out / name

    def _fingerprint(self, label: str) -> str:
        return self._runs[label].fingerprint if label else self._together

    def _telling(self, label: str) -> Settings:
        """Return the settings with a progress that names the run."""
        before = f"{label}: " if label else ""
        return replace(
            self._settings,
            progress=lambda what, done, total: self._show(before + what, done, total),
            tell=lambda text: print(printable(f"note: {before}{text}"), file=sys.stderr, flush=True),
        )


def _named(name: str, label: str) -> str:
    return f"{name} of {label}" if label else name


def _share_axes(results: Sequence[Result]) -> None:
    """Give the figures that several runs have the same axes and colours."""
    for name in dict.fromkeys(name for result in results for name in result.figures):
        found = [result.figures[name][0] for result in results if name in result.figures]
        share_axes([figure for figure in found if isinstance(figure, Figure)])


def _card(run: TrainedRun, label: str) -> RunSummary:
    score, facts = achieved(run)
    return RunSummary(label, {**facts, **described(run)}, score)


def _assist(runs: Sequence[TrainedRun], labels: Sequence[str], settings: Settings, out: Path) -> int:
    """Compute this rank's share. Rank 0 reports what is not possible."""
    for run, label in zip(runs, labels, strict=True):
        directory = out / SHARED / safe_name(label)
        with suppress(UserError, OSError):
            make_folder(directory)
            OWN[SHARED](run, settings, directory)
    return 0


def unique_labels(runs: Sequence[TrainedRun]) -> list[str]:
    """Return the names of the run directories, with numbers added to equal names."""
    labels: list[str] = []
    for run in runs:
        names = chain([run.label], (f"{run.label} ({number})" for number in count(2)))
        labels.append(next(name for name in names if name not in labels))
    return labels
