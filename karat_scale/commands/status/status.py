"""`karat status`: the state of a run at a glance, live on a terminal, once elsewhere.

It reads only the run's files: it works without a server, on any machine that sees the directory.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from psutil import pid_exists
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from karat_scale.commands.evaluate.predictions import read_evaluations
from karat_scale.engine.heartbeat import Sign, read_signs, slow_factor, slow_ranks
from karat_scale.engine.reporting.goodput import WallTime
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import duration, per_second, plural, printable
from karat_scale.foundation.errors import EXIT_STOPPED, RunDirectoryError
from karat_scale.foundation.files import parse_json, read_object, read_text
from karat_scale.foundation.machine import ask_squeue, this_node
from karat_scale.recipe.files import recipe_of_run

# Heartbeats are written every two seconds. If its process is gone, a slightly old heartbeat is the last one.
SILENT_SECONDS, LATE_SECONDS = 30.0, 6.0
_FIGURES = ("total_steps", "epoch", "images_per_second", "peak_memory_mb", "beyond_reach")
_NUMBERS = (*_FIGURES, "step", "samples", "loss", "top1", "mask_ap", "restarts", "exit")
_FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass
class Standing:
    """The known values. One that the run has not written yet is None or an empty list."""

    name: str
    job: str | None = None
    job_state: str | None = None
    step: int = 0
    known: dict[str, float] = field(default_factory=dict)
    """The newest value of each of _FIGURES."""
    trained: list[tuple[int, float]] = field(default_factory=list)
    """Steps and their losses."""
    tested: list[tuple[int, float]] = field(default_factory=list)
    """Steps and their `score`."""
    score: str = "top-1"
    seconds_left: float | None = None
    restarts: int = 0
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    copied: str | None = None
    """The newest checkpoint at `checkpoint.url`, and what prevents a newer one."""
    signs: list[Sign] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    """A line for each slow rank."""
    silent_seconds: float | None = None
    ended: str | None = None
    exit_code: int | None = None
    evaluations: list[str] = field(default_factory=list)
    """A line for each test set of `karat eval --on`."""
    wall_time: WallTime = field(default_factory=WallTime)
    damaged_lines: int = 0
    """The number of lines of `metrics.jsonl` that a full disk has cut off, or that are no events."""

    @property
    def losses(self) -> list[float]:
        """The losses so far."""
        return [loss for _, loss in self.trained]

    @property
    def is_silent(self) -> bool:
        """True if the run writes nothing any more and has not ended: it was killed, or all its nodes are gone."""
        if self.ended is not None or self.silent_seconds is None:
            return False
        mine = [sign.pid for sign in self.signs if sign.host == this_node()]
        is_gone = bool(mine) and not any(map(pid_exists, mine))
        return self.silent_seconds > (LATE_SECONDS if is_gone else SILENT_SECONDS)

    @property
    def is_over(self) -> bool:
        """True if nothing more will come. A job that saved on a signal comes back, unless SLURM has closed it."""
        comes_back = self.exit_code == EXIT_STOPPED and self.job is not None and self.job_state not in _FINAL_STATES
        return self.ended is not None and not comes_back


def read_standing(run: Path, now: float | None = None) -> Standing:
    """Read the run's files at time `now` (seconds since the epoch).

    Raises:
        RunDirectoryError: `run` is neither a run nor the logs of a run that is about to start.
    """
    # A sweep has `logs`, too, but no folder of a start in it.
    if not (run / "metrics.jsonl").exists() and not any(path.is_dir() for path in (run / "logs").glob("*-*")):
        recipe_of_run(run)  # says what was meant
    name = run.name or run.resolve().name  # of the working directory
    standing = Standing(name if name != "run" else run.resolve().parent.name)
    now = time.time() if now is None else now
    damaged: list[Any] = []
    for event in read_events(run / "metrics.jsonl", damaged=damaged.append):
        try:
            _apply_event(standing, event)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            damaged.append(error)
    standing.damaged_lines = len(damaged)
    _read_checkpoints(standing, run / "checkpoints", now)
    with suppress(OSError, ValueError, TypeError, KeyError):
        copy = parse_json(read_text(run / "copy.json", 65536))
        problem = f"; {copy['problem']}" if copy["problem"] else ""
        standing.copied = f"{copy['checkpoint'] or 'none yet'} at {copy['url']}{problem}"
    try:
        known = read_evaluations(run)
        standing.evaluations = [f"{one.name}: {one.text} ({one.checkpoint}, {one.weights})" for one in known]
    except RunDirectoryError as error:
        standing.evaluations = [str(error)]
    if signs := read_signs(run):
        newest = max(signs, key=lambda sign: sign.written)
        standing.signs = [sign for sign in signs if sign.start == newest.start]  # an earlier start had more ranks
        standing.slow = slow_ranks(standing.signs, slow_factor(run))
        standing.silent_seconds = max(now - newest.written, 0.0)
        standing.wall_time.reach(newest.written, standing.signs[0].doing)
    # Each start has a directory, which the launch wrapper names JOB-RESTART; in an array, JOB is ARRAY_ELEMENT.
    starts = [path for path in (run / "logs").glob("*-*") if path.is_dir()]
    newest_start = max(starts, key=lambda path: path.stat().st_mtime, default=None)
    standing.job = newest_start.name.rpartition("-")[0] if newest_start else None
    standing.job_state = ask_squeue(standing.job, "%T") if standing.job else None
    return standing


def _apply_event(standing: Standing, event: dict[str, Any]) -> None:
    """Apply an event. Raises ValueError, TypeError, KeyError or OverflowError if it is not valid."""
    standing.wall_time.add(event)
    kind = event.get("event")
    for key in _NUMBERS:  # the trainer writes null for what is not finite
        if event.get(key) is not None and not _is_number(event[key]):
            raise ValueError(key)
    if kind in ("train", "start", "resume", "eval") and event["step"] is None:
        raise ValueError("step")
    if kind == "train":
        step = standing.step = event["step"]
        standing.ended = None
        standing.known |= {key: event[key] for key in _FIGURES if event.get(key) is not None}
        if event.get("loss") is not None:
            standing.trained.append((step, event["loss"]))
        if (rate := event.get("images_per_second")) and (total := standing.known.get("total_steps")):
            standing.seconds_left = (total - step) * event["samples"] / step / rate
    elif kind == "eval" and (score := event.get("top1", event.get("mask_ap"))) is not None:
        standing.tested.append((event["step"], score))
        standing.score = "top-1" if "top1" in event else "mask AP"
    elif kind in ("start", "resume"):  # what an earlier start logged of later steps is dropped
        standing.step, standing.ended = event["step"], None
        if kind == "start":  # which may have another length; the first report says it
            standing.seconds_left = None
            standing.known = {} if event["anew"] else {k: v for k, v in standing.known.items() if k != "total_steps"}
        standing.restarts = event["restarts"] if kind == "resume" else 0  # a resume event follows if it resumes
        standing.trained = [one for one in standing.trained if one[0] <= standing.step]
        standing.tested = [one for one in standing.tested if one[0] <= standing.step]
    elif kind == "end":
        standing.exit_code = event.get("exit")
        standing.ended = f"{event.get('reason')} (exit {standing.exit_code})"
        if standing.exit_code == 0:
            standing.seconds_left = 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # which can be written


def _read_checkpoints(standing: Standing, root: Path, now: float) -> None:
    try:
        name = read_text(root / "latest", 4096).strip()
        manifest = (root / name / "manifest.json").stat()
    except (OSError, ValueError):
        return
    standing.checkpoint, standing.checkpoint_age = name, max(now - manifest.st_mtime, 0.0)
    state = read_object(root / name / "state.json")
    if isinstance(step := state.get("step"), int):  # which may not have been logged yet
        standing.step = max(standing.step, step)
    if _is_number(peak := state.get("peak_memory_mb", 0)):
        standing.known["peak_memory_mb"] = standing.known.get("peak_memory_mb") or peak


REFRESH_SECONDS = 2.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48


def show_status(run_dir: str, once: bool) -> int:
    """Show the state of the run in directory `run_dir`; on a terminal until it ends or Ctrl-C. Returns the exit code.

    Raises:
        RunDirectoryError: this is not a run.
    """
    console, path = Console(), Path(run_dir)
    standing = read_standing(path)
    if once or not console.is_terminal or standing.is_over:
        console.print(render(standing))
        return 0
    with Live(render(standing), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while not standing.is_over:
            time.sleep(REFRESH_SECONDS)
            standing = read_standing(path)
            live.update(render(standing), refresh=True)
    return 0


def sparkline(values: list[float]) -> str:
    """Return the values as bars; each bar is the mean of an equal share of them, and the lowest is the lowest bar."""
    means = [float(share.mean()) for share in np.array_split(values, min(_WIDTH, len(values)))]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def render(standing: Standing) -> Group:
    """Return the view. A figure that is not known yet is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for label, value in _rows(standing):
        table.add_row(label, Text(printable(value)))
    title = Text(printable(standing.name), style="bold")
    if not (total := standing.known.get("total_steps")):
        return Group(title, table)
    bar = Table.grid()  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=total, completed=standing.step, width=_WIDTH))
    return Group(title, bar, table)


def _rows(standing: Standing) -> list[tuple[str, str]]:
    state = standing.job_state or ("ended" if standing.ended else "unknown to squeue")
    silent = top1 = left = None
    if standing.is_silent and standing.silent_seconds is not None:
        since = f"no sign of life for {duration(standing.silent_seconds)}"
        silent = f"not running: {since}; run the same command again to resume"
    if standing.tested:
        scores = [score for _, score in standing.tested]
        unit = " %" if standing.score == "top-1" else ""
        top1 = f"{scores[-1]:.2f}{unit}, best {max(scores):.2f}{unit}"
    if not (standing.ended or standing.is_silent or standing.seconds_left is None):
        left = f"about {duration(standing.seconds_left)}"
    on_gpu = any(sign.device and not sign.device.startswith("CPU") for sign in standing.signs)
    age = duration(standing.checkpoint_age or 0)
    damaged = plural(standing.damaged_lines, "damaged line") if standing.damaged_lines else None

    def known(key: str, text: str) -> str:
        value = standing.known.get(key)
        return text.format(value) if value else ""

    rate = standing.known.get("images_per_second")
    begun = 0 if standing.ended else max((sign.step for sign in standing.signs), default=0)
    step = max(standing.step, begun - 1)  # the log has no more than each log.every_steps
    epoch = f", epoch {standing.known['epoch'] + 1:.0f}" if "epoch" in standing.known else ""

    rows = [
        ("job", f"{standing.job} {state}" if standing.job else None),
        ("outcome", standing.ended or silent or ("running" if standing.signs else None)),
        ("step", f"{step:,}{known('total_steps', ' of {:,}')}{epoch}"),
        ("loss", f"{standing.losses[-1]:.4f}  {sparkline(standing.losses)}" if standing.losses else "none logged yet"),
        (standing.score, top1),
        ("scores", known("beyond_reach", "{:.1%} of a block's beyond its functions' reach")),
        *(("tested on", line) for line in standing.evaluations),
        ("images/s", per_second(rate) if rate else None),
        ("GPU memory" if on_gpu else "memory", known("peak_memory_mb", "peak {:,.0f} MB")),
        ("restarts", str(standing.restarts)),
        ("wall time", str(standing.wall_time)),
        ("time left", left),
        ("checkpoint", f"{standing.checkpoint}, {age} old" if standing.checkpoint else "none yet"),
        ("copied", standing.copied),
        ("ranks", _ranks(standing)),
        ("note", damaged and f"{damaged} of metrics.jsonl skipped"),
        *(("slow", line) for line in ([] if standing.ended else standing.slow)),
    ]
    return [(label, value) for label, value in rows if value]


def _ranks(standing: Standing) -> str | None:
    """Return the number of ranks, and the rank that the others wait for."""
    if not standing.signs or standing.ended:
        return None
    last = min(standing.signs, key=lambda sign: sign.beats)
    hosts = len({sign.host for sign in standing.signs})
    verb = "was" if standing.is_silent else "is"
    return f"{len(standing.signs)} on {plural(hosts, 'node')}; rank {last.rank} on {last.host} {verb} at {last.doing!r}"
