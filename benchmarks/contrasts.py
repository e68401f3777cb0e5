"""The second experiment, of docs/experiments/contrasts.md: `python -m benchmarks.contrasts run DATA WORK`.

`split IMAGES DATA` makes the data of CIFAR-10 in folders, train/CLASS and test/CLASS: two data sets in shards with the
same training images. The val split of `held_out` is the held-out images, that of `tested` the test images. `run` trains
run after run in WORK and writes each one's record to docs/experiments/contrasts/. Interrupted runs resume, and several
processes may share WORK. `report` writes the page of results from the records. `weights` puts the best model of each
arm in WORK into examples/weights.
"""

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.commands.analyze.predictions import FILE
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.errors import EXIT_STOPPED
from karat_scale.foundation.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs/experiments/contrasts"
LABELS = RECORDS / "labels.txt"  # of the test images, in the order of their ids
RECIPE = "cifar10_vit_nano_32px"
SMOOTH = ["attention.kind=karat", "attention.form=smooth"]
ARMS = {
    "smooth": SMOOTH,
    "without_scores": [*SMOOTH, "attention.scores=false"],
    "frozen_functions": [*SMOOTH, "train.freeze=['*.operator.cos_modes','*.operator.sin_modes']"],
    "static_softmax": ["attention.kind=static_softmax"],
    "biased_softmax": ["attention.kind=softmax_bias", "model.weight_init=mimetic"],
    "static": ["attention.kind=static"],
}
SMOOTH_BLOCK = "{kind: karat, form: smooth}"
LATER = {  # in no test, 3 seeds, 4 epochs
    "softmax": ["attention.kind=softmax"],
    "bounded": ["attention.kind=karat", "attention.bound=3.14"],
    **{kind: [f"attention.kind={kind}"] for kind in ("query_only", "centred", "gated", "sigmoid")},
    "early": [f"attention.blocks={{0-1: {SMOOTH_BLOCK}}}"],
    "middle": [f"attention.blocks={{1-2: {SMOOTH_BLOCK}}}"],
    "late": [f"attention.blocks={{2-3: {SMOOTH_BLOCK}}}"],
}
ONE_CHANGE = {"frozen_functions": "smooth"}  # arms that take another's rate, because they differ in one thing alone
CONTRASTS = (("smooth", "without_scores"), ("smooth", "static_softmax"), ("smooth", "static"))
REPORTED = (("smooth", "frozen_functions"), ("smooth", "biased_softmax"))
RATES = (5e-4, 1e-3, 2e-3)
WIDEST = (1.25e-4, 8e-3)
SPARE_SEED = 99
SEEDS = {arm: range(3 if arm == "frozen_functions" or arm in LATER else 5) for arm in (*ARMS, *LATER)}
EPOCHS = {"rate": 4, "short": 4, "check": 22, "main": 22}
COMPARED = ("short", "main")  # the stages that see the test images
CLEAR_LEAD = 1.5  # points on the held-out images after 4 epochs, beyond which a rate is not checked
HELD_OUT = 500  # images of each class
REPLACED = 2000  # images on which each S is replaced by a mean
SECONDS_BETWEEN_LOOKS = 30


@dataclass(frozen=True)
class Trial:
    """One run of the experiment."""

    stage: str
    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its run and of its record, without the suffix."""
        return f"{self.stage}-{self.arm}-lr{self.rate:g}-seed{self.seed}"

    @property
    def record(self) -> Path:
        """Its record."""
        return RECORDS / f"{self.name}.json"

    def top1(self) -> float | None:
        """Return its result in percent, or None before it has finished."""
        return json.loads(self.record.read_text())["top1"] if self.record.exists() else None

    @property
    def data_set(self) -> str:
        """Only the runs that are compared see the test images."""
        return "tested" if self.stage in COMPARED else "held_out"


def results(arm: str, stage: str) -> dict[float, float]:
    """Return what an arm reached on the held-out images at each rate that has run."""
    rates = [WIDEST[0] * 2**power for power in range(7)]
    found = {rate: Trial(stage, arm, rate, SPARE_SEED).top1() for rate in rates}
    return {rate: top1 for rate, top1 in found.items() if top1 is not None}


def wanted_rates(arm: str) -> list[float]:
    """Return the rates of the first stage: the grid, and its neighbours as long as the best is at an edge."""
    found = results(arm, "rate")
    if not set(RATES) <= set(found):
        return [*RATES]
    best = max(found, key=found.__getitem__)
    wider = {rate for rate in (best / 2, best * 2) if WIDEST[0] <= rate <= WIDEST[1]}
    return sorted(found.keys() | wider)


def best_rate(arm: str) -> float | None:
    """Return the rate of the short runs, or None before the first stage has finished."""
    arm = ONE_CHANGE.get(arm, arm)
    found = results(arm, "rate")
    return max(found, key=found.__getitem__) if set(wanted_rates(arm)) <= set(found) else None


def checked_rates(arm: str) -> list[float]:
    """Return the rates that are checked; [] before the first stage has finished.

    The best and its better neighbour, and those beyond as long as the best of the checked ones is at an edge. The best
    alone if its lead is clear: then nothing is left to check.
    """
    found, best = results(arm, "rate"), best_rate(arm)
    if best is None:
        return []
    beside = [rate for rate in (best / 2, best * 2) if rate in found]
    second = max(beside, key=found.__getitem__)
    if found[best] - found[second] >= CLEAR_LEAD:
        return [best]
    rates, found = {best, second}, results(arm, "check")
    while rates <= found.keys():
        best = max(rates, key=found.__getitem__)
        beyond = {rate for rate in (best / 2, best * 2) if WIDEST[0] <= rate <= WIDEST[1]} - rates
        if not beyond:
            break
        rates |= beyond
    return sorted(rates)


def chosen_rate(arm: str) -> float | None:
    """Return the rate of the long runs, or None before it is known."""
    arm = ONE_CHANGE.get(arm, arm)
    wanted, found = checked_rates(arm), results(arm, "check")
    if len(wanted) == 1:
        return wanted[0]
    return max(found, key=found.__getitem__) if wanted and set(wanted) <= set(found) else None


def next_trials(only_short: bool = False) -> list[Trial] | None:
    """Return the runs that may start now, in order; None when all have finished.

    Those of 22 epochs come before other attention, or not at all with `only_short`.
    """
    trials = short_trials(ARMS)
    trials += [
        Trial("check", arm, rate, SPARE_SEED)
        for arm in ARMS
        if arm not in ONE_CHANGE and chosen_rate(arm) is None
        for rate in checked_rates(arm)
    ]
    chosen = {arm: rate for arm in ARMS if (rate := chosen_rate(arm)) is not None}
    trials += [*compared("main", chosen), *short_trials(LATER)]
    wanted = [trial for trial in trials if not (only_short and EPOCHS[trial.stage] == EPOCHS["main"])]
    left = [trial for trial in wanted if not trial.record.exists()]
    known = (only_short or len(chosen) == len(ARMS)) and all(best_rate(arm) for arm in (*ARMS, *LATER))
    return left if left or not known else None


def short_trials(group: Iterable[str]) -> list[Trial]:
    """Return the runs of 4 epochs of some arms: those that choose rates, then those that are compared."""
    trials = [
        Trial("rate", arm, rate, SPARE_SEED) for arm in group if arm not in ONE_CHANGE for rate in wanted_rates(arm)
    ]
    return trials + compared("short", {arm: rate for arm in group if (rate := best_rate(arm)) is not None})


def compared(stage: str, rates: Mapping[str, float]) -> list[Trial]:
    """Return the compared runs, seed by seed, so that something can be compared as early as possible."""
    seeds = range(max(map(len, SEEDS.values())))
    return [Trial(stage, arm, rate, seed) for seed in seeds for arm, rate in rates.items() if seed in SEEDS[arm]]


def run(data: Path, work: Path, only_short: bool) -> None:
    """Run trial after trial until all have finished; with `only_short`, none of 22 epochs."""
    work_through(partial(next_trials, only_short), lambda trial: finish(trial, data, work / trial.name), work)


def work_through(next_trials: Callable[[], Sequence[Any] | None], finish: Callable[[Any], None], work: Path) -> None:
    """Finish trials, each with a `name` and a `record`, until there are no more, one thread for each process.

    It waits while other processes run those that the next one needs, and goes on after one that fails. SystemExit at
    the end names those; or one that was stopped, at once.
    """
    os.nice(max(0, 19 - os.nice(0)))
    work.mkdir(parents=True, exist_ok=True)
    failed: set[str] = set()
    while (left := next_trials()) is not None:
        trials = [trial for trial in left if trial.name not in failed]
        if failed and not trials:
            raise SystemExit(f"these failed: {', '.join(sorted(failed))}")
        claimed = next(claims(trials, work), None)
        if claimed is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        trial, lock = claimed
        try:
            if not trial.record.exists():
                finish(trial)
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            if isinstance(error, subprocess.CalledProcessError) and error.returncode == EXIT_STOPPED:  # to go on later
                raise SystemExit(f"{trial.name} was stopped; run the same command to go on") from None
            failed.add(trial.name)
            print(f"{trial.name}: {error}", flush=True)
        lock.close()


def claims(trials: Sequence[Any], work: Path) -> Iterator[tuple[Any, Any]]:
    """Yield the trials that this process holds alone, each with the open file that says so."""
    for trial in trials:
        lock = (work / f"{trial.name}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        yield trial, lock


def settings(trial: Trial, data: Path, directory: Path) -> list[str]:
    """Return what a run changes in the recipe."""
    own = [f"data.path={data.resolve() / trial.data_set}", f"run.dir={directory}", f"run.seed={trial.seed}"]
    own += [f"optim.lr={trial.rate:g}", f"train.epochs={EPOCHS[trial.stage]}", "train.eval_every_epochs=2"]
    own += ["checkpoint.keep_last=2", f"log.every_steps={50 if trial.stage == 'rate' else 10}"]
    if trial.stage == "main" and trial.seed > 0:  # amendment 4
        own += ["train.precision=bf16"]
    return [*own, *{**ARMS, **LATER}[trial.arm]]


def finish(trial: Trial, data: Path, directory: Path) -> None:
    """Train to the end, and write the record."""
    commit_of(directory)
    karat("train", RECIPE, *settings(trial, data, directory))
    numbers = directory / "analysis/content" / directory.name / "numbers.json"
    for old in (numbers, directory / FILE):  # as the analysis succeeds with one of two
        old.unlink(missing_ok=True)
    # Also leaves the prediction for each image in the run's directory.
    which = ("--only", "accuracy", "content", "--checkpoint", "latest", "--images", str(REPLACED))
    karat("analyze", str(directory), *which, "--out", str(directory / "analysis"))
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_atomically(trial.record, json.dumps(record_of(trial, directory, numbers), indent=1) + "\n")
    print(f"{trial.name}: {trial.top1():.2f} %", flush=True)


def record_of(trial: Trial, directory: Path, content: Path) -> dict[str, Any]:
    """Return what is kept of a finished run, with the numbers of the analysis of its content."""
    kinds, summary = events_of(directory), json.loads((directory / "summary.json").read_text())
    found = np.load(directory / FILE)  # in the order of the images' ids
    predictions = digits(found["top_labels"][:, 0]) if trial.stage in COMPARED else ""
    numbers = json.loads(content.read_text())
    if predictions:
        write_atomically(LABELS, digits(found["labels"]) + "\n")
    return {
        "stage": trial.stage,
        "arm": trial.arm,
        "rate": trial.rate,
        "top1": summary["last_top1"],
        "curve": [[event["step"], event["top1"], round(event["loss"], 4)] for event in kinds["eval"]],
        "content": kinds["eval"][-1]["content"],
        "replaced": {"images": numbers["images"], **numbers["top1"]},
        "training": by_interval(kinds["train"]),
        "predictions": predictions,
        **facts_of(summary, directory),
    }


def by_interval(events: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return for each 200 steps, counted from the last, its last step, mean loss and largest reported gradient norm.

    Raises ValueError where one of them was not finite.
    """
    if any(event["loss"] is None or event["grad_norm"] is None for event in events):
        raise ValueError("a loss or a gradient was not finite")
    last, before = events[-1]["step"], 0
    parts: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for event in events:  # its loss is the mean since the one before
        parts.setdefault((last - event["step"]) // 200, []).append((event["step"] - before, event))
        before = event["step"]
    return [
        [
            part[-1][1]["step"],
            round(sum(steps * event["loss"] for steps, event in part) / sum(steps for steps, _ in part), 4),
            round(max(event["grad_norm"] for _, event in part), 3),
        ]
        for part in parts.values()
    ]


def events_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return a run's evaluations and its reports of training, in order."""
    # A step that ran again after an interruption is there twice; the later line counts.
    events = {(event["event"], event.get("step")): event for event in read_events(directory / "metrics.jsonl")}
    return {kind: [own for (name, _), own in sorted(events.items()) if name == kind] for kind in ("eval", "train")}


def facts_of(summary: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return what identifies a finished run: its code, its recipe, its data and its machine."""
    kept = ("parameters", "seed", "data_digest", "recipe_sha256", "skipped_steps", "restarts", "versions", "processor")
    return {"commit": commit_of(directory), **{name: summary[name] for name in kept}}


def commit_of(directory: Path) -> str:
    """Return the commit of the code, which is that of all starts of the run in `directory`.

    Raises SystemExit if it is not, or if the code has changes that are not committed.
    """
    changed = ["git", "diff", "--stat", "HEAD", "--", "karat_scale", "benchmarks"]
    if said := subprocess.run(changed, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        raise SystemExit(f"commit first:\n{said}")
    show = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    file = directory / "commit"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(file, commit)
    if (begun := file.read_text()) != commit:
        raise SystemExit(f"{directory} was begun with commit {begun}; go on with that, in a worktree of its own")
    return commit


def digits(classes: npt.NDArray[np.int64]) -> str:
    """Return numbers of classes as text, a digit each."""
    return "".join(map(str, classes))


def karat(*arguments: str, threads: int = 1) -> None:
    """Run a command. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "karat_scale", *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def split(images: Path, data: Path) -> None:
    """Make the two data sets."""
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
        script = str(ROOT / "data_prep/make_webdataset.py")
        subprocess.run([sys.executable, script, "--src", str(tree), "--out", str(data / name)], check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    places_of = {"split": ("images", "data"), "run": ("data", "work"), "report": (), "weights": ("work",)}
    for name, places in places_of.items():
        command = commands.add_parser(name)
        for place in places:
            command.add_argument(place, type=Path)
        if name == "run":
            command.add_argument("--short", action="store_true", help="leave out runs of 22 epochs")
    asked = parser.parse_args()
    if asked.command == "split":
        split(asked.images, asked.data)
    elif asked.command == "run":
        run(asked.data, asked.work, asked.short)
    elif asked.command == "weights":
        from benchmarks.contrasts_weights import draw, export_best  # imports this module

        export_best(asked.work)
        draw()
    else:
        from benchmarks.contrasts_report import write_results  # imports scipy

        write_results()


if __name__ == "__main__":
    main()
