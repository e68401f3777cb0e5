"""`karat bench stages`: a training step at each ZeRO stage against PyTorch's DistributedDataParallel.

Ranks of one machine train the same model from the same weights on the same images. The contenders take turns in the
same processes, and ratios are medians over rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from karat_scale.bench.interleave import interleaved_seconds, median_ratio
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import build_optimizer
from karat_scale.errors import UserError
from karat_scale.files import write_atomically
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import validate_recipe

DDP = "DistributedDataParallel"
STAGES = ("zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class StagesCase:
    """What is measured. `batch` is of one rank; `attention` is a recipe's `attention.kind`, `precision` its train's.

    `depth` is the model's own by default.
    """

    model: str = "vit_tiny_patch16_224"
    image_size: int = 64
    batch: int = 16
    attention: str = "softmax"
    ranks: int = 2
    steps: int = 3
    rounds: int = 9
    precision: str = "fp32"
    depth: int | None = None


def bench_stages(case: StagesCase, json_file: str | None) -> int:
    """Start the ranks, print their table, and write `json_file`; returns 0.

    Raises:
        UserError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command = [*launcher, "-m", "karat_scale.bench.stages", json.dumps(asdict(case)), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise UserError(f"bench stages: a rank failed: {errors[0] if errors else done.stderr[-200:]}")
        result = json.loads(out.read_text())
    _print(result)
    if json_file:
        write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
    return 0


def measure(case: StagesCase, out: Path) -> None:
    """What each rank does; rank 0 writes the result."""
    world = distributed.start("auto")
    try:
        rows = compare(case, world)
        if world.is_main:
            result = {**asdict(case), "device": str(world.device), "threads": torch.get_num_threads(), "rows": rows}
            out.write_text(json.dumps(result))
    finally:
        distributed.stop()


def compare(case: StagesCase, world: World) -> list[dict[str, Any]]:
    """A row of figures for DDP and for each stage, on every rank."""
    images = torch.randn(
        case.batch, 3, case.image_size, case.image_size, generator=torch.Generator().manual_seed(world.rank)
    ).to(world.device)
    labels = torch.arange(case.batch, device=world.device)
    contenders = {DDP: _ddp(case, world, images, labels)}
    contenders |= {stage: _engine(case, stage, world, images, labels) for stage in STAGES}
    seconds = interleaved_seconds(contenders, case.rounds)
    processor = {name: _processor_seconds(run) for name, run in contenders.items()}
    return [
        {
            "contender": name,
            "milliseconds_a_step": round(1e3 * statistics.median(seconds[name]) / case.steps, 2),
            "processor_milliseconds_a_step": round(1e3 * processor[name] / case.steps, 2),
            "ratio_to_ddp": round(median_ratio(seconds, name, DDP), 3),
        }
        for name in contenders
    ]


def _recipe(case: StagesCase, stage: str) -> Recipe:
    tree = {
        "run": {"name": "bench-stages", "dir": "unused"},
        "model": {"name": case.model, "image_size": case.image_size, "depth": case.depth},
        "attention": {"kind": case.attention},
        "data": {"backend": "synthetic"},
        "train": {"global_batch": case.batch * case.ranks, "epochs": 100, "precision": case.precision},
        "deepspeed": {"config": stage},
    }
    return validate_recipe(tree, "bench stages")


def _model(recipe: Recipe) -> Any:
    torch.manual_seed(0)
    return create_model(recipe.model, recipe.attention)


def _ddp(case: StagesCase, world: World, images: Tensor, labels: Tensor) -> Callable[[], None]:
    recipe = _recipe(case, "zero0")
    model = _model(recipe).to(world.device)
    optimizer = build_optimizer(model, recipe.optim, world.device)
    wrapped = DistributedDataParallel(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            logits = wrapped(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        float(nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad))
        optimizer.step()

    return _repeated(step, case.steps, world)


def _engine(case: StagesCase, stage: str, world: World, images: Tensor, labels: Tensor) -> Callable[[], None]:
    recipe = _recipe(case, stage)
    engine = Engine(_model(recipe), recipe, world, case.batch)

    def step() -> None:
        engine.backward(nn.functional.cross_entropy(engine.forward(images), labels))
        engine.step()

    return _repeated(step, case.steps, world)


def _repeated(step: Callable[[], None], steps: int, world: World) -> Callable[[], None]:
    # Building a stage 3 engine replaces it for the whole process: each contender has its own.
    linear = nn.functional.linear

    def run() -> None:
        nn.functional.linear = linear
        dist.barrier()
        for _ in range(steps):
            step()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    return run


def _processor_seconds(run: Callable[[], None]) -> float:
    """Of this rank, all threads: what a step costs apart from waiting for the other ranks."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _print(result: dict[str, Any]) -> None:
    title = "{model} at {image_size} px, {attention}, {ranks} ranks x {batch}, {device}, {threads} threads each"
    table = Table(title=title.format(**result))
    for column in ("", "ms a step", "processor ms", "to DDP"):
        table.add_column(column, justify="right" if column else "left")
    for row in result["rows"]:
        table.add_row(
            row["contender"],
            f"{row['milliseconds_a_step']:.1f}",
            f"{row['processor_milliseconds_a_step']:.1f}",
            f"{row['ratio_to_ddp']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    measure(StagesCase(**json.loads(sys.argv[1])), Path(sys.argv[2]))
