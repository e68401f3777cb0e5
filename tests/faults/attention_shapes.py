"""The compiled attention on random shapes, layouts and numbers of threads, compared with the float64 equations.

    python -m tests.faults.attention_shapes COUNT SEED LAST

It is meant for a process that has the C++ built with sanitizers, like tests/faults/jpegs.py. LAST is the file that
holds the current call.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.attention.calls import Call, make_call, output_and_gradients, relative_error

# The error that a result may have as a share of its L2 norm, in addition to what rounding moves it by.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
LAYOUTS = ("contiguous", "one projection", "tokens last", "expanded")


def laid_out(call: Call, layout: str) -> Call:
    """Return a call with query, key and value in one of the layouts in which layers may pass them."""
    if layout == "one projection":
        fused = torch.stack([x.detach().transpose(1, 2) for x in call[:3]], dim=2).permute(2, 0, 3, 1, 4)
        heads = list(fused.unbind())
    elif layout == "tokens last":
        heads = [x.detach().mT.contiguous().mT for x in call[:3]]
    elif layout == "expanded":
        heads = [x.detach()[:1].expand(x.shape) for x in call[:3]]
    else:
        heads = [x.detach() for x in call[:3]]
    return Call(*(x.requires_grad_() for x in heads), *call[3:])


def on_scores(chosen: random.Random, call: Call, generator: torch.Generator) -> torch.Tensor:
    """Return random numbers that broadcast to a call's scores: contiguous, transposed or every second of more."""
    batch, heads, tokens, _ = call.query.shape
    whole = (batch, heads, tokens, tokens)
    shape = [chosen.choice((1, size)) for size in whole][chosen.randrange(4) :]
    layout = chosen.choice(("contiguous", "transposed", "every second"))
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).mT
    if layout == "every second":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    return torch.randn(shape, generator=generator)


def reach_of_rounding(call: Call, upstream: torch.Tensor, exact: list[torch.Tensor], **options) -> list[float]:
    """Return how far (L2 norm) the float64 results move if each input moves by about its dtype's rounding error.

    They move far if few terms of a sum cancel, and for the angles m A of a large grid G and large scores. Query
    and key move by float32's error in every dtype, as scores are float32 in all kernels.
    """
    generator = torch.Generator().manual_seed(0)
    farthest = [0.0] * len(exact)
    for _ in range(3):
        errors = [torch.finfo(torch.float32).eps] * 2 + [torch.finfo(call.query.dtype).eps] * 5
        moved = [
            x.detach().double() * (1 + error * torch.randn(x.shape, generator=generator, dtype=torch.float64))
            for x, error in zip((*call, upstream), errors, strict=True)
        ]
        near = Call(*(x.requires_grad_() for x in moved[:-1]))
        results = output_and_gradients(near, moved[-1], implementation="reference", **options)
        distances = [(found - expected).norm().item() for found, expected in zip(results, exact, strict=True)]
        farthest = [max(pair) for pair in zip(farthest, distances, strict=True)]
    return farthest


def look(chosen: random.Random, last: Path) -> str:
    """Make one call; return what is wrong with its output or gradients, or an empty text."""
    sizes = {
        "batch": chosen.randrange(4),
        "heads": chosen.randint(1, 4),
        "tokens": chosen.choice((1, 2, 3, chosen.randint(1, 40), chosen.randint(1, 200))),
        "width": chosen.choice((1, 3, 16, 64, chosen.randint(1, 130))),
        "rank": chosen.choice((1, 12, chosen.randint(1, 32))),
        "grid": chosen.choice((1, 3, chosen.randint(1, 64))),
    }
    dtype, layout = chosen.choice(list(TOLERANCES)), chosen.choice(LAYOUTS)
    scale, threads = chosen.choice((0.0, 0.1, 1.0, 8.0)), chosen.randint(1, 4)
    extra = chosen.choice(("", "", "", "bias", "mask", "bias and mask"))
    said = f"{sizes} {dtype} {layout} scores {scale} threads {threads} {extra}"
    last.write_text(said + "\n")
    torch.set_num_threads(threads)
    seed = chosen.randrange(2**31)
    call = laid_out(make_call(**sizes, logits=scale, seed=seed).to(dtype), layout)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(call.value.shape, generator=generator).to(dtype)
    options = {}
    if "bias" in extra:
        options["bias"] = on_scores(chosen, call, generator).requires_grad_()
    if "mask" in extra:
        options["mask"] = on_scores(chosen, call, generator) > chosen.choice((-1, 0, 2))
    actual = output_and_gradients(call, upstream, implementation="cpu", **options)
    exact = output_and_gradients(call.to(torch.float64), upstream.double(), implementation="reference", **options)
    reach = reach_of_rounding(call, upstream, exact, **options)
    for number, (found, expected, distance) in enumerate(zip(actual, exact, reach, strict=True)):
        error = (found.double() - expected).norm().item()
        allowed = TOLERANCES[dtype] * expected.norm().item() + 4 * distance
        if found.shape != expected.shape or not error <= allowed:
            return f"{said}: result {number} is off by {relative_error(found, expected):.1e}"
    return ""


def main(count: int, seed: int, last: Path) -> None:
    """Try `count` calls, and print the counts and problems as JSON."""
    problems, counts = [], Counter[str]()
    for number in range(count):
        problem = look(random.Random(f"{seed} {number}"), last)
        counts["off" if problem else "right"] += 1
        problems += [problem] if problem else []
    print(json.dumps({"calls": count, **counts, "problems": problems[:20]}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
