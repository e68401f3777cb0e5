"""`karat bench step` and `karat bench attention`: what a training step costs, and attention by itself.

Of steps, our training loop is measured against a bare PyTorch loop, and KArAt against softmax in ours. Each contender
trains the same model from the same weights on the same in-memory batches with the same optimizer, gradient clip and
learning rate. Of attention, each implementation of an operator is measured against softmax, in time and memory.
Contenders run in turn, and ratios are medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.measure.attention import Case, attention_rows
from karat_scale.commands.measure.interleaved import interleaved_seconds
from karat_scale.commands.measure.step import bare_loop, our_loop, synthetic_recipe
from karat_scale.engine import distributed
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, on_one_line
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory

BARE, OURS, KARAT = "bare PyTorch loop, softmax", "karat loop, softmax", "karat loop, KArAt G3B"
FIRST_STEP_RUNS = 3


def bench_step(options: argparse.Namespace) -> int:
    """Measure, print a table and the seconds to a first step, and write the file of `--json`; returns 0."""
    model, batch, steps = {"name": options.model, "image_size": options.image_size}, options.batch, options.steps
    world = distributed.start("auto")
    try:
        with tempfile.TemporaryDirectory() as scratch:

            def recipe(kind: str) -> Recipe:
                return synthetic_recipe(
                    f"{scratch}/{kind}",
                    "bench step",
                    model=model,
                    attention={"kind": kind},
                    data={"synthetic_samples": 4 * batch},
                    train={"global_batch": batch, "ema_decay": 0.0, "epochs": 100},
                    log={"every_steps": 50},
                )

            contenders = {
                BARE: bare_loop(recipe("softmax"), steps, world),
                OURS: our_loop(recipe("softmax"), steps, world),
                KARAT: our_loop(recipe("karat"), steps, world),
            }
            seconds = interleaved_seconds(contenders, options.rounds)
            first_step = statistics.median(
                seconds_to_first_step(model, batch, Path(scratch) / f"first-{number}")
                for number in range(FIRST_STEP_RUNS)
            )
    finally:
        distributed.stop()
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
    command = [sys.executable, "-m", "karat_scale", "train", str(recipe), "train.max_steps=1", *overrides]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"karat train ended with exit code {done.returncode}: {on_one_line(done.stderr[-400:])}")
    summary = RunDirectory(run_dir).summary() or {}
    return float(summary["seconds_to_first_step"])


def case_of(options: argparse.Namespace, tokens: int) -> Case:
    """Return the case of the options of `add_attention_options`. One of a CPU has as many threads as they say."""
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
