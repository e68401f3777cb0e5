"""`karat sweep RECIPE key=a,b,c run.seed=0..4`: train every point of a grid, and print one table of all runs.

On this machine each run has a process of its own. A run that fails is named, and the rest goes on. Stop signals are
passed on: the run saves, and the sweep ends. If the sweep is killed, the run saves and stops, too. A SLURM job array
has one element for each run that has not finished.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from karat_scale.commands.compare.command import compare_runs
from karat_scale.commands.submit.sbatch import Job
from karat_scale.commands.sweep.grid import PlannedRun, State, Sweep, plan_sweep
from karat_scale.data.shards.shard_format import absolute_path
from karat_scale.foundation.console import ProgressBars, duration, plural, print_table, printable, terminal
from karat_scale.foundation.errors import EXIT_STOPPED, UserError, on_one_line
from karat_scale.foundation.files import open_to_read, parse_json
from karat_scale.foundation.machine import LAUNCHED, catch_stop_signals
from karat_scale.recipe.loading import text_digest

_POLL_SECONDS = 1.0
_LINE_SECONDS = 60.0
_TAIL_BYTES = 65536


def run_sweep(sweep: Sweep, ranks: int = 1) -> dict[str, str]:
    """Train what has not finished, each run on so many ranks; returns why each run that failed did, by its name.

    Raises:
        StoppedSweepError: a signal stopped it.
    """
    waiting = [run for run in sweep.runs if run.state in (State.NEW, State.UNFINISHED)]
    logs = make_logs(sweep)
    karat = [sys.executable, "-m", "karat_scale", *(["launch", "--ranks", str(ranks)] if ranks > 1 else [])]
    failures = {}
    with _Shown(len(waiting), len(sweep.runs) - len(waiting)) as shown, _Child() as child:
        for number, run in enumerate(waiting):
            if child.told:
                raise StoppedSweepError(number, len(waiting), saved=True)
            if run.state not in (State.NEW, State.UNFINISHED):  # another process has begun it since
                continue
            log = logs / f"{run.point.name}.log"
            shown.begin(number, run)
            earlier = log.stat().st_size if log.exists() else 0
            code = child.run(
                [*karat, sweep.command, sweep.recipe, *run.overrides], log, lambda run=run: shown.look(run.directory)
            )
            if child.told:
                raise StoppedSweepError(number + (code == 0), len(waiting), saved=code in (0, EXIT_STOPPED))
            if code != 0:
                failures[run.point.name] = _why(code, log, earlier)
            shown.end(run, failures.get(run.point.name))
    return failures


def make_logs(sweep: Sweep) -> Path:
    """Make OUT/logs, and return it. Raises UserError."""
    logs = sweep.out / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {sweep.out}: {error.strerror}; choose another directory") from None
    return logs


class StoppedSweepError(Exception):
    """A signal stopped the sweep after `done` of `total` runs; `saved`: the last run can go on where it was."""

    def __init__(self, done: int, total: int, saved: bool) -> None:
        super().__init__(f"stopped after {done} of {plural(total, 'run')}; run the same command to resume")
        self.saved = saved


class _Child:
    """The process of a run. While there is one, it gets the stop signals that this process gets."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self._is_sent = False
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Child":
        self._before = catch_stop_signals(self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path, look: Any) -> int:
        """Run a command to its end and return its exit code; `look` is called about once a second."""
        with log.open("ab") as output:
            # In a session of its own, so that a terminal's Ctrl-C reaches it once, through us.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, LAUNCHED: "1"},
            )
        if self.told is not None and not self._is_sent:  # while it started
            self._send(self.told)
        while True:
            try:
                return self._process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                look()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.told = signal.Signals(number)
        self._send(self.told)

    def _send(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._is_sent = True
        self._process.send_signal(number)


# Of a run, before what is left is judged: it starts slowly.
_LEAST_DONE = 0.1


class _Shown:
    """Where the sweep stands: bars on a terminal, elsewhere a line for each run and one a minute."""

    def __init__(self, total: int, skipped: int) -> None:
        self._total, self._skipped = total, skipped
        self._begun = time.monotonic()
        self._told = 0.0
        self._number = 0
        self._name = ""

    def __enter__(self) -> "_Shown":
        console = terminal(stderr=True)
        self._bars = ProgressBars(console) if console else None
        if self._skipped:
            self._line(f"{plural(self._skipped, 'run')} of the sweep are finished or running now")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, number: int, run: PlannedRun) -> None:
        """The run with this number, from 0, begins."""
        self._number, self._name, self._told = number, run.point.name, time.monotonic()
        self._line(f"run {number + 1} of {self._total}: {self._name}")

    def look(self, directory: Path) -> None:
        """Show how far the run is."""
        found = last_step(directory)
        if found is None:
            return
        step, total = found
        if self._bars is not None:
            self._bars.move("sweep", self._number, self._total, self._left(step, total).removeprefix("; "), keep=True)
            self._bars.move(self._name, step, total, keep=True)
        elif time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            self._line(f"{self._name}: step {step:,} of {total:,}{self._left(step, total)}")

    def end(self, run: PlannedRun, failure: str | None) -> None:
        """The run has ended."""
        if self._bars is not None:
            self._bars.remove(self._name)
            self._bars.move("sweep", self._number + 1, self._total, keep=True)
        self._line(f"{self._name}: {f'failed: {failure}' if failure else 'finished'}{self._left(1, 1)}")

    def _left(self, step: int, total: int) -> str:
        """Return about how long all runs will take, judged by the share of them that is done."""
        done = self._number + step / max(total, 1)
        share = done / self._total
        if done < _LEAST_DONE or share >= 1:
            return ""
        seconds = (time.monotonic() - self._begun) * (1 - share) / share
        return f"; about {duration(seconds)} left"

    def _line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.line(text)
        else:
            print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)


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
    """Return the last line of a run that says what went wrong, and where the others are; its log begins at a byte."""
    text = log.read_bytes()[begin:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if code == EXIT_STOPPED:
        said = "stopped by a signal; the same command resumes it"
    elif code < 0:
        said = f"killed by {signal.Signals(-code).name}"
    return f"{said.removeprefix('error: ')} ({log})"


SCRIPT = "sweep_grid.sh"


def submit_sweep(sweep: Sweep, job: Job, at_once: int | None) -> None:
    """Write OUT/sweep.sh and a folder in OUT/points, show the script, and submit it if the user agrees.

    at_once: at most so many elements run at a time.

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
    array = ranges(elements) + (f"%{at_once}" if at_once else "")
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


def sweep(
    recipe: str,
    overrides: Sequence[str],
    out: str | None,
    only_print: bool,
    ranks: int,
    job: Job | None,
    at_once: int | None,
) -> int:
    """Train what has not finished, here or by SLURM, and compare what has; returns the exit code.

    Args:
        recipe: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value`, or `key=value,value` for a key that varies.
        out: the directory around the runs; None is `runs/sweep_RECIPE`.
        only_print: show the runs and how far they are, and do nothing.
        ranks: of each run on this machine.
        job: how to submit a job array instead, of which at most `at_once` elements run at a time.

    Raises:
        UserError: the grid or a recipe is wrong, or SLURM refuses the jobs.
    """
    planned = plan_sweep(recipe, overrides, out)
    states = {run.point.name: run.state for run in planned.runs}
    if only_print or job:
        _show(planned, states)
    is_left = any(state in (State.NEW, State.UNFINISHED) for state in states.values())
    failures: dict[str, str] = {}
    if job and is_left:
        submit_sweep(planned, job, at_once)
        return 0
    if only_print:
        return 0
    if is_left and not job:
        try:
            failures = run_sweep(planned, ranks)
        except StoppedSweepError as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED if stopped.saved else 1
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
