"""What each policy of activation checkpointing saves in memory and costs in time: `python -m benchmarks.recompute`.

Forward and backward of a whole ViT at 224 px, for softmax and for each implementation of Fourier-KArAt. Policies run in
turn; ratios to the policy `none` are medians over rounds. Peaks are measured in processes of their own.
"""

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from karat_scale.arguments import OneLineParser, count, new_file
from karat_scale.bench.attention import clock_for, device_name
from karat_scale.bench.measuring import interleaved_seconds, median_ratio, peak_memory_of
from karat_scale.console import print_table, write_json
from karat_scale.errors import run_script
from karat_scale.models import create_model
from karat_scale.models.flops import BlockFlops, flops_by_block
from karat_scale.models.recompute import (
    Choice,
    cheapest_choices,
    choices_by_rule,
    least_budget,
    peak_saved_bytes,
    recompute,
)
from karat_scale.models.saved_tensors import activation_bytes, saved_bytes
from karat_scale.recipe import AttentionConfig, ModelConfig, RecomputeConfig

HALF = "budget of half"
POLICIES = ("none", "attention", "every", "all", HALF)


@dataclass(frozen=True)
class Case:
    """The model, batch and device to measure."""

    model: str
    batch: int
    grid: int
    dtype: str
    device: str
    image_size: int = 224


def main(arguments: list[str] | None = None) -> None:
    """Measure every policy with each attention, print a table, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch", type=count, default=4)
    parser.add_argument("--grid", type=count, default=3)
    names = ("softmax", "reference", "streaming", "cpu", "triton")
    parser.add_argument("--only", nargs="+", choices=names, default=names[:4], help="only these attentions")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    case = Case(options.model, options.batch, options.grid, options.dtype, options.device, options.image_size)
    if case.device == "cpu":
        torch.set_num_threads(options.threads)
    rows = [row for name in options.only for row in _rows(name, case, options.rounds, options.threads)]
    result = {**asdict(case), "device_name": device_name(case.device), "threads": options.threads, "rows": rows}
    _print(result)
    write_json(options.json, result)


def _rows(attention: str, case: Case, rounds: int, threads: int) -> list[dict[str, Any]]:
    clock = clock_for(case.device, threads)
    runs = {policy: forward_backward(attention, policy, case) for policy in POLICIES}
    seconds = interleaved_seconds(runs, rounds, clock)
    saved = {policy: _saved_mb(attention, policy, case) for policy in POLICIES}
    peak = {
        policy: peak_memory_of(forward_backward_once, (attention, policy, case), case.device) for policy in POLICIES
    }
    return [
        {
            "attention": attention,
            "policy": policy,
            "forward_backward_ms": round(1e3 * statistics.median(seconds[policy]), 2),
            "saved_mb": round(saved[policy], 2),
            "peak_mb": round(peak[policy], 2),
            "ratio_time": round(median_ratio(seconds, policy, "none"), 3),
            "ratio_saved": round(saved[policy] / saved["none"], 4),
            "ratio_peak": round(peak[policy] / peak["none"], 3),
        }
        for policy in POLICIES
    ]


def forward_backward(attention: str, policy: str, case: Case) -> Callable[[], None]:
    """A forward and backward pass of a batch, with the policy at work."""
    model, images = _model(attention, policy, case), _images(case)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        with _autocast(case):
            logits = model(images)
        logits.float().sum().backward()
        if case.device == "cuda":
            torch.cuda.synchronize()

    return run


def forward_backward_once(attention: str, policy: str, case: Case, warm_up: bool) -> Callable[[], None]:
    """Return the pass whose memory is measured; as a warm-up, a small one that loads and builds all it needs."""
    small = Case(**{**asdict(case), "batch": 1, "image_size": 32})
    return forward_backward(attention, policy, small if warm_up else case)


def _saved_mb(attention: str, policy: str, case: Case) -> float:
    with _autocast(case):
        return saved_bytes(_model(attention, policy, case), _images(case)) / 1e6


def _model(attention: str, policy: str, case: Case) -> nn.Module:
    settings = AttentionConfig(kind="softmax")
    if attention != "softmax":
        settings = AttentionConfig.model_validate({"kind": "karat", "grid": case.grid, "implementation": attention})
    config = ModelConfig(name=case.model, image_size=case.image_size)
    model = create_model(config, settings).to(case.device)
    recompute(model, _choices(model, flops_by_block(config, settings), policy, case))
    return model


def _choices(model: nn.Module, flops: Sequence[BlockFlops], policy: str, case: Case) -> Sequence[Choice]:
    """Return the choices of a policy, or of a budget of half of what `none` needs, or the least possible."""
    depth = len(flops)
    if policy != HALF:
        return choices_by_rule(RecomputeConfig.model_validate({"policy": policy}), depth)
    with _autocast(case):
        activations = activation_bytes(model, _images(case))
    budget = max(peak_saved_bytes(activations, ["nothing"] * depth) // 2, least_budget(activations))
    choices = cheapest_choices(activations, flops, budget)
    assert choices is not None
    return choices


def _images(case: Case) -> torch.Tensor:
    return torch.zeros(case.batch, 3, case.image_size, case.image_size, device=case.device)


def _autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16")


def _print(result: dict[str, Any]) -> None:
    title = f"{result['model']} at {result['image_size']} px, batch {result['batch']}, grid {result['grid']}, "
    title += f"{result['dtype']} on {result['device_name']}, {result['threads']} threads"
    rows = []
    for row in result["rows"]:
        figures = ("forward_backward_ms", "ratio_time", "saved_mb", "ratio_saved", "peak_mb", "ratio_peak")
        attention = row["attention"] if row["policy"] == "none" else ""
        rows.append([attention, row["policy"], *(f"{row[figure]:.2f}" for figure in figures)])
    header = ("attention", "policy", "ms", "to none", "saved MB", "to none", "peak MB", "to none")
    print_table(title, header, rows, texts=(0, 1))


if __name__ == "__main__":
    run_script(main)
