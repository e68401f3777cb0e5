"""`karat bench resume`: what an interruption costs, in whole processes as a job has them.

Each round starts a new run, stops its ranks by a signal as a job's batch script does, starts it again, which resumes,
and stops it again. Times are read from the run's own events.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karat_scale.commands.measure.interleaved import children_seconds
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import EXIT_STOPPED, UserError
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory

POLL_SECONDS = 0.05
LIMIT_SECONDS = 600
# Of one start of the run and its end, in seconds; the save is a part of the time before it.
FIGURES = {
    "to_resumed": "start to resumed",
    "to_first_step": "start to first step",
    "signal_to_saved": "signal to saved",
    "save": "  of it the save",
    "saved_to_ended": "saved to ended",
    "processor": "processor time, start to end",
}
Start = dict[str, float | None]


def bench_resume(options: argparse.Namespace) -> int:
    """Measure `--rounds` times, print a table, and write the file of `--json`; returns 0.

    Raises:
        UserError: the recipe is wrong, or the run does not stop as it should.
    """
    ranks, batch = options.ranks, options.batch
    fixed = ["data.backend=synthetic", f"data.synthetic_samples={64 * ranks * batch}", "log.trackers=[]"]
    fixed += ["log.every_steps=1", "checkpoint.every_minutes=null", f"train.global_batch={ranks * batch}"]
    starts: dict[str, list[Start]] = {"fresh": [], "resumed": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "run"
            overrides = [*fixed, *options.overrides, f"run.dir={directory}"]
            load_recipe(options.recipe, overrides)
            command = [sys.executable, "-m", "karat_scale", "train", options.recipe, *overrides]
            for found in starts.values():
                found.append(start_and_stop(command, directory, ranks))
            newest = max((directory / "checkpoints").glob("step-*"))
            checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())
            summary = RunDirectory(directory).summary() or {}
    first_steps = ([start["to_first_step"] or 0.0 for start in starts[kind]] for kind in ("resumed", "fresh"))
    result: dict[str, Any] = {
        "recipe": options.recipe,
        "overrides": options.overrides,
        "ranks": ranks,
        "images_per_rank": batch,
        "rounds": options.rounds,
        "device": summary.get("device"),
        "parameters": summary.get("parameters"),
        "checkpoint_mb": round(checkpoint_bytes / 1e6, 1),
        **{kind: {name: _median(found, name) for name in FIGURES} for kind, found in starts.items()},
        "ratio_of_starts": round(statistics.median(a / b for a, b in zip(*first_steps, strict=True)), 3),
    }
    rows = [
        [label, *("" if (value := result[kind][name]) is None else f"{value:.1f}" for kind in starts)]
        for name, label in FIGURES.items()
    ]
    title = f"{options.recipe}, {ranks} x {batch} images, {result['device']}, "
    print_table(f"{title}checkpoint {result['checkpoint_mb']:,.0f} MB", ("seconds", *starts), rows)
    print(f"a resumed start takes {result['ratio_of_starts']:.2f} times as long as a fresh one")
    write_json(options.json, result)
    return 0


def start_and_stop(command: Sequence[str], directory: Path, ranks: int) -> Start:
    """Start the ranks of a run, wait for the first step, signal, and wait for the end.

    Returns FIGURES; `to_resumed` of a run that is new is None, and `processor` is what all ranks used.

    Raises:
        UserError: a rank ended too early, or with another exit code than that of a save.
    """
    environment, log = dict(os.environ), directory.parent / "log"
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    used, begun = children_seconds(), time.time()
    processes = []
    with log.open("ab") as output:
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(subprocess.Popen(command, stdout=output, stderr=output, env={**environment, **own}))

    def find(kind: str, since: float) -> dict[str, Any] | None:
        events = read_events(directory / "metrics.jsonl")
        return next((event for event in events if event["event"] == kind and event["time"] >= since), None)

    def early(code: int) -> UserError:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return UserError(f"a rank ended with code {code}: {last}")

    def wait(kind: str, since: float) -> dict[str, Any]:
        while time.time() - since < LIMIT_SECONDS:
            ended = [process.returncode for process in processes if process.poll() is not None]
            if event := find(kind, since):
                return event
            if ended:
                raise early(ended[0])
            time.sleep(POLL_SECONDS)
        raise UserError(f"no event {kind!r} came in {LIMIT_SECONDS} s; choose a smaller recipe or --batch")

    try:
        first_step = wait("train", begun)
        signalled = time.time()
        for process in processes:
            process.send_signal(signal.SIGUSR2)
        saved = wait("checkpoint", signalled)
        codes = {process.wait(LIMIT_SECONDS) for process in processes}
        ended = time.time()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != {EXIT_STOPPED}:
        raise early(max(codes))
    resumed = find("resume", begun)
    return {
        "to_resumed": resumed["time"] - begun if resumed else None,
        "to_first_step": first_step["time"] - begun,
        "signal_to_saved": saved["time"] - signalled,
        "save": saved["seconds"],
        "saved_to_ended": ended - saved["time"],
        "processor": children_seconds() - used,
    }


def _median(starts: Sequence[Start], name: str) -> float | None:
    values = [value for start in starts if (value := start[name]) is not None]
    return round(statistics.median(values), 2) if len(values) == len(starts) else None
