"""The experiment of docs/experiments/conversions.md: `python -m benchmarks.conversions run DATA WORK`.

DATA is what `python -m benchmarks.contrasts split` makes; `split DATA` adds the data sets of fewer images. `run` trains
the original, converts it run after run in WORK, and writes each one's record to docs/experiments/conversions/, and the
original's weights beside them. Interrupted runs resume, and several processes may share WORK. `report` writes the page
of results from the records.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_results import difference, table
from benchmarks.contrasts import ROOT, commit_of, digits, events_of, facts_of, karat, work_through
from karat_scale.commands.analyze.predictions import FILE as PREDICTIONS
from karat_scale.foundation.files import file_sha256, write_atomically
from karat_scale.training.tasks.classification.conversion import FILE as MATCHED
from karat_scale.training.tasks.classification.conversion import read_report

RECORDS = ROOT / "docs/experiments/conversions"
PAGE = RECORDS.parent / "conversions_results.md"
RECIPE = "cifar10_vit_nano_32px"
MODEL = ["model.embed_dim=192", "model.num_heads=3"]
# Chosen by pilot runs: with AdamW, crops and flips an original of 45 epochs overfitted and had 65 %.
TRAINING = [
    *("train.precision=bf16", "optim.name=muon", "train.global_batch=128", "augment.scale=[0.4,1.0]"),
    *("augment.ratio=[0.75,1.3333]", "augment.randaugment=rand-m7-n2-mstd0.5-inc1", "augment.mix_prob=0.5"),
    "augment.label_smoothing=0.1",
]
# KArAt's functions wrap the large scores of this start, so a run from scratch has timm's.
SOFTMAX_START = "model.weight_init=mimetic"
KARAT = ["attention.kind=karat", "attention.bound=3.14"]
ARMS = {
    "smooth": [*KARAT, "attention.form=smooth"],
    "static": ["attention.kind=static"],
    "bound": KARAT,
    "hybrid": [*KARAT, "attention.softmax_heads=1"],
}
TUNED = ("smooth", "static")  # the other arms have functions too, and take the rate of the first
CONTINUED = "softmax"  # the control that is trained on as long, and not converted
RATES, WIDEST = (5e-4, 1e-3, 2e-3), (1.25e-4, 8e-3)
SCRATCH_RATE = 2e-3  # as the original
ALL, FEWER = 45000, (1000, 5000)
ORIGINAL_EPOCHS, EPOCHS, SCRATCH_EPOCHS = 40, 5, 7
STEPS = 704  # of gradient descent: as many as see each of all images once
SPARE_SEED, MORE_SEEDS = 99, (1, 2)
WANTED = 80.0  # percent of the test images, of the original


@dataclass(frozen=True)
class Trial:
    """One run of the experiment. `images` is 0 where none are trained on without labels."""

    stage: str
    arm: str = CONTINUED
    images: int = ALL
    rate: float = SCRATCH_RATE
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its run and of its record, without the suffix."""
        return f"{self.stage}-{self.arm}-{self.images}-{self.epochs}epochs-lr{self.rate:g}-seed{self.seed}"

    @property
    def record(self) -> Path:
        """Its record."""
        return RECORDS / f"{self.name}.json"

    def found(self, which: str) -> float:
        """Return its top-1 in percent on `held_out` or `tested` images; it has finished."""
        return float(json.loads(self.record.read_text())[which])

    @property
    def epochs(self) -> int:
        """How long it trains."""
        if self.stage == "whole":
            return ORIGINAL_EPOCHS * (2 if original() == LONGER else 1) + EPOCHS
        own = {"original": ORIGINAL_EPOCHS, "longer": ORIGINAL_EPOCHS, "rate": 1, "scratch": SCRATCH_EPOCHS}
        return own.get(self.stage, EPOCHS)

    @property
    def is_converted(self) -> bool:
        """Whether its blocks are matched with the original's before it trains."""
        return self.stage in ("rate", "convert") and self.arm != CONTINUED

    @property
    def data_set(self) -> str:
        """The data set that it trains on. Its val split are the held-out images."""
        return "held_out" if self.images == ALL else f"held_out_{self.images}"


ORIGINAL = Trial("original")
LONGER = Trial("longer")  # goes on from the original's weights, where that is too weak


def original() -> Trial:
    """Return the run whose model is converted."""
    return LONGER if LONGER.record.exists() else ORIGINAL


def weights(trial: Trial | None = None) -> Path:
    """Return the file of the weights of one of the originals, by default of the one that is converted."""
    return RECORDS / f"{(trial or original()).name}.safetensors"


def rate_results(arm: str) -> dict[float, float]:
    """Return what an arm reached on the held-out images at each rate that has run."""
    rates = [RATES[0] / 4, RATES[0] / 2, *RATES, RATES[-1] * 2, RATES[-1] * 4]
    trials = [Trial("rate", arm, ALL, rate, SPARE_SEED) for rate in rates]
    return {trial.rate: trial.found("held_out") for trial in trials if trial.record.exists()}


def wanted_rates(arm: str) -> list[float]:
    """Return the rates to run: the grid, and one more beyond an edge as long as the best is there."""
    found = rate_results(arm)
    if not set(RATES) <= set(found):
        return [*RATES]
    best, rates = max(found, key=found.__getitem__), sorted(found)
    if best == rates[0] and best / 2 >= WIDEST[0]:
        return [best / 2, *rates]
    return [*rates, best * 2] if best == rates[-1] and best * 2 <= WIDEST[1] else rates


def chosen_rate(arm: str) -> float | None:
    """Return an arm's rate, or None before it is known."""
    tuned = arm if arm in TUNED else TUNED[0]
    found = rate_results(tuned)
    return max(found, key=found.__getitem__) if set(wanted_rates(tuned)) <= set(found) else None


def best() -> str | None:
    """Return the arm with functions whose conversion is best on the held-out images, or None before all have run."""
    rates = {arm: rate for arm in ARMS if (rate := chosen_rate(arm)) is not None}
    trials = [Trial("convert", arm, ALL, rate) for arm, rate in rates.items() if arm != "static"]
    if len(trials) < len(ARMS) - 1 or not all(trial.record.exists() for trial in trials):
        return None
    return max(trials, key=lambda trial: trial.found("held_out")).arm


def next_trials() -> list[Trial] | None:
    """Return the runs that may start now, in order; None when all have finished.

    Raises:
        SystemExit: the original is not as good as the protocol wants.
    """
    if not ORIGINAL.record.exists():
        return [ORIGINAL]
    if (top1 := original().found("tested")) < WANTED:
        if original() == ORIGINAL:
            return [LONGER]
        raise SystemExit(f"the original has {top1:.2f} % of {WANTED:g} %: amend the protocol")
    trials = [Trial("rate", arm, ALL, rate, SPARE_SEED) for arm in TUNED for rate in wanted_rates(arm)]
    rates = {arm: rate for arm in (*ARMS, CONTINUED) if (rate := chosen_rate(arm)) is not None}
    trials += [Trial("convert", arm, ALL, rate) for arm, rate in rates.items()]
    chosen = best() if "static" in rates else None
    if chosen is not None:
        pair = (chosen, "static")
        trials += [Trial("convert", arm, ALL, rates[arm], seed) for seed in MORE_SEEDS for arm in pair]
        trials += [Trial("scratch", arm) for arm in dict.fromkeys((*pair, *ARMS))]
        trials += [Trial("convert", arm, images, rate) for images in FEWER for arm, rate in rates.items()]
        trials += [Trial("unmatched", arm, ALL, rates[arm]) for arm in pair]
        trials += [Trial("whole", arm) for arm in pair]
    left = [trial for trial in trials if not trial.record.exists()]
    return left if left or chosen is None else None


def settings(trial: Trial, data: Path, work: Path) -> list[str]:
    """Return what a run changes in the recipe."""
    own = [f"data.path={data.resolve() / trial.data_set}", f"run.dir={work / trial.name}", f"run.seed={trial.seed}"]
    own += [f"optim.lr={trial.rate:g}", f"train.epochs={trial.epochs}", "checkpoint.keep_last=2", "log.every_steps=50"]
    own.append(f"train.eval_every_epochs={1 if trial.epochs <= SCRATCH_EPOCHS else 4}")
    own += [*TRAINING, *MODEL, *ARMS.get(trial.arm, [])]
    if trial.arm == CONTINUED:
        own.append(SOFTMAX_START)
    if trial.is_converted:
        return [*own, f"convert.images={trial.images}", f"convert.steps={STEPS}"]
    if trial == LONGER:
        return [*own, f"init_from={weights(ORIGINAL)}"]
    learns_from = trial.stage in ("convert", "unmatched")
    return [*own, f"init_from={weights()}", f"distill.from={weights()}"] if learns_from else own


def finish(trial: Trial, data: Path, work: Path, *overrides: str) -> None:
    """Train to the end, evaluate once on the test images, and write the record."""
    directory = work / trial.name
    commit_of(directory)
    if trial.stage == "rate":  # the matching is the same at each rate
        for other in work.glob(f"rate-{trial.arm}-*/{MATCHED}"):
            if not (directory / MATCHED).exists():
                shutil.copyfile(other, directory / MATCHED)
    first = ["convert", str(weights())] if trial.is_converted else ["train"]
    threads = 2 if trial in (ORIGINAL, LONGER) else 1  # nothing else can run before these have finished
    karat(*first, RECIPE, *settings(trial, data, work), *overrides, threads=threads)
    RECORDS.mkdir(parents=True, exist_ok=True)
    if trial.stage != "rate":  # leaves the prediction for each image in the run's directory
        analyze = ("--only", "accuracy", "--checkpoint", "latest", "--out", str(directory / "analysis"))
        karat("analyze", str(directory), *analyze, "--data", str(data.resolve() / "tested"))
    if trial in (ORIGINAL, LONGER):
        karat("export", str(directory), "--checkpoint", "latest", "--weights", "raw", "--out", str(weights(trial)))
    write_atomically(trial.record, json.dumps(record_of(trial, directory), indent=1) + "\n")
    print(f"{trial.name}: {trial.found('held_out'):.2f} %", flush=True)


def record_of(trial: Trial, directory: Path) -> dict[str, Any]:
    """Return what is kept of a finished run."""
    kinds, summary = events_of(directory), json.loads((directory / "summary.json").read_text())
    report = read_report(directory)
    tested: dict[str, Any] = {}
    if trial.stage != "rate":
        found = np.load(directory / PREDICTIONS)  # in the order of the images' ids
        right = found["top_labels"][:, 0] == found["labels"]
        tested = {"tested": 100 * float(right.mean()), "right": digits(right.astype(int))}
    return {
        "stage": trial.stage,
        "arm": trial.arm,
        "images": trial.images,
        "rate": trial.rate,
        "epochs": trial.epochs,
        "held_out": summary["last_top1"],
        **tested,
        "curve": [[event["step"], event["top1"], round(event["loss"], 4)] for event in kinds["eval"]],
        "matched": report and {key: report[key] for key in ("blocks", "top1")},
        "original_sha256": file_sha256(weights(trial if trial in (ORIGINAL, LONGER) else None)),
        **facts_of(summary, directory),
    }


HEAD = """# Results of the conversions

The protocol, fixed before the runs, is [conversions.md](conversions.md). This page is written by
`python -m benchmarks.conversions report` from the records in `docs/experiments/conversions/`. Top-1 in percent; "test"
is that of the 10,000 test images after the last step, all else is of the 5,000 held-out images.
"""


def render() -> str:
    """Return the page. Raises ValueError if runs are of several commits, or from several originals."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    # An original that was too weak was trained on.
    left_out = "original" if original() == LONGER else "longer"
    current = [record for record in records if record["stage"] != left_out]
    for key, what in (("commit", "of one commit"), ("original_sha256", "from one original")):
        if len({record[key] for record in current}) > 1:
            raise ValueError(f"the runs are not {what}")
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_stage.setdefault(record["stage"], []).append(record)
    if "original" not in by_stage:
        return "\n".join([HEAD, "Not yet run.\n"])
    reached = f"{ORIGINAL.found('tested'):.2f} % of the test images after {ORIGINAL_EPOCHS} epochs"
    if original() == LONGER:
        reached += f", {LONGER.found('tested'):.2f} % after {ORIGINAL_EPOCHS} more, which started from its weights"
    parts = [HEAD, f"The original: {reached}.\n"]
    rows = [[arm, f"{rate:g}", f"{top1:.2f}"] for arm in TUNED for rate, top1 in sorted(rate_results(arm).items())]
    if rows:
        parts.append("## Rates, one epoch after matching\n\n" + table(["arm", "rate", "held-out"], rows))
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in by_stage.get("convert", ()):
        groups.setdefault((-record["images"], record["arm"]), []).append(record)
    rows = [
        converted_row(groups[key]) for key in sorted(groups, key=lambda key: (key[0], [*ARMS, CONTINUED].index(key[1])))
    ]
    head = [
        "arm",
        "images",
        "error of O by block",
        "at once",
        "matched",
        "1 epoch",
        f"{EPOCHS} epochs",
        "test",
        "seeds",
    ]
    if rows:
        parts.append("## Converted\n\n" + table(head, rows))
    own = {arm: {r["seed"]: r["tested"] for r in groups.get((-ALL, arm), ())} for arm in ARMS}
    pairs = [
        (arm, [own[arm][seed] - own["static"][seed] for seed in own[arm].keys() & own["static"].keys()]) for arm in ARMS
    ]
    differences = [
        [f"{arm} - static", len(gaps), difference(gaps)] for arm, gaps in pairs if arm != "static" and len(gaps) > 1
    ]
    if differences:
        parts.append("By seed, with its 95 % t interval:\n\n" + table(["difference", "seeds", "points"], differences))
    others = [r for stage in ("unmatched", "scratch", "whole") for r in by_stage.get(stage, ())]
    rows = [[r["stage"], r["arm"], str(r["epochs"]), f"{r['held_out']:.2f}", f"{r['tested']:.2f}"] for r in others]
    if rows:
        parts.append(
            "## Not matched, and from scratch\n\n" + table(["stage", "arm", "epochs", "held-out", "test"], rows)
        )
    if "whole" not in by_stage:
        parts.append("Step 8, from scratch for as long as both trainings, has not run.\n")
    return "\n".join(parts)


def converted_row(own: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of the runs of an arm that differ by their seed; means over seeds."""
    curve = [statistics.mean(r["curve"][epoch - 1][1] for r in own) for epoch in (1, EPOCHS)]
    cells = ["", "", ""]
    if own[0]["matched"]:
        by_block = zip(*(r["matched"]["blocks"] for r in own), strict=True)
        # That of a head that keeps softmax is 0.
        errors = [statistics.mean(x for block in blocks for x in block["matched"] if x) for blocks in by_block]
        stages = [statistics.mean(r["matched"]["top1"][key] for r in own) for key in ("at_once", "matched")]
        cells = [", ".join(f"{error:.3f}" for error in errors), *(f"{value:.2f}" for value in stages)]
    tested = ", ".join(f"{r['tested']:.2f}" for r in own)
    return [own[0]["arm"], f"{own[0]['images']:,}", *cells, *(f"{x:.2f}" for x in curve), tested, str(len(own))]


def split(data: Path) -> None:
    """Make the data sets of fewer training images, with the same held-out images."""
    for images in FEWER:
        for only in (["--split", "train", "--subset", str(images // 10)], ["--split", "val"]):
            script = [
                sys.executable,
                str(ROOT / "data_prep/make_webdataset.py"),
                "--src",
                str(data / "held_out_images"),
            ]
            subprocess.run([*script, "--out", str(data / f"held_out_{images}"), *only], check=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, places in {"split": ("data",), "run": ("data", "work"), "report": ()}.items():
        command = commands.add_parser(name)
        for place in places:
            command.add_argument(place, type=Path)
    asked = parser.parse_args()
    if asked.command == "split":
        split(asked.data)
    elif asked.command == "run":
        work_through(next_trials, lambda trial: finish(trial, asked.data, asked.work), asked.work)
    else:
        write_atomically(PAGE, render())


if __name__ == "__main__":
    main()
