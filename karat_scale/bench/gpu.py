"""`karat bench gpu`, or `python -m karat_scale.bench.gpu`: what to run first on a new card. Needs torch and triton.

It checks the kernel's values and gradients against the float64 reference, measures attention against SDPA, and
times whole ViT training steps, KArAt and softmax, eager and compiled. Lines appear as they are known, and a JSON is
written after each part, so that a run which is cut off has not been for nothing.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karat_scale.attention.functional import IMPLEMENTATIONS, fourier_karat_attention
from karat_scale.bench.attention import Case, attention_rows
from karat_scale.bench.interleave import interleaved_seconds, median_ratio
from karat_scale.bench.plain_vit import IMAGE, PlainViT
from karat_scale.errors import UserError
from karat_scale.files import write_atomically

NAMES = ("output", "query", "key", "value", "cos_coef", "sin_coef", "proj")
# Relative L2 error allowed: in fp32 max(2e-6, 5e-8 G max|A|), in bf16 5e-3.
BF16_TOLERANCE = 5e-3


def bench_gpu(device: str, json_file: str | None, quick: bool) -> int:
    """Run all three parts; returns 0, or 1 when a value or gradient is wrong.

    Args:
        device: "cuda", or "cpu" to try the command itself.
        json_file: where the figures go.
        quick: small batches and one model, to try the command itself.

    Raises:
        UserError: there is no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("karat bench gpu: torch sees no CUDA device; run it on a machine with an NVIDIA GPU")
    implementation = "triton" if device == "cuda" else "streaming"
    result: dict[str, Any] = {"device": device, "card": _card(device), "torch": torch.__version__}
    print(f"{result['card']}, torch {result['torch']}", flush=True)

    def keep(part: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        result[part] = []
        for row in rows:
            print(part, json.dumps(row), flush=True)
            result[part].append(row)
            if json_file:
                write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
        return list(result[part])

    checks = keep("check", check_values(implementation, device, quick))
    keep("attention", _attention(device, quick))
    keep("step", _steps(implementation, device, quick))
    wrong = [row for row in checks if not row["right"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks are right", flush=True)
    return 1 if wrong else 0


def check_values(implementation: str, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Output and every gradient of the implementation against the float64 reference."""
    grids, widths = ((1, 3), (64,)) if quick else ((1, 2, 3, 5, 7, 9, 11, 16), (32, 48, 64, 80, 96))
    for grid, width, dtype in itertools.product(grids, widths, (torch.float32, torch.bfloat16)):
        for tokens in (50,) if quick else (50, 197):
            errors, tolerance = _errors(implementation, device, grid, width, tokens, dtype)
            yield {
                "implementation": implementation,
                "grid": grid,
                "head_width": width,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "worst": max(errors, key=errors.__getitem__),
                "error": max(errors.values()),
                "tolerance": tolerance,
                "right": max(errors.values()) <= tolerance,
            }


def _errors(
    implementation: str, device: str, grid: int, width: int, tokens: int, dtype: torch.dtype
) -> tuple[dict[str, float], float]:
    generator = torch.Generator().manual_seed(grid * width)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads, rank = 2, 12
    tensors = [normal(2, heads, tokens, width) for _ in range(3)]
    tensors += [normal(heads, rank, tokens, grid, std=(tokens * grid) ** -0.5) for _ in range(2)]
    tensors += [normal(heads, tokens, rank, std=(rank * tokens) ** -0.5)]
    given = [x.to(device, dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(tensors)]
    oracle = [x.detach().double().requires_grad_() for x in given]
    grad_output = normal(2, heads, tokens, width).to(device, dtype)
    ours = _output_and_gradients(given, grad_output, implementation)
    true = _output_and_gradients(oracle, grad_output.double(), "reference")
    pairs = zip(NAMES, ours, true, strict=True)
    errors = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}
    largest_score = float((oracle[0] @ oracle[1].transpose(-1, -2)).abs().max() * width**-0.5)
    return errors, max(2e-6, 5e-8 * grid * largest_score) if dtype == torch.float32 else BF16_TOLERANCE


def _output_and_gradients(inputs: list[Tensor], grad_output: Tensor, implementation: str) -> list[Tensor]:
    output = fourier_karat_attention(*inputs, implementation=implementation)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output)]


def _attention(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    names = [name for name in IMPLEMENTATIONS if name != "reference"]
    for model, grid in itertools.product(("tiny",) if quick else ("tiny", "small", "base"), (1, 3)):
        case = Case(model, 2 if quick else 256, grid, 12, "bf16", device)
        for row in attention_rows(case, rounds=2 if quick else 15, names=names):
            yield {"model": model, "batch": case.batch, "grid": grid, **row}


def _steps(implementation: str, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Images a second of whole training steps in bf16 autocast, KArAt beside softmax."""
    batch, rounds, depth = (2, 1, 1) if quick else (256, 7, 12)
    for size, grid in (("tiny", 3),) if quick else (("tiny", 3), ("small", 3), ("base", 1)):
        for compiled in (False,) if quick else (False, True):
            contenders = {
                "softmax": _training_step(PlainViT(size, None, depth=depth), batch, device, compiled),
                "karat": _training_step(PlainViT(size, grid, implementation, depth), batch, device, compiled),
            }
            seconds = interleaved_seconds(contenders, rounds)
            for name in contenders:
                yield {
                    "model": size,
                    "attention": name if name == "softmax" else f"karat G{grid}B",
                    "compiled": compiled,
                    "batch": batch,
                    "images_per_second": round(batch / statistics.median(seconds[name]), 1),
                    "ratio_to_softmax": round(median_ratio(seconds, name, "softmax"), 3),
                }


def _training_step(vit: PlainViT, batch: int, device: str, compiled: bool) -> Callable[[], None]:
    vit.to(device)
    model: Callable[[Tensor], Tensor] = torch.compile(vit) if compiled else vit
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-4, fused=device == "cuda")
    images = torch.randn(batch, 3, IMAGE, IMAGE, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _card(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()


def main() -> int:
    """The command without the rest of the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command")
    options = parser.parse_args()
    try:
        return bench_gpu(options.device, options.json, options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
