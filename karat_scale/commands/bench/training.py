"""`karat bench step`, `attention` and `resume`: the cost of a training step, attention and an interruption.

For steps, our training loop is measured against a bare PyTorch loop, and KArAt against softmax in ours. Each contender
trains the same model from the same weights on the same in-memory batch with the same optimizer and gradient clip. For
attention, each implementation of an operator is measured against softmax, in time and memory. Contenders run in turn,
and ratios are medians over rounds.

Interruptions stop whole processes, as in a job. Each round starts a new run, stops its ranks by a signal as a job's
batch script does, resumes the run, and stops it again. Times are read from the run's own events.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from karat_scale.commands.measure.attention import Case, attention_rows
from karat_scale.commands.measure.interleaved import children_seconds, interleaved_seconds
from karat_scale.commands.measure.step import MANY, OurLoop, bare_loop, synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import EXIT_STOPPED, UserError
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory

BARE, OURS, KARAT = "bare PyTorch loop, softmax", "karat loop, softmax", "karat loop, KArAt G3B"
BOUNDED = f"{KARAT} with bounded scores"
FIRST_STEP_RUNS = 3


def bench_step(options: argparse.Namespace) -> int:
    """Measure, print a table and the seconds to a first step, and write the file of `--json`; returns 0."""
    model, batch, steps = {"name": options.model, "image_size": options.image_size}, options.batch, options.steps
    if batch % 2:
        raise UserError(f"--batch {batch} is odd, but mixup and cutmix mix pairs; use an even number")
    with distributed.joined("auto") as world, tempfile.TemporaryDirectory() as scratch:

        def recipe(name: str, **attention: Any) -> Recipe:
            return synthetic_recipe(
                f"{scratch}/{name}",
                "bench step",
                model=model,
                attention=attention,
                data={"synthetic_samples": batch},
                train={"global_batch": batch, "ema_decay": 0.0, "epochs": MANY},
                log={"every_steps": 50},
            )

        contenders: dict[str, Callable[[], object]] = {
            BARE: bare_loop(recipe("bare", kind="softmax"), steps, world),
            OURS: partial(OurLoop(recipe("ours", kind="softmax"), world).run, steps),
            KARAT: partial(OurLoop(recipe("karat", kind="karat"), world).run, steps),
            BOUNDED: partial(OurLoop(recipe("bounded", kind="karat", bound=math.pi), world).run, steps),
        }
        seconds = interleaved_seconds(contenders, options.rounds)
        first_step = statistics.median(
            seconds_to_first_step(model, batch, Path(scratch) / f"first-{number}") for number in range(FIRST_STEP_RUNS)
        )
    rows = [
        {
            "loop": name,
            "images_per_second": round(steps * batch / seconds.median(name), 2),
            "ratio_to_bare": round(1 / seconds.ratio(name, BARE), 3),
            "ratio_to_karat_softmax": round(1 / seconds.ratio(name, OURS), 3),
        }
        for name in contenders
    ]
    figures = [("images_per_second", ".1f"), ("ratio_to_bare", ".3f"), ("ratio_to_karat_softmax", ".3f")]
    device, threads = str(world.device), torch.get_num_threads()
    print_table(
        f"{options.model} at {options.image_size} px, batch {batch}, {device}, {threads} threads",
        ("loop", "images/s", "over bare", "over karat softmax"),
        [[str(row["loop"]), *(format(row[key], form) for key, form in figures)] for row in rows],
    )
    print(f"from command to first step: {first_step:.1f} s (median of {FIRST_STEP_RUNS})")
    asked = {name: getattr(options, name) for name in ("model", "image_size", "batch", "steps", "rounds")}
    found = {"device": device, "threads": threads, "seconds_to_first_step": first_step, "rows": rows}
    write_json(options.json, {**asked, **found})
    return 0


def seconds_to_first_step(model: dict[str, Any], batch: int, run_dir: Path) -> float:
    """Seconds from the start of `karat train` to the end of its first step, in a process of its own."""
    recipe = run_dir.with_suffix(".yaml")
    recipe.write_text(json.dumps({"data": {"backend": "synthetic"}, "model": model, "train": {"ema_decay": 0.0}}))
    overrides = [f"run.dir={run_dir}", f"train.global_batch={batch}", f"data.synthetic_samples={max(64, batch)}"]
    command = [sys.executable, "-m", "karat_scale", "train", str(recipe), "log.every_steps=1", *overrides]
    return start_and_stop(command, run_dir, 1)["to_first_step"] or 0.0


def case_of(options: argparse.Namespace, tokens: int) -> Case:
    """Return the case of the options of `add_attention_options`. On a CPU, also set the number of threads."""
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    own = {field.name: getattr(options, field.name) for field in fields(Case) if field.name != "tokens"}
    return Case(**own, tokens=tokens)


def bench_attention(options: argparse.Namespace) -> int:
    """Measure the named implementations; print a table, and write the file of `--json`; returns 0.

    Raises:
        UserError: no implementation can run the case.
    """
    case = case_of(options, options.tokens)
    found = attention_rows(case, options.rounds, options.only, options.threads)
    rows = []
    for row in found:
        for label, way in ((f"{row['implementation']} forward", "forward"), ("  and backward", "forward_backward")):
            figures = [f"{row[key]:.2f}" for key in (f"{way}_ms", f"ratio_{way}", f"ratio_{way}_to_softmax")]
            memory = ["", ""] if way == "forward" else [f"{row['peak_mb']:.1f}", f"{row['ratio_memory']:.2f}"]
            rows.append([label, *figures, *memory])
    title = f"ViT-{case.model.capitalize()} batch {case.batch}, N = {case.tokens}, {case.basis} {case.form}, "
    title += f"grid {case.grid}, rank {case.rank}, {case.dtype} on {case.device_name}"
    print_table(title, ("implementation", "ms", "to SDPA", "to softmax", "MB", "to SDPA"), rows)
    about = {"device_name": case.device_name, "threads": options.threads}
    write_json(options.json, {**asdict(case), **about, "rows": found})
    return 0


POLL_SECONDS = 0.05
LIMIT_SECONDS = 600
# The figures of one start of the run and its end, in seconds; the save is a part of the figure before it.
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
    ranks, batch, recipe, overrides = options.ranks, options.batch, options.recipe, options.overrides
    fixed = ["data.backend=synthetic", f"data.synthetic_samples={64 * ranks * batch}", "log.trackers=[]"]
    fixed += ["log.every_steps=1", "checkpoint.every_minutes=null", f"train.global_batch={ranks * batch}"]
    fixed += ["checkpoint.url=", "checkpoint.local=", "resume.from="]  # so the user's own checkpoints stay as they are
    starts: dict[str, list[Start]] = {"fresh": [], "resumed": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "run"
            own = [*fixed, *overrides, f"run.dir={directory}"]
            load_recipe(recipe, own)
            command = [sys.executable, "-m", "karat_scale", "train", recipe, *own]
            for found in starts.values():
                found.append(start_and_stop(command, directory, ranks))
            newest = max((directory / "checkpoints").glob("step-*"))
            checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())
            summary = RunDirectory(directory).summary() or {}
    first_steps = ([start["to_first_step"] or 0.0 for start in starts[kind]] for kind in ("resumed", "fresh"))
    result: dict[str, Any] = {
        "recipe": recipe,
        "overrides": overrides,
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
    title = f"{recipe}, {ranks} x {batch} images, {result['device']}, "
    print_table(f"{title}checkpoint {result['checkpoint_mb']:,.0f} MB", ("seconds", *starts), rows)
    print(f"a resumed start takes {result['ratio_of_starts']:.2f} times as long as a fresh one")
    write_json(options.json, result)
    return 0


def start_and_stop(command: Sequence[str], directory: Path, ranks: int) -> Start:
    """Start the ranks of a run, wait for the first step, signal, and wait for the end.

    Returns FIGURES; `to_resumed` is None for a new run, and `processor` is the time that all ranks used.

    Raises:
        UserError: a rank ended too early, or with an exit code other than that of a save.
    """
    environment, log = dict(os.environ), directory.parent / "log"
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
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
        raise early(next(code for code in codes if code != EXIT_STOPPED))
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
