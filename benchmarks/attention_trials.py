"""The protocol of docs/experiments/attention.md: the arms, the runs, and which of them comes next."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs/experiments/attention"
RECIPE = "cifar10_vit_nano_32px"
KARAT = "attention.kind=karat"
CHOICES = {"gains": "attention.gains=true", "decay": "optim.karat_weight_decay=true"}
ARMS = {
    "softmax": [],
    "static": ["attention.kind=static"],
    "static_softmax": ["attention.kind=static_softmax"],
    "karat": [KARAT],
    "no_scores": [KARAT, "attention.scores=false"],
    "content": [KARAT, "attention.form=content"],
    "learned_score": ["attention.kind=learned_score"],
    "residual": [KARAT, "attention.residual=true", "optim.karat_weight_decay=true"],
    "bounded": [KARAT, "attention.form=bounded", "optim.karat_weight_decay=true"],
    "smooth": [KARAT, "attention.form=smooth"],
    "hybrid": [KARAT, "attention.softmax_heads=1"],
    # Added after the comparison.
    "scaled_softmax": ["attention.kind=scaled_softmax"],
    "frozen": ["attention.kind=static", "train.freeze='*.operator.matrix'"],
}
# What the paper leaves open: the start of the coefficients, KAN's gains, and weight decay.
STARTS = {
    "_".join((init, *more)): [KARAT, f"attention.init={init}", *(CHOICES[name] for name in more)]
    for init in ("paper", "fourier_kan")
    for more in ((), ("gains",), ("decay",), ("gains", "decay"))
}
GONE = ("learned_score", "bounded")  # they have records; their code is in commit 28953be
VARIANTS = ("content", "learned_score", "residual", "bounded", "smooth", "hybrid")
START_RATE, START_SEED = "1e-3", 0
RATES = ("5e-4", "1e-3", "2e-3")
SPARE_SEED, SEEDS, LONG_SEEDS = 99, (0, 1, 2), (0, 1)
EPOCHS = {"rate": 1, "compare": 2, "start": 2, "long": 22}
STEPS_OF_EPOCH = 703
CUT = 4.0
HELD_OUT = 500


@dataclass(frozen=True)
class Trial:
    """One run of the experiment."""

    stage: str
    arm: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its record, without the suffix."""
        return f"{self.stage}-{self.arm}-lr{self.rate}-seed{self.seed}"

    @property
    def record(self) -> Path:
        """Its record."""
        return RECORDS / f"{self.name}.json"

    def result(self) -> dict[str, Any] | None:
        """Return its record, if it has finished."""
        return json.loads(self.record.read_text()) if self.record.exists() else None


def next_trials() -> list[Trial] | None:
    """Return the runs that can start now, given the records so far; None if all are done."""
    rates = [Trial("rate", arm, rate, SPARE_SEED) for arm in ARMS for rate in RATES]
    if open_trials := [trial for trial in rates if not trial.record.exists()]:
        return open_trials
    chosen = chosen_rates()
    compared = [Trial("compare", arm, chosen[arm], seed) for seed in SEEDS for arm in arms_left()]
    if open_trials := [trial for trial in compared if not trial.record.exists()]:
        return open_trials
    starts = [Trial("start", start, START_RATE, START_SEED) for start in STARTS]
    if open_trials := [trial for trial in starts if not trial.record.exists()]:
        return open_trials
    arms = "softmax", "static", best_variant()
    long = [Trial("long", arm, chosen[arm], seed) for seed in LONG_SEEDS for arm in arms]
    long.append(Trial("long", best_start(), START_RATE, START_SEED))
    return [trial for trial in long if not trial.record.exists()] or None


def held_out_top1(arm: str) -> dict[str, float]:
    """Return each rate's top-1 on the held-out images."""
    results = {rate: Trial("rate", arm, rate, SPARE_SEED).result() for rate in RATES}
    return {rate: result["top1"] for rate, result in results.items() if result is not None}


def chosen_rates() -> dict[str, str]:
    """Return each arm's learning rate, by the held-out images."""
    return {arm: max(found, key=found.__getitem__) for arm in ARMS if (found := held_out_top1(arm))}


def arms_left() -> list[str]:
    """Return the arms that the protocol compares."""
    least = max(held_out_top1("karat").values()) - CUT
    return [arm for arm in ARMS if arm not in VARIANTS or max(held_out_top1(arm).values()) >= least]


def best_variant() -> str:
    """Return the variant with the best mean top-1 in the comparison."""
    chosen = chosen_rates()

    def mean(arm: str) -> float:
        results = [Trial("compare", arm, chosen[arm], seed).result() for seed in SEEDS]
        return statistics.mean(float(result["top1"]) for result in results if result is not None)

    return max((arm for arm in arms_left() if arm in VARIANTS), key=mean)


def best_start() -> str:
    """Return the start with the best top-1 of its stage."""
    found = {start: Trial("start", start, START_RATE, START_SEED).result() for start in STARTS}
    return max(found, key=lambda start: float((found[start] or {"top1": 0})["top1"]))
