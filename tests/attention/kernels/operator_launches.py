"""Run the Triton operator's forward and backward pass with a fake driver, and read what was compiled."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from karat_scale.attention.kernels import triton_fourier
from karat_scale.attention.kernels.triton_tiles import Sizes, choose_tiles, products_of
from tests.attention.kernels.fake_driver import FakeDriver, Launched, fake_driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """A compiled kernel.

    `registers` and `stack` are those of a thread; the stack, in bytes, is 0 where nothing spills. `shared` is in bytes.
    `tensor_memory` is in columns; a multiprocessor of compute capability 10 has 512. `tensor_core` is the number of
    matrix instructions. `loop_per_score` is the number of instructions in the main loop for each score that a thread
    computes, or None for a kernel that computes none.
    """

    name: str
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    warps: int
    tensor_core: int
    loop_per_score: float | None
    code: Sequence[str]


def arguments(
    sizes: Sizes,
    dtype: torch.dtype,
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    strided: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return query, key and value, float32 parameters, a bias and a mask.

    If `strided`, query, key and value are views of one projection's output.
    """
    batch, heads, tokens, width = sizes[:4]
    fused = torch.zeros(batch, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    query, key, value = fused.unbind() if strided else fused.contiguous().unbind()
    coefficients = torch.zeros(2, heads, sizes.rank, tokens, sizes.grid).unbind()
    proj = torch.zeros(heads, tokens, sizes.rank)
    added = None if bias is None else torch.zeros(bias, dtype=dtype)
    return query, key, value, *coefficients, proj, added, None if mask is None else torch.ones(mask, dtype=torch.bool)


def launch(
    architecture: int,
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
    base: str = "zero",
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
) -> tuple[list[Launched], list[Launched], FakeDriver]:
    """Return the launches of a forward and of a backward pass on a GPU of `architecture`, and the driver."""
    given = arguments(sizes, dtype, bias, mask)
    with fake_driver(architecture) as driver:
        output, *kept = triton_fourier._forward(*given, base)
        forward = len(driver.launches)
        triton_fourier._pull_back(output, *kept, *given, base, bias is not None)
        return driver.launches[:forward], driver.launches[forward:], driver


def compiled(
    driver: FakeDriver, sizes: Sizes, dtype: torch.dtype = torch.bfloat16, paired: bool = False
) -> list[Compiled]:
    """Return what ptxas made of the kernels, in the order in which they were loaded."""
    tiles = {"forward_kernel": "forward", "grad_query_kernel": "grad_query", "grad_key_kernel": "grad_key"}
    products = products_of(dtype, dtype, dtype)
    found = []
    for name, binary, metadata in driver.binaries:
        usage, code = _disassemble(binary)
        registers, stack = (int(_search(rf"{what}:(\d+)", usage)) for what in ("REG", "STACK"))
        per_score = None
        if name in tiles:
            own, walked, _ = choose_tiles(tiles[name], sizes, products, driver.architecture, paired)
            scores = own * walked / (32 * metadata.num_warps)
            with_sines = [body for body in innermost_loops(code) if any("MUFU" in line for line in body)]
            per_score = min(map(count_instructions, with_sines or innermost_loops(code))) / scores
        tensor_core = sum(bool(re.search(r"\b(?:HG|H|UTCH)MMA\b", line)) for line in code)
        memory, warps = (metadata.shared, metadata.tmem_size), metadata.num_warps
        found.append(Compiled(name, registers, stack, *memory, warps, tensor_core, per_score, code))
    return found


def count_instructions(code: Sequence[str]) -> int:
    """Return the number of lines that are not labels."""
    return sum(not line.endswith(":") for line in code)


def innermost_loops(code: Sequence[str]) -> list[Sequence[str]]:
    """Return the bodies of the loops that hold a matrix product and no other such loop."""
    spans = [span for span in loops(code) if any("MMA" in line for line in code[slice(*span)])]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[slice(*span)] for span in inner]


def loops(code: Sequence[str]) -> list[tuple[int, int]]:
    """Return for each backward branch the first line of its body and the line after its last."""
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    found = []
    for i, line in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i:
            found.append((labels[target[1]], i + 1))
    return found


def _disassemble(binary: bytes) -> tuple[str, list[str]]:
    """Return the resource usage that cuobjdump prints, and the instructions and labels of nvdisasm."""
    with TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(binary)
        commands = [[TOOLS / "cuobjdump", "-res-usage", cubin], [TOOLS / "nvdisasm", "-c", cubin]]
        usage, listing = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    code = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            code.append(f"{label[1]}:")
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    return usage, code


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text!r}"
    return found[1]
