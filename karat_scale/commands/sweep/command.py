"""`karat sweep RECIPE key=a,b,c run.seed=0..4`: train every point of a grid, and print one table of all runs.

Before anything runs, each run's recipe is checked. Its directory says how far the run is already.

On this machine each run has a process of its own. A run that fails is named, and the others continue. Stop signals are
passed on: the run saves, and the sweep ends. If the sweep is killed, the run saves and stops, too. A SLURM job array
has one element for each run that has not finished.
"""

import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

import yaml

from karat_scale.commands.status.status import read_standing
from karat_scale.commands.submit.sbatch import Job
from karat_scale.data.plan import total_steps
from karat_scale.data.shards.shard_format import absolute_path, check_data_path
from karat_scale.foundation.console import few, plural, print_table, printable, work_display
from karat_scale.foundation.errors import EXIT_STOPPED, RecipeError, UserError, on_one_line
from karat_scale.foundation.files import json_sha256, open_to_read, parse_json, run_around
from karat_scale.foundation.machine import LAUNCHED, STOP_SIGNALS, stop_signals
from karat_scale.recipe import AttentionConfig, Recipe, RunRecipe
from karat_scale.recipe.files import COMMANDS, parse, read_recipe, shipped_recipes
from karat_scale.recipe.loading import differing_keys, flatten, load_recipe, text_digest
from karat_scale.training.tasks.detection.recipe import DetectionRecipe

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_MOST_POINTS = 10_000
_LONGEST_NAME = 120
_DIGITS = 8
SEED = "run.seed"


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `settings` are its values of the keys that vary, as overrides."""

    name: str
    settings: tuple[str, ...]


def read_grid(overrides: Sequence[str]) -> tuple[list[str], list[Point]]:
    """Return the overrides that all runs share, and the runs; the last key varies fastest, and seeds fastest of all.

    Raises:
        UserError: an override cannot be read, or no key has several values.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r}: should be key=value or key=value,value, such as run.seed=0..4")
        values[key] = _values(key, text)  # the last one counts, as in karat train
    shared = [f"{key}={only[0]}" for key, only in values.items() if len(only) == 1]
    varied = {key: several for key, several in values.items() if len(several) > 1}
    if not varied:
        raise UserError("no key has several values, so there is one run: use karat train, or key=a,b")
    if SEED in varied:
        varied[SEED] = varied.pop(SEED)
    if (count := math.prod(map(len, varied.values()))) > _MOST_POINTS:
        raise UserError(f"the grid has {count:,} runs; at most {_MOST_POINTS:,} are possible")
    return shared, _points(varied)


def _points(varied: dict[str, list[str]]) -> list[Point]:
    leaves = Counter(key.rpartition(".")[2] for key in varied)
    short = {key: leaf if leaves[leaf := key.rpartition(".")[2]] == 1 else key for key in varied}
    names: set[str] = set()
    points = []
    for values in itertools.product(*varied.values()):
        pairs = list(zip(varied, values, strict=True))
        settings = tuple(f"{key}={value}" for key, value in pairs)
        name = "_".join(f"{short[key]}-{_plain(value)}" for key, value in pairs)
        if len(name) > _LONGEST_NAME or name in names:  # other names stay as they are when values are added
            digest = text_digest("\n".join(settings))[:_DIGITS]
            name = f"{name[: _LONGEST_NAME - _DIGITS - 1]}_{digest}"
        names.add(name)
        points.append(Point(name, settings))
    return points


def _values(key: str, text: str) -> list[str]:
    """Return the values of a list. Commas inside brackets and quotes do not separate; 0..4 are five integers."""
    values: list[str] = []
    for piece in map(str.strip, _split(text)):
        counted = _RANGE.fullmatch(piece)
        if counted is None:
            values.append(piece)
            continue
        first, last = int(counted[1]), int(counted[2])
        if not 0 <= last - first < _MOST_POINTS:
            raise UserError(f"{key}={text[:100]}: {piece} should count up, over at most {_MOST_POINTS:,} integers")
        values += map(str, range(first, last + 1))
    if len(values) > 1 and "" in values:
        raise UserError(f"{key}={text[:100]}: a value is empty; write null for none")
    if len(set(values)) < len(values):
        raise UserError(f"{key}={text[:100]}: {Counter(values).most_common(1)[0][0]} is there twice; remove one")
    return values


def _split(text: str) -> Iterator[str]:
    piece, quote = "", ""
    expected: list[str] = []
    for character in text:
        if character == "," and not expected and not quote:
            yield piece
            piece = ""
            continue
        piece += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif expected and character == expected[-1]:
            expected.pop()
    if expected or quote:
        raise UserError(f"{text[:100]!r}: {quote or expected[-1]} is missing at the end")
    yield piece


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "none"


class State(Enum):
    """How far a run of the sweep is."""

    NEW = "new"
    UNFINISHED = "unfinished"
    RUNNING = "running now"
    FINISHED = "finished"


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        overrides: all overrides of the run, with its directory and its checkpoint.url.
    """

    point: Point
    directory: Path
    overrides: tuple[str, ...]
    recipe: RunRecipe

    @property
    def state(self) -> State:
        """The present state of the run in the directory."""
        if not (self.directory / "recipe.yaml").is_file():
            return State.NEW
        from karat_scale.training.run_directory import RunDirectory  # imports torch

        directory = RunDirectory(self.directory)
        standing = read_standing(self.directory)
        if standing.signs and standing.ended is None and not standing.is_silent:
            return State.RUNNING
        summary = directory.summary() or {}
        # If `ended` is None, the run was killed after it began again, and the summary is of its earlier end.
        if summary.get("exit") != 0 or standing.ended is None:
            return State.UNFINISHED
        # If it has another recipe, or too few steps, karat train goes on or says why not.
        recorded, train = directory.recipe(type(self.recipe)), self.recipe.train
        steps, images = summary.get("steps"), summary.get("train_images")
        if steps is None or images is None:
            is_as_long = recorded.train.max_steps == train.max_steps
        else:
            is_as_long = steps >= total_steps(images // train.global_batch, train.epochs, train.max_steps)
        return State.FINISHED if is_as_long and not differing_keys(recorded, self.recipe) else State.UNFINISHED


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, and the command that trains one."""

    command: str
    recipe: str
    shared: tuple[str, ...]
    out: Path
    runs: tuple[PlannedRun, ...]


def plan_sweep(recipe: str, overrides: Sequence[str], out: str | None) -> Sweep:
    """Read the grid and check the recipe of every run.

    Raises:
        UserError: the grid or a recipe is wrong; the line names the run.
    """
    shared, points = read_grid(overrides)
    if any(setting.startswith("run.dir=") for setting in (*shared, *points[0].settings)):
        raise UserError("run.dir: each run of a sweep has its own directory; use --out for the one around them")
    schema = _schema(recipe)
    named = recipe if recipe in shipped_recipes(schema.shipped) else str(Path(recipe).resolve())
    root = Path(out).expanduser() if out else Path("runs") / f"sweep_{Path(recipe).stem}"
    if not _is_plain(f"{root}/run"):
        raise UserError(f"--out {root}: YAML reads it as another text; choose one without ' #' and ': '")
    if root.is_file() or (around := run_around(root / "run")):
        what = "is a file" if root.is_file() else f"lies in {around}, a run" if around != root.resolve() else "is a run"
        raise UserError(f"--out {root} {what}; choose another directory")
    runs = []
    for point in points:
        directory = root / point.name
        own = (*shared, *point.settings, f"run.dir={directory}")
        try:
            checked = load_recipe(recipe, own, schema)
            if checked.checkpoint.url:  # one for each run
                own = (*own, f"checkpoint.url={checked.checkpoint.url.rstrip('/')}/{point.name}")
                checked = load_recipe(recipe, own, schema)
            runs.append(PlannedRun(point, directory, own, checked))
        except RecipeError as error:
            load_recipe(recipe, shared, schema)  # raises if the mistake is not the point's
            raise RecipeError(f"{' '.join(point.settings)}: {error}") from None
    _refuse_idle_keys(runs)
    return Sweep(COMMANDS[schema.shipped], named, tuple(shared), root, _without_twins(runs))


def _is_plain(text: str) -> bool:
    """True if an override `key=text` gives the key this text."""
    with suppress(yaml.YAMLError):
        return bool(parse(text) == text)
    return False


def _refuse_idle_keys(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError for a key of attention that varies but has no effect in any run."""
    kinds = " or ".join(dict.fromkeys(run.recipe.attention.kind for run in runs))
    own = runs[0].recipe.attention
    if kinds == "karat":
        why, fix = f"attention.basis = {own.basis} and attention.form = {own.form}", "leave it out"
    else:
        why, fix = f"attention.kind = {kinds}", "set attention.kind=karat"
    for key in (setting.partition("=")[0] for setting in runs[0].point.settings):
        if all(key in _idle_keys(run.recipe.attention) for run in runs):
            raise UserError(f"{key} has no effect with {why}, which all runs have; {fix}")


def _idle_keys(attention: AttentionConfig) -> set[str]:
    return {f"attention.{key}" for key in AttentionConfig.model_fields if key not in attention.keys_in_use}


def _without_twins(runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Return the runs without those that differ from an earlier one only in keys that have no effect; prints a note.

    Raises UserError for two points whose values are written differently, but are the same.
    """
    first: dict[str, PlannedRun] = {}
    twins = []
    for run in runs:
        if (one := first.setdefault(_digest(run.recipe, _idle_keys(run.recipe.attention)), run)) is run:
            continue
        if _digest(one.recipe) == _digest(run.recipe):
            written = " and ".join(" ".join(each.point.settings) for each in (one, run))
            raise UserError(f"{written} are the same recipe; leave one out")
        twins.append(f"{run.point.name} is the same as {one.point.name}")
    if twins:
        left = f"{plural(len(twins), 'run')} left out, as a key has no effect with their attention"
        print(f"note: {left}: {few(twins, most=1)}", file=sys.stderr)
    return tuple(first.values())


def _digest(recipe: RunRecipe, without: Collection[str] = ()) -> str:
    """Return a digest of what a recipe trains, wherever it is kept."""
    left_out = {"run.dir", "checkpoint.url", *without}
    return json_sha256({key: value for key, value in flatten(recipe).items() if key not in left_out})


def _schema(recipe: str) -> type[RunRecipe]:
    """Return the schema of a recipe: that of `karat detect` if it has a detector."""
    try:
        _, tree = read_recipe(recipe, DetectionRecipe.shipped)
    except RecipeError:
        return Recipe  # it is a shipped one, or this says what is wrong
    return DetectionRecipe if "detector" in tree else Recipe


_POLL_SECONDS = 1.0
_LINE_SECONDS = 60.0
_TAIL_BYTES = 65536
# The exit codes of a run that was told to stop; the last ones, as a shell gives them, are of one that had just started.
_STOPPED = (0, EXIT_STOPPED, *(128 + number for number in STOP_SIGNALS))


def run_sweep(sweep: Sweep, ranks: int = 1) -> dict[str, str]:
    """Train the runs that have not finished, each on `ranks` ranks; returns why runs failed, by the run's name.

    Raises:
        StoppedSweepError: a signal stopped it.
    """
    waiting = [run for run in sweep.runs if run.state in (State.NEW, State.UNFINISHED)]
    logs = make_logs(sweep)
    karat = [sys.executable, "-m", "karat_scale", *(["launch", "--ranks", str(ranks)] if ranks > 1 else [])]
    if skipped := len(sweep.runs) - len(waiting):
        _say(f"{plural(skipped, 'run')} of the sweep are finished or running now")
    failures = {}
    with work_display("sweep", _LINE_SECONDS) as show, stop_signals() as told:
        for number, run in enumerate(waiting):
            if told:
                raise StoppedSweepError(number, len(waiting), can_resume=True)
            if run.state not in (State.NEW, State.UNFINISHED):  # another process has begun it since
                continue

            def look(number: int = number, run: PlannedRun = run) -> None:
                step, steps = last_step(run.directory) or (0, 1)
                share = (number + step / max(steps, 1)) / len(waiting)
                show(f"run {number + 1} of {len(waiting)}: {run.point.name}", 100 * share, 100)

            look()
            log = logs / f"{run.point.name}.log"
            earlier = log.stat().st_size if log.exists() else 0
            code = _run([*karat, sweep.command, sweep.recipe, *run.overrides], log, told, look)
            if told:
                can_resume = code < 0 or code in _STOPPED
                raise StoppedSweepError(number + (code == 0), len(waiting), can_resume)
            if code != 0:
                failures[run.point.name] = _why(code, log, earlier)
            _say(f"{run.point.name}: {f'failed: {failures[run.point.name]}' if code else 'finished'}")
    return failures


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


def make_logs(sweep: Sweep) -> Path:
    """Make OUT/logs, and return it. Raises UserError."""
    logs = sweep.out / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {sweep.out}: {error.strerror}; choose another directory") from None
    return logs


class StoppedSweepError(Exception):
    """A signal stopped the sweep after `done` of `total` runs; `can_resume`: the last run has not failed."""

    def __init__(self, done: int, total: int, can_resume: bool) -> None:
        super().__init__(f"stopped after {done} of {plural(total, 'run')}; run the same command to resume")
        self.can_resume = can_resume


def _run(command: Sequence[str], log: Path, told: Sequence[int], look: Callable[[], None]) -> int:
    """Run a command to its end and return its exit code. About once a second, it gets the new signals in `told`.

    look: called about once a second, too.
    """
    with log.open("ab") as output:
        # In a session of its own, so that a terminal's Ctrl-C reaches it once, through us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, LAUNCHED: "1"},
        )
    sent = 0
    while True:
        for number in told[sent:]:
            process.send_signal(number)
            sent += 1
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            look()


def last_step(directory: Path) -> tuple[int, int] | None:
    """Return the last step that a run has logged and the number of its steps, from the end of its metrics.jsonl."""
    try:
        with open_to_read(directory / "metrics.jsonl") as file:
            file.seek(max(file.seek(0, 2) - _TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            event = parse_json(line)
            if event["event"] == "train":
                return int(event["step"]), int(event["total_steps"])
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _why(code: int, log: Path, begin: int) -> str:
    """Return the last line of a run that says what went wrong, and its log's path. Its log begins at byte `begin`."""
    text = log.read_bytes()[begin:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if code == EXIT_STOPPED:
        said = "stopped by a signal; the same command resumes it"
    elif code < 0:
        said = f"killed by {signal.Signals(-code).name}"
    return f"{said.removeprefix('error: ')} ({log})"


SCRIPT = "sweep_grid.sh"


def submit_sweep(sweep: Sweep, job: Job) -> None:
    """Write OUT/sweep.sh and a folder in OUT/points, show the script, and submit it if the user agrees.

    Raises:
        UserError: a file cannot be written, or sbatch refuses the script.
    """
    elements = [number for number, run in enumerate(sweep.runs) if run.state in (State.NEW, State.UNFINISHED)]
    out = sweep.out.absolute()
    script = out / "sweep.sh"
    points = []  # the overrides of each run, a line for each; the first is its directory
    for run in sweep.runs:
        url = run.recipe.checkpoint.url
        places = [f"run.dir={run.directory.absolute()}", *([f"checkpoint.url={url}"] if url else [])]
        points.append("\n".join([*places, *run.point.settings]) + "\n")
    # A folder for each grid: elements of earlier arrays may be waiting, or come back, and read theirs.
    folder = out / "points" / text_digest("".join(points))[:12]
    data = {absolute_path(run.recipe.data.path) for run in sweep.runs}  # type: ignore[attr-defined]
    if len(data) > 1 and "STAGE" in job.settings:
        raise UserError(f"--stage {job.settings['STAGE']} copies one data set, but data.path varies; leave --stage out")
    filled = {
        "TASK": sweep.command,
        "RECIPE": sweep.recipe,
        "SHARDS": data.pop() if len(data) == 1 else "",  # else each point has its own
        "POINTS": str(folder),
    }
    array = ranges(elements) + (f"%{job.at_once}" if job.at_once else "")
    output = {"job-name": out.name, "output": str(out / "logs" / "%A_%a.out"), "array": array}
    kept = [setting for setting in sweep.shared if not setting.startswith("data.path=")]
    text = job.script(SCRIPT, output, filled, kept)
    if job.decision != "print":
        make_logs(sweep)
    files = {folder / str(number): point for number, point in enumerate(points)}
    if number := job.submit(script, text, files, f"--out {sweep.out}"):
        print(f"job {number} is submitted: {plural(len(elements), 'run')}")
    if job.decision == "print":
        print(
            "note: --print writes nothing, and the job reads files beside this script; to submit it yourself, leave "
            f"--print out, answer n, and run: sbatch {script}",
            file=sys.stderr,
        )


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as sbatch's --array takes them: "0-2,5"."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def sweep(recipe: str, overrides: Sequence[str], out: str | None, only_print: bool, ranks: int, job: Job | None) -> int:
    """Train the runs that have not finished, here or by SLURM, and compare the finished ones; returns the exit code.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value`, or `key=value,value` for a key that varies.
        out: the directory around the runs; None is `runs/sweep_RECIPE`.
        only_print: whether to only show the runs and how far they are.
        ranks: the ranks of each run on this machine.
        job: how to submit a job array instead.

    Raises:
        UserError: the grid or a recipe is wrong, or SLURM refuses the jobs.
    """
    planned = plan_sweep(recipe, overrides, out)
    states = {run.point.name: run.state for run in planned.runs}
    if only_print or job:
        _show(planned, states)
    left = [run for run in planned.runs if states[run.point.name] in (State.NEW, State.UNFINISHED)]
    failures: dict[str, str] = {}
    if job and left:
        submit_sweep(planned, job)
        return 0
    if only_print:
        return 0
    if left:
        for data in {run.recipe.data: None for run in left if isinstance(run.recipe, Recipe)}:
            check_data_path(data)
        try:
            failures = run_sweep(planned, ranks)
        except StoppedSweepError as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED if stopped.can_resume else 1
    return _conclude(planned, failures)


def _show(planned: Sweep, states: dict[str, State]) -> None:
    rows = []
    for run in planned.runs:
        state = states[run.point.name]
        at = last_step(run.directory) if state in (State.UNFINISHED, State.RUNNING) else None
        standing = f"{state.value}, step {at[0]:,} of {at[1]:,}" if at else state.value
        rows.append([run.point.name, *(setting.partition("=")[2] for setting in run.point.settings), standing])
    keys = [setting.partition("=")[0] for setting in planned.runs[0].point.settings]
    counts = ", ".join(f"{count} {state.value}" for state, count in Counter(states.values()).items())
    title = f"{plural(len(rows), 'run')} of {planned.recipe} in {planned.out}: {counts}"
    print_table(title, ["run", *keys, "state"], rows, range(len(keys) + 2))


def _conclude(planned: Sweep, failures: dict[str, str]) -> int:
    """Print the table of what has finished, and a line for each run that has not."""
    finished = [str(run.directory) for run in planned.runs if run.state is State.FINISHED]
    if finished:
        from karat_scale.commands.compare.command import compare_runs  # imports torch

        try:
            compare_runs(finished)
        except UserError as error:
            print(f"\nno table: {error}", file=sys.stderr)
    for name, reason in failures.items():
        print(on_one_line(f"{name} has failed: {reason}"), file=sys.stderr)
    left = len(planned.runs) - len(finished)
    if left:
        print(f"{left} of {plural(len(planned.runs), 'run')} have not finished", file=sys.stderr)
        return 1
    print(f"\nfor files and curves: karat compare {shlex.join(finished)} --out DIR")
    return 0
