"""`karat status`: a run at a glance, live on a terminal, once elsewhere."""

import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from karat_scale.commands.status.standing import Standing, read_standing
from karat_scale.engine.pace import slow_ranks
from karat_scale.foundation.console import duration, plural, printable

REFRESH_SECONDS = 2.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48


def show_status(run: str, once: bool = False) -> int:
    """Show the state of the run in directory `run`; on a terminal until it ends or Ctrl-C. Returns the exit code.

    Raises:
        RunDirectoryError: this is not a run.
    """
    console, path = Console(), Path(run)
    standing = read_standing(path)
    if once or not console.is_terminal or standing.is_over:
        console.print(render(standing))
        return 0
    with Live(render(standing), console=console, auto_refresh=False) as live:
        try:
            while not standing.is_over:
                time.sleep(REFRESH_SECONDS)
                standing = read_standing(path)
                live.update(render(standing), refresh=True)
        except KeyboardInterrupt:
            pass
    return 0


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Return the values as bars; each bar is the mean of an equal share of them, and the lowest is the lowest bar."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
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
    if not standing.total_steps:
        return Group(title, table)
    bar = Table.grid()  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=standing.total_steps, completed=standing.step, width=_WIDTH))
    return Group(title, bar, table)


def _rows(standing: Standing) -> list[tuple[str, str]]:
    state = standing.job_state or (standing.ended and "ended") or ("unknown to squeue" if standing.job else None)
    steps = f"{standing.step:,}" + (f" of {standing.total_steps:,}" if standing.total_steps else "")
    rows = [
        ("job", f"{standing.job} {state}" if standing.job else state),
        ("outcome", standing.ended or _silent(standing)),
        ("step", steps + (f", epoch {standing.epoch}" if standing.epoch is not None else "")),
        ("loss", f"{standing.losses[-1]:.4f}  {sparkline(standing.losses)}" if standing.losses else "none logged yet"),
        ("top-1", _top1(standing)),
        *(("tested on", line) for line in standing.evaluations),
        ("images/s", f"{standing.images_per_second:,.0f}" if standing.images_per_second else None),
        (_memory_kind(standing), f"peak {standing.peak_memory_mb:,.0f} MB" if standing.peak_memory_mb else None),
        ("restarts", str(standing.restarts)),
        ("time left", _left(standing)),
        (
            "checkpoint",
            f"{standing.checkpoint}, {duration(standing.checkpoint_age or 0)} old"
            if standing.checkpoint
            else "none yet",
        ),
        ("copied", standing.copied),
        ("ranks", _ranks(standing)),
        ("note", _damaged(standing.damaged_lines)),
        *(("slow", line) for line in ([] if standing.ended else slow_ranks(standing.signs))),
    ]
    return [(label, value) for label, value in rows if value]


def _top1(standing: Standing) -> str | None:
    if standing.last_top1 is None:
        return None
    return f"{standing.last_top1:.2f} %, best {standing.best_top1:.2f} %"


def _damaged(lines: int) -> str | None:
    return f"{plural(lines, 'damaged line')} of metrics.jsonl skipped" if lines else None


def _memory_kind(standing: Standing) -> str:
    on_gpu = any(sign.device and not sign.device.startswith("CPU") for sign in standing.signs)
    return "GPU memory" if on_gpu else "memory"


def _left(standing: Standing) -> str | None:
    if standing.ended or standing.is_silent or standing.seconds_left is None:
        return None
    return f"about {duration(standing.seconds_left)}"


def _ranks(standing: Standing) -> str | None:
    """Return the number of ranks, and the rank that the others wait for."""
    if not standing.signs or standing.ended:
        return None
    last = min(standing.signs, key=lambda sign: sign.beats)
    hosts = len({sign.host for sign in standing.signs})
    verb = "was" if standing.is_silent else "is"
    return f"{len(standing.signs)} on {hosts} nodes; rank {last.rank} on {last.host} {verb} at {last.doing!r}"


def _silent(standing: Standing) -> str | None:
    if not standing.is_silent or standing.silent_seconds is None:
        return None
    return f"not running: no sign of life for {duration(standing.silent_seconds)}; run the same command again to resume"
