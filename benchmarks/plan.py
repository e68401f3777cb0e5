"""The memory that `karat plan` predicts against the peak of live tensors in real steps: `python -m benchmarks.plan`."""

import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.live_tensors import live_tensor_peak
from karat_scale.commands.plan.memory import Machine, Subject, consider, micro_batches
from karat_scale.foundation.arguments import OneLineParser, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe

# Optimizer states are made in the first step, so the second one is the first of its kind.
STEPS = 2
# Bytes that anything fits in.
PLENTY = 10**12
# More parameters than two buckets have, and few images.
FULL_BUCKETS = {"model.embed_dim": 512, "model.num_heads": 8, "train.global_batch": 4}
# A micro batch that is small beside an evaluation's.
EVALUATES = {"train.global_batch": 4, "train.eval_batch": 64}


@dataclass(frozen=True)
class Case:
    """A recipe as the dotted keys that differ from the common one, on `world` ranks.

    evaluates: after the steps too, and the recipe's `train.eval_batch` is planned for.
    """

    world: int
    config: str
    keys: dict[str, Any]
    evaluates: bool = False

    @property
    def name(self) -> str:
        settings = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.keys.items())
        return f"{self.config} x {self.world} {settings}"


CASES = (
    Case(1, "zero0", {"attention.kind": "softmax"}),
    Case(1, "zero0", {"attention.implementation": "reference", "train.global_batch": 8}),
    Case(1, "zero0", {"attention.implementation": "streaming", "train.precision": "bf16"}),
    Case(1, "zero0", {"attention.implementation": "reference", "train.recompute.policy": "attention"}),
    Case(1, "zero1", {"attention.implementation": "cpu", "train.recompute.policy": "all"}),
    Case(
        1, "zero1", {"attention.implementation": "streaming", "train.precision": "bf16_weights", "train.micro_batch": 4}
    ),
    Case(1, "zero2", {"attention.implementation": "cpu", "train.micro_batch": 4, "train.ema_decay": 0.0}),
    Case(1, "zero2", {"attention.kind": "softmax", "train.precision": "bf16", "train.recompute.policy": "every"}),
    Case(1, "zero3", {"attention.implementation": "cpu"}),
    Case(2, "zero0", {"attention.implementation": "cpu", "train.precision": "bf16", "train.ema_decay": 0.0}),
    Case(
        2, "zero2", {"attention.implementation": "streaming", "train.precision": "bf16_weights", "train.micro_batch": 4}
    ),
    Case(2, "zero3", {"attention.implementation": "cpu", "train.micro_batch": 4}),
    *(Case(2, f"zero{stage}", {"attention.kind": "softmax", **FULL_BUCKETS}) for stage in (1, 2, 3)),
    Case(1, "zero0", {"attention.kind": "softmax", **EVALUATES}, evaluates=True),
    Case(1, "zero0", {"attention.implementation": "reference", "train.precision": "bf16", **EVALUATES}, evaluates=True),
    Case(1, "zero1", {"attention.kind": "softmax", "train.precision": "bf16_weights", **EVALUATES}, evaluates=True),
    Case(2, "zero3", {"attention.kind": "softmax", **EVALUATES}, evaluates=True),
    Case(1, "zero1", {"attention.kind": "softmax", "train.precision": "bf16", "train.micro_batch": 4}),
    Case(1, "zero3", {"attention.implementation": "streaming", "train.precision": "bf16"}),
)


def main(arguments: list[str] | None = None) -> int:
    """Plan and measure every case, print a table, and return 1 if an error is above 10 %."""
    parser = OneLineParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        rows.append(compare(case))
        print(f"{case.name}: {100 * rows[-1]['error']:+.1f} %", flush=True)
    table = [
        [row["case"], f"{row['planned'] / 1e6:.1f}", f"{row['measured'] / 1e6:.1f}", f"{100 * row['error']:+.1f} %"]
        for row in rows
    ]
    print_table("live tensors at their peak, MB", ["case", "planned", "measured", "error"], table)
    write_json(options.json, rows)
    return 1 if any(abs(row["error"]) > 0.1 for row in rows) else 0


def compare(case: Case) -> dict[str, Any]:
    """Planned and measured bytes of live tensors, and the plan's relative error."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_of(case, scratch)
        micro_batch = next(micro_batches(recipe, case.world))
        machine = Machine(case.world, PLENTY if case.evaluates else 0, False)
        planned = consider(Subject(recipe, False), machine, case.config, micro_batch).peak.total
        measured = live_tensor_peak(recipe, case.world, STEPS, case.evaluates)
    return {"case": case.name, "planned": planned, "measured": measured, "error": planned / measured - 1}


def recipe_of(case: Case, scratch: str) -> Recipe:
    """ViT-Tiny of four blocks at 112 px, batches of 16, with KArAt G3B unless the case says otherwise."""
    tree: dict[str, Any] = {
        "run": {"name": "bench-plan", "dir": f"{scratch}/run", "device": "cpu"},
        "model": {"name": "vit_tiny_patch16_224", "image_size": 112, "depth": 4, "num_classes": 100},
        "attention": {"kind": "karat"},
        "data": {"backend": "synthetic", "synthetic_samples": 128},  # an evaluation's batch for each of two ranks
        "schedule": {"warmup_epochs": 0},
        "train": {"global_batch": 16, "ema_decay": 0.99},
        "deepspeed": {"config": case.config},
        "checkpoint": {"every_minutes": None},
        "log": {"every_steps": 1000, "trackers": []},
    }
    for key, value in case.keys.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return validate_recipe(tree, "bench plan")


if __name__ == "__main__":
    run_script(main)
