"""The experiment of docs/experiments/conversions.md: `python -m benchmarks.conversions run DATA WORK`.

DATA is what `python -m benchmarks.contrasts split` makes. `run` trains the original, converts it run after run in WORK,
and writes each one's record to docs/experiments/conversions/. Interrupted runs resume, and several processes may share
WORK. `report` writes the page of results from the records.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.attention_results import table
from benchmarks.contrasts import ROOT, events_of, facts_of, karat, work_through
from karat_scale.foundation.files import write_atomically
from karat_scale.training.tasks.classification.conversion import mean_error, read_report

RECORDS = ROOT / "docs/experiments/conversions"
PAGE = RECORDS.parent / "conversions_results.md"
RECIPE = "cifar10_vit_nano_32px"
MODEL = ["model.embed_dim=192", "model.num_heads=3"]
# KArAt's functions wrap the large scores of this start, so a run from scratch has timm's.
SOFTMAX_START = "model.weight_init=mimetic"
KARAT = ["attention.kind=karat", "attention.bound=3.14"]
ARMS = {
    "bound": KARAT,
    "smooth": [*KARAT, "attention.form=smooth"],
    "hybrid": [*KARAT, "attention.softmax_heads=1"],
    "static": ["attention.kind=static"],
}
IMAGES = (1000, 5000, 45000)
RATES = (1e-4, 2e-4, 4e-4)
ORIGINAL_EPOCHS, EPOCHS = 60, 5
STEPS = 704  # of gradient descent: as many as see each of all images once
SPARE_SEED = 99
MORE_SEEDS = (1, 2)  # of the best conversion, and of static mixing with as many images


@dataclass(frozen=True)
class Trial:
    """One run of the experiment. `images` is 0 where nothing is converted."""

    stage: str
    arm: str = "softmax"
    images: int = 0
    rate: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its run and of its record, without the suffix."""
        return f"{self.stage}-{self.arm}-{self.images}-{self.epochs}epochs-lr{self.rate:g}-seed{self.seed}"

    @property
    def record(self) -> Path:
        """Its record."""
        return RECORDS / f"{self.name}.json"

    def top1(self) -> float:
        """Return its result in percent; it has finished."""
        return float(json.loads(self.record.read_text())["top1"])

    @property
    def epochs(self) -> int:
        """How long it trains."""
        return {"original": ORIGINAL_EPOCHS, "rate": 1, "whole": ORIGINAL_EPOCHS + EPOCHS}.get(self.stage, EPOCHS)

    @property
    def data_set(self) -> str:
        """Only the runs that are compared see the test images."""
        return "held_out" if self.stage == "rate" else "tested"


ORIGINAL = Trial("original")


def rate_trials(arm: str) -> list[Trial]:
    """Return the runs that choose an arm's rate."""
    return [Trial("rate", arm, IMAGES[0], rate, SPARE_SEED) for rate in RATES]


def chosen_rate(arm: str) -> float | None:
    """Return an arm's rate, or None before it is known."""
    trials = rate_trials(arm)
    return max(trials, key=Trial.top1).rate if all(trial.record.exists() for trial in trials) else None


def conversions() -> list[Trial]:
    """Return the conversions whose rate is known, fewer images first."""
    rates = {arm: rate for arm in ARMS if (rate := chosen_rate(arm)) is not None}
    return [Trial("convert", arm, images, rate) for images in IMAGES for arm, rate in rates.items()]


def best() -> str | None:
    """Return the arm with functions whose rate run is best on the held-out images, or None before all have finished."""
    rates = {arm: chosen_rate(arm) for arm in ARMS if arm != "static"}
    if None in rates.values():
        return None
    return max(rates, key=lambda arm: max(trial.top1() for trial in rate_trials(arm)))


def next_trials() -> list[Trial] | None:
    """Return the runs that may start now, in order; None when all have finished."""
    # The same attention from scratch: as long as the conversion trains, and as long as both trainings together.
    trials = [ORIGINAL, *(Trial("scratch", arm) for arm in ARMS)]
    chosen = best() if ORIGINAL.record.exists() else None
    if ORIGINAL.record.exists():
        trials = [*(trial for arm in ARMS for trial in rate_trials(arm)), *conversions(), *trials]
    if chosen is not None:
        for seed in MORE_SEEDS:
            all_images = [one for one in conversions() if one.images == IMAGES[-1] and one.arm in (chosen, "static")]
            trials += [replace(one, seed=seed) for one in all_images]
        trials += [Trial("whole", chosen), Trial("whole", "static")]
    left = [trial for trial in trials if not trial.record.exists()]
    return left if left or chosen is None else None


def settings(trial: Trial, data: Path, work: Path) -> list[str]:
    """Return what a run changes in the recipe."""
    own = [f"data.path={data.resolve() / trial.data_set}", f"run.dir={work / trial.name}", f"run.seed={trial.seed}"]
    own += [f"optim.lr={trial.rate:g}", f"train.epochs={trial.epochs}", "checkpoint.keep_last=2", "log.every_steps=50"]
    own += [f"train.eval_every_epochs={1 if trial.epochs <= EPOCHS else 4}", *MODEL, *ARMS.get(trial.arm, [])]
    if trial.stage == "original":
        own.append(SOFTMAX_START)
    return [*own, f"convert.images={trial.images}", f"convert.steps={STEPS}"] if trial.images else own


def finish(trial: Trial, data: Path, work: Path, *overrides: str) -> None:
    """Train to the end, and write the record."""
    first = ["convert", str(work / ORIGINAL.name / "checkpoints/latest")] if trial.images else ["train"]
    karat(*first, RECIPE, *settings(trial, data, work), *overrides)
    RECORDS.mkdir(parents=True, exist_ok=True)
    write_atomically(trial.record, json.dumps(record_of(trial, work / trial.name), indent=1) + "\n")
    print(f"{trial.name}: {trial.top1():.2f} %", flush=True)


def record_of(trial: Trial, directory: Path) -> dict[str, Any]:
    """Return what is kept of a finished run."""
    kinds, summary = events_of(directory), json.loads((directory / "summary.json").read_text())
    report = read_report(directory)
    return {
        "stage": trial.stage,
        "arm": trial.arm,
        "images": trial.images,
        "rate": trial.rate,
        "epochs": trial.epochs,
        "top1": summary["last_top1"],
        "curve": [[event["step"], event["top1"], round(event["loss"], 4)] for event in kinds["eval"]],
        "matched": report and {key: report[key] for key in ("blocks", "top1")},
        **facts_of(summary),
    }


HEAD = """# Results of the conversions

The protocol, fixed before the runs, is [conversions.md](conversions.md). This page is written by
`python -m benchmarks.conversions report` from the records in `docs/experiments/conversions/`. Top-1 on the test images
is in percent.
"""


def render() -> str:
    """Return the page."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    stages = ("original", "convert", "scratch", "whole")
    by_stage = {stage: [record for record in records if record["stage"] == stage] for stage in stages}
    parts = [HEAD]
    if not by_stage["original"]:
        return "\n".join([HEAD, "Not yet run.\n"])
    parts.append(f"The original: {by_stage['original'][0]['top1']:.2f} %.\n")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in by_stage["convert"]:
        groups.setdefault((record["arm"], record["images"]), []).append(record)
    rows = []
    for (arm, images), own in sorted(groups.items(), key=lambda item: (item[0][1], [*ARMS].index(item[0][0]))):
        steps = [statistics.mean(r["matched"]["top1"][key] for r in own) for key in ("at_once", "matched")]
        steps += [statistics.mean(r["curve"][epoch - 1][1] for r in own) for epoch in (1, EPOCHS)]
        errors = statistics.mean(mean_error(block) for r in own for block in r["matched"]["blocks"])
        cells = [f"{value:.2f}" for value in steps]
        each = ", ".join(f"{record['top1']:.2f}" for record in own)
        spread = f" ({each})" if len(own) > 1 else ""
        rows.append([arm, f"{images:,}", f"{errors:.3f}", *cells[:-1], cells[-1] + spread])
    head = ["arm", "images", "error of O", "at once", "matched", "1 epoch", f"{EPOCHS} epochs"]
    parts.append("## Converted\n\n" + table(head, rows))
    rows = [[r["arm"], str(r["epochs"]), f"{r['top1']:.2f}"] for r in (*by_stage["scratch"], *by_stage["whole"])]
    parts.append("## From scratch\n\n" + table(["arm", "epochs", "top-1"], rows))
    return "\n".join(parts)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    for place in ("data", "work"):
        run.add_argument(place, type=Path)
    commands.add_parser("report")
    asked = parser.parse_args()
    if asked.command == "run":
        work_through(next_trials, lambda trial: finish(trial, asked.data, asked.work), asked.work)
    else:
        write_atomically(PAGE, render())


if __name__ == "__main__":
    main()
