"""A training step at each ZeRO stage against DistributedDataParallel: `python -m benchmarks.stages`.

The ranks are processes of this machine. `karat bench gpu --only ranks` measures the same on GPUs.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from karat_scale.commands.bench.gpu.steps import StagesCase, compare_stages
from karat_scale.engine import distributed
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import UserError, run_script


def main(arguments: list[str] | None = None) -> None:
    """Start the ranks, print their table, and write the file of `--json`. Raises UserError if a rank failed."""
    parser = OneLineParser(prog="python -m benchmarks.stages", description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=count, default=64)
    parser.add_argument("--batch", type=count, default=16, help="of a rank (default: %(default)s)")
    parser.add_argument("--attention", choices=("softmax", "karat"), default="softmax")
    parser.add_argument("--ranks", type=count, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=3, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=9, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    case = StagesCase(**{name: value for name, value in vars(options).items() if name != "json"})
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command = [*launcher, "-m", "benchmarks.stages", "--rank", json.dumps(asdict(case)), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise UserError(f"a rank failed: {errors[0] if errors else done.stderr[-200:]}")
        result = json.loads(out.read_text())
    _print(result)
    write_json(options.json, result)


def measure(case: StagesCase, out: Path) -> None:
    """Measure on each rank; rank 0 writes the result."""
    world = distributed.start("auto")
    try:
        rows = compare_stages(case, world)
        if world.is_main:
            result = {**asdict(case), "device": str(world.device), "threads": torch.get_num_threads(), "rows": rows}
            out.write_text(json.dumps(result))
    finally:
        distributed.stop()


def _print(result: dict[str, Any]) -> None:
    title = "{model} at {image_size} px, {attention}, {ranks} ranks x {batch}, {device}, {threads} threads each"
    rows = [
        (
            row["contender"],
            f"{row['milliseconds_a_step']:.1f}",
            f"{row['processor_milliseconds_a_step']:.1f}",
            f"{row['ratio_to_ddp']:.2f}",
        )
        for row in result["rows"]
    ]
    print_table(title.format(**result), ("", "ms per step", "processor ms", "to DDP"), rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(StagesCase(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        run_script(main)
