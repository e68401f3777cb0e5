"""`karat analyze`: run every analysis on every run, and write the report. A failed analysis is one line."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from karat_scale.analysis.content import analyze_content
from karat_scale.analysis.distributions import analyze_distributions
from karat_scale.analysis.functions import analyze_functions
from karat_scale.analysis.landscape import analyze_landscape
from karat_scale.analysis.maps import analyze_maps
from karat_scale.analysis.output import Written, read_written, safe_name, write_result
from karat_scale.analysis.report import Problem, RunSummary, write_report
from karat_scale.analysis.result import Result, Settings
from karat_scale.analysis.spectrum import analyze_spectrum
from karat_scale.analysis.trained_run import TrainedRun, open_run
from karat_scale.console import work_display
from karat_scale.engine import distributed
from karat_scale.errors import RunDirectoryError, UserError
from karat_scale.models.factory import parameter_count

Analysis = Callable[[TrainedRun, Settings, Path], Result]

ANALYSES: dict[str, Analysis] = {
    "spectrum": lambda run, settings, out: analyze_spectrum(run, settings),
    "content": lambda run, settings, out: analyze_content(run, settings),
    "maps": lambda run, settings, out: analyze_maps(run, settings),
    "functions": lambda run, settings, out: analyze_functions(run, settings),
    "distributions": lambda run, settings, out: analyze_distributions(run, settings),
    "landscape": analyze_landscape,
}
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
        hessian_samples=min(options.samples, Settings.hessian_samples),
        seed=options.seed,
    )
    out = Path(options.out) if options.out else runs[0].path / "analysis"
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
    written: dict[str, dict[str, Written]] = {}
    problems: list[Problem] = []
    with work_display() as show:
        for name in names:
            for run, label in zip(runs, labels, strict=True):
                shown = _with_progress(settings, show, label)
                try:
                    directory = out / name / safe_name(label)
                    directory.mkdir(parents=True, exist_ok=True)
                    result = ANALYSES[name](run, shown, directory)
                    written.setdefault(name, {})[label] = write_result(result, directory, run.fingerprint)
                except (UserError, OSError) as error:
                    problems.append(Problem(name, label, " ".join(str(error).split())))
                    print(f"error: {name} of {label}: {problems[-1].message}", file=sys.stderr)
                else:
                    for note in result.notes:
                        print(f"note: {name} of {label}: {note}", file=sys.stderr)
    report = out / "report.html"
    if not written:
        print(f"error: no analysis was possible, so {report} was not written", file=sys.stderr)
        return 2
    summaries = [_summary(run, label) for run, label in zip(runs, labels, strict=True)]
    write_report(report, summaries, _with_earlier(written, runs, labels, out), problems)
    print(f"report: {report}")
    return 0


def _with_earlier(
    written: Mapping[str, Mapping[str, Written]], runs: Sequence[TrainedRun], labels: Sequence[str], out: Path
) -> dict[str, dict[str, Written]]:
    """Return the new results, and earlier ones of the same models, in the order of ANALYSES."""
    shown: dict[str, dict[str, Written]] = {}
    for name in ANALYSES:
        for run, label in zip(runs, labels, strict=True):
            made = written.get(name, {}).get(label) or read_written(out / name / safe_name(label), run.fingerprint)
            if made:
                shown.setdefault(name, {})[label] = made
    return shown


def _assist(runs: Sequence[TrainedRun], labels: Sequence[str], settings: Settings, out: Path) -> int:
    """Compute this rank's share. Rank 0 reports what is not possible."""
    for run, label in zip(runs, labels, strict=True):
        directory = out / SHARED / safe_name(label)
        with suppress(UserError, OSError):
            directory.mkdir(parents=True, exist_ok=True)
            ANALYSES[SHARED](run, settings, directory)
    return 0


def unique_labels(runs: Sequence[TrainedRun]) -> list[str]:
    """Return the names of the run directories, with numbers added to equal names."""
    labels: list[str] = []
    for run in runs:
        same = [label for label in labels if label == run.label or label.startswith(f"{run.label} (")]
        labels.append(f"{run.label} ({len(same) + 1})" if same else run.label)
    return labels


def _summary(run: TrainedRun, label: str) -> RunSummary:
    attention, model = run.recipe.attention, run.recipe.model
    kind: str = attention.kind
    if run.is_karat:
        kind += f", {attention.basis}, {attention.form}, {attention.mode}, grid {attention.grid}, rank {attention.rank}"
    facts = {"directory": str(run.path), "attention": kind}
    patch = f", patch {model.patch_size}" if model.patch_size else ""
    facts["model"] = f"{model.name}, {model.image_size} px{patch}"
    try:
        facts["parameters"] = f"{parameter_count(run.model()):,}"
        facts["checkpoint"] = f"{run.chosen} of {len(run.in_order)}"
    except UserError as error:
        facts["checkpoint"] = str(error)
    return RunSummary(label, facts)


def _with_progress(settings: Settings, show: Callable[[str, int, int], None], label: str) -> Settings:
    return replace(settings, progress=lambda what, done, total: show(f"{label}: {what}", done, total))
