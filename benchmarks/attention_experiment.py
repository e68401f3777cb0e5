"""The experiment of docs/experiments/attention.md: `python -m benchmarks.attention_experiment run DATA WORK`.

DATA holds two data sets in shards with the same training images. The val split of `held_out` is the held-out images,
that of `tested` the test images. `split IMAGES DATA` makes both of CIFAR-10 in folders, with train/ and test/. WORK
holds the runs; an interrupted run resumes. Several processes may share WORK. Each finished run becomes a record in
docs/experiments/attention/. `replace WORK` adds top-1 with each S replaced by a mean to the records of the comparison
and the longer runs, and `report` writes the page of results and a figure from the records.
"""

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.attention_figures import write_figure
from benchmarks.attention_results import write_results
from benchmarks.attention_trials import (
    ARMS,
    EPOCHS,
    HELD_OUT,
    RECIPE,
    RECORDS,
    ROOT,
    STARTS,
    STEPS_OF_EPOCH,
    Trial,
    next_trials,
)
from karat_scale.files import write_atomically
from paper.record import take_record

SECONDS_BETWEEN_LOOKS = 30
REPLACED_IMAGES = 2000  # of the test images, so that a difference of one point is visible


def run(data: Path, work: Path) -> None:
    """Run trial after trial until all are done; wait while other processes run those that the next stage needs."""
    os.nice(max(0, 19 - os.nice(0)))
    work.mkdir(parents=True, exist_ok=True)
    while (trials := next_trials()) is not None:
        claimed = next(claims(trials, work), None)
        if claimed is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        trial, lock = claimed
        if not trial.record.exists():
            finish(trial, data, work / trial.name)
        lock.close()


def claims(trials: list[Trial], work: Path) -> Iterator[tuple[Trial, Any]]:
    """Yield the trials that this process holds alone, each with the open file that says so."""
    for trial in trials:
        lock = (work / f"{trial.name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        yield trial, lock


def finish(trial: Trial, data: Path, directory: Path) -> None:
    """Train to the end, evaluate, and write the record."""
    epochs = EPOCHS[trial.stage]
    data_set = data / ("held_out" if trial.stage == "rate" else "tested")
    quarter = epochs * STEPS_OF_EPOCH // 4
    settings = [f"data.path={data_set}", f"run.dir={directory}", f"run.seed={trial.seed}", f"optim.lr={trial.rate}"]
    settings += [f"train.epochs={epochs}", f"train.eval_every_epochs={epochs}", f"checkpoint.every_steps={quarter}"]
    settings.append("checkpoint.keep_last=1000")  # the one at a quarter, however long the run was interrupted
    karat("train", RECIPE, *settings, *{**ARMS, **STARTS}[trial.arm])
    early = directory / "quarter.json"
    karat("eval", str(directory), "--checkpoint", f"step-{quarter:08d}", "--json", str(early))
    numbers = content_of(directory, directory / "analysis", 256)
    record = take_record(str(directory))
    found = {
        "stage": trial.stage,
        "arm": trial.arm,
        "rate": trial.rate,
        "seed": trial.seed,
        "top1": record.result[0][0],
        "top1_at_a_quarter": json.loads(early.read_text())["top1"],
        "content": numbers["blocks"],
        "run": json.loads(record.to_text()),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_atomically(trial.record, json.dumps(found, indent=1) + "\n")
    print(f"{trial.name}: {found['top1']:.2f} %", flush=True)


def content_of(directory: Path, out: Path, images: int) -> Any:
    """Return what `karat analyze --only content` finds in a run's last checkpoint."""
    which = ("--only", "content", "--checkpoint", "latest", "--images", str(images))
    karat("analyze", str(directory), *which, "--out", str(out))
    return json.loads(next(out.glob("content/*/numbers.json")).read_text())


def replace(work: Path) -> None:
    """Add top-1 with each S replaced to the records of the comparison and the longer runs that lack it."""
    for path in sorted((*RECORDS.glob("compare-*.json"), *RECORDS.glob("long-*.json"))):
        record = json.loads(path.read_text())
        if "replaced" not in record:
            directory = work / path.stem
            record["replaced"] = content_of(directory, directory / "replaced", REPLACED_IMAGES)["top1"]
            write_atomically(path, json.dumps(record, indent=1) + "\n")
            print(f"{path.stem}: {record['replaced']}", flush=True)


def karat(*arguments: str) -> None:
    """Run a command on one thread. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "karat_scale", *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def split(images: Path, data: Path) -> None:
    """Make the two data sets of CIFAR-10's train/<class>/ and test/<class>/."""
    for name in ("held_out", "tested"):
        tree = data / f"{name}_images"
        for folder in sorted((images / "train").iterdir()):
            files = sorted(folder.iterdir())
            random.Random(0).shuffle(files)
            test = sorted((images / "test" / folder.name).iterdir())
            own = {"train": files[:-HELD_OUT], "val": files[-HELD_OUT:] if name == "held_out" else test}
            for part, members in own.items():
                (tree / part / folder.name).mkdir(parents=True, exist_ok=True)
                for file in members:
                    (tree / part / folder.name / file.name).symlink_to(file.resolve())
        make = [
            sys.executable,
            str(ROOT / "data_prep/make_webdataset.py"),
            "--src",
            str(tree),
            "--out",
            str(data / name),
        ]
        subprocess.run(make, check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path)
    running.add_argument("work", type=Path)
    splitting = commands.add_parser("split")
    splitting.add_argument("images", type=Path)
    splitting.add_argument("data", type=Path)
    commands.add_parser("replace").add_argument("work", type=Path)
    commands.add_parser("report")
    asked = parser.parse_args()
    if asked.command == "run":
        run(asked.data, asked.work)
    elif asked.command == "replace":
        replace(asked.work)
    elif asked.command == "split":
        split(asked.images, asked.data)
    else:
        write_results()
        write_figure()


if __name__ == "__main__":
    main()
