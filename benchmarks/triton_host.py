"""Host time of the Triton operator in eager mode against another checkout's: `python -m benchmarks.triton_host OTHER`.

OTHER is the root of a checkout, made by `git worktree add OTHER COMMIT`. Triton binds and compiles the real kernels for
a GPU that is not there; tensors are so small that PyTorch's own work on the CPU does not count. Both sides run by
turns, in processes of their own, and the least time of all counts.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROUNDS, CALLS = 3, 400
HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(*measure())
        return
    best = {side: [float("inf")] * 2 for side in (HERE, asked.other.resolve())}
    for _ in range(ROUNDS):
        for side in best:
            command = [sys.executable, str(Path(__file__).resolve()), str(side), "--measure"]
            environment = {**os.environ, "PYTHONPATH": str(side), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found = map(float, done.stdout.split()[-2:])
            best[side] = [min(pair) for pair in zip(best[side], found, strict=True)]
    for i, name in enumerate(("forward", "backward")):
        ours, theirs = (side[i] for side in best.values())
        print(f"{name:8} {ours:5.0f} us, other {theirs:5.0f} us, ratio {ours / theirs:.2f}")


def measure() -> tuple[float, float]:
    """Microseconds of a forward and of a backward pass, of the checkout that is imported."""
    import torch
    from triton.runtime import driver

    from karat_scale.attention import functional
    from karat_scale.attention.kernels import triton_fourier

    fake = _load(HERE / "tests/attention/kernels/fake_driver.py").FakeDriver(90)
    driver.set_active(fake)
    # As on a GPU: the kernels take the call, and what was checked once is not checked again.
    functional.REFUSALS["triton"] = triton_fourier.refusal = triton_fourier.call_refusal
    functional._REMEMBERED_DEVICES = ("cpu",)  # type: ignore[attr-defined]
    batch, heads, tokens, width, rank, grid = 1, 1, 16, 16, 4, 3
    given = [torch.zeros(batch, heads, tokens, width, dtype=torch.bfloat16) for _ in range(3)]
    given += [torch.zeros(heads, rank, tokens, grid) for _ in range(2)] + [torch.zeros(heads, tokens, rank)]
    given = [x.requires_grad_() for x in given]
    forward = backward = float("inf")
    for _ in range(CALLS):
        begun = time.perf_counter()
        output = functional.fourier_karat_attention(*given, implementation="triton")
        done = time.perf_counter()
        upstream = torch.ones_like(output)
        back = time.perf_counter()
        torch.autograd.grad(output, given, upstream)
        forward, backward = min(forward, done - begun), min(backward, time.perf_counter() - back)
    return forward * 1e6, backward * 1e6


def _load(path: Path) -> ModuleType:
    """A module of this checkout, whichever one is imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
