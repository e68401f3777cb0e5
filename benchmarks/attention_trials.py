"""The protocol of docs/experiments/attention.md: its arms and its runs, of which each has a record."""

import json
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
RATES = ("5e-4", "1e-3", "2e-3")
SPARE_SEED, SEEDS = 99, (0, 1, 2)
STAGES = ("rate", "compare", "start", "long")


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


def held_out_top1(arm: str) -> dict[str, float]:
    """Return each rate's top-1 on the held-out images."""
    results = {rate: Trial("rate", arm, rate, SPARE_SEED).result() for rate in RATES}
    return {rate: result["top1"] for rate, result in results.items() if result is not None}


def chosen_rates() -> dict[str, str]:
    """Return each arm's learning rate, by the held-out images."""
    return {arm: max(found, key=found.__getitem__) for arm in ARMS if (found := held_out_top1(arm))}
