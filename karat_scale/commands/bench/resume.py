"""`karat bench resume`: what an interruption costs, in whole processes as a job has them.

Each round starts a new run, stops its ranks by a signal as a job's batch script does, starts it again, which resumes,
and stops it again. Times are read from the run's own events.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karat_scale.commands.bench.measuring import children_seconds
from karat_scale.commands.status.status import read_events
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import EXIT_STOPPED, UserError
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory

POLL_SECONDS = 0.05
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Start:
    """One start of the run and its end, in seconds.

    `save` is that part of `signal_to_saved` in which it saved; `processor` what all ranks used from start to end.
    """

    to_resumed: float | None
    to_first_step: float
    signal_to_saved: float
    save: float
    saved_to_ended: float
    processor: float


@dataclass(frozen=True)
class Run:
    """A run that can be started several times: `ranks` processes of `command`, whose files are in `directory`."""

    command: list[str]
    directory: Path
    ranks: int

    def start_and_stop(self) -> Start:
        """Start, wait for the first step, signal, and wait for the end.

        Raises:
            UserError: a rank ended too early, or with another exit code than that of a save.
        """
        log = self.directory.parent / "log"
        used, begun = children_seconds(), time.time()
        with log.open("ab") as output:
            ranks = [
                subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)
                for environment in self._environments()
            ]
        try:
            first_step = self._wait_for("train", begun, ranks)
            signalled = time.time()
            for rank in ranks:
                rank.send_signal(signal.SIGUSR2)
            saved = self._wait_for("checkpoint", signalled, ranks)
            codes = {rank.wait(LIMIT_SECONDS) for rank in ranks}
            ended = time.time()
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if codes != {EXIT_STOPPED}:
            raise UserError(f"a rank ended with code {max(codes)}: {_last_line(log)}")
        resumed = self._find("resume", begun)
        return Start(
            to_resumed=resumed["time"] - begun if resumed else None,
            to_first_step=first_step["time"] - begun,
            signal_to_saved=saved["time"] - signalled,
            save=saved["seconds"],
            saved_to_ended=ended - saved["time"],
            processor=children_seconds() - used,
        )

    def _environments(self) -> list[dict[str, str]]:
        if self.ranks == 1:
            return [dict(os.environ)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [{**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]

    def _wait_for(self, kind: str, since: float, ranks: list["subprocess.Popen[bytes]"]) -> dict[str, Any]:
        while time.time() - since < LIMIT_SECONDS:
            ended = [rank.returncode for rank in ranks if rank.poll() is not None]
            event = self._find(kind, since)
            if event is not None:
                return event
            if ended:
                raise UserError(f"a rank ended with code {ended[0]}: {_last_line(self.directory.parent / 'log')}")
            time.sleep(POLL_SECONDS)
        raise UserError(f"no event {kind!r} came in {LIMIT_SECONDS} s; choose a smaller recipe or --batch")

    def _find(self, kind: str, since: float) -> dict[str, Any] | None:
        found = (e for e in read_events(self.directory / "metrics.jsonl") if e["event"] == kind and e["time"] >= since)
        return next(found, None)


def bench_resume(
    recipe: str, overrides: Sequence[str], ranks: int, batch: int, rounds: int, json_file: str | None
) -> int:
    """Measure `rounds` times, print a table, and write `json_file`; returns 0.

    Raises:
        UserError: the recipe is wrong, or the run does not stop as it should.
    """
    fixed = ["data.backend=synthetic", f"data.synthetic_samples={64 * ranks * batch}", "log.trackers=[]"]
    fixed += ["log.every_steps=1", "checkpoint.every_minutes=null", f"train.global_batch={ranks * batch}"]
    chosen = [*fixed, *overrides]
    fresh, resumed, checkpoint_bytes = [], [], 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "run"
            arguments = [recipe, *chosen, f"run.dir={directory}"]
            load_recipe(recipe, arguments[1:])
            run = Run([sys.executable, "-m", "karat_scale", "train", *arguments], directory, ranks)
            fresh.append(run.start_and_stop())
            resumed.append(run.start_and_stop())
            newest = max((directory / "checkpoints").glob("step-*"))
            checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())
            summary = RunDirectory(directory).summary() or {}
    ratios = [after.to_first_step / before.to_first_step for before, after in zip(fresh, resumed, strict=True)]
    result = {
        "recipe": recipe,
        "overrides": list(overrides),
        "ranks": ranks,
        "images_per_rank": batch,
        "rounds": rounds,
        "device": summary.get("device"),
        "parameters": summary.get("parameters"),
        "checkpoint_mb": round(checkpoint_bytes / 1e6, 1),
        "fresh": _medians(fresh),
        "resumed": _medians(resumed),
        "ratio_of_starts": round(statistics.median(ratios), 3),
    }
    _print(result)
    write_json(json_file, result)
    return 0


def _medians(starts: Sequence[Start]) -> dict[str, float | None]:
    columns = {name: [getattr(start, name) for start in starts] for name in asdict(starts[0])}
    return {name: None if None in values else round(statistics.median(values), 2) for name, values in columns.items()}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _print(result: dict[str, Any]) -> None:
    title = f"{result['recipe']}, {result['ranks']} x {result['images_per_rank']} images, {result['device']}"
    figures = {
        "start to resumed": "to_resumed",
        "start to first step": "to_first_step",
        "signal to saved": "signal_to_saved",
        "  of it the save": "save",
        "saved to ended": "saved_to_ended",
        "processor time, start to end": "processor",
    }
    rows = []
    for label, name in figures.items():
        values = (result[kind][name] for kind in ("fresh", "resumed"))
        rows.append([label, *("" if value is None else f"{value:.1f}" for value in values)])
    print_table(f"{title}, checkpoint {result['checkpoint_mb']:,.0f} MB", ("seconds", "fresh", "resumed"), rows)
    print(f"a resumed start takes {result['ratio_of_starts']:.2f} times as long as a fresh one")
