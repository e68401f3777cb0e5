"""What ptxas makes of the Triton kernels: registers, spills, shared memory and instructions, without a GPU."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from karat_scale.attention.kernels.triton_backward import grad_coef_kernel, grad_side_kernel
from karat_scale.attention.kernels.triton_forward import forward_kernel
from karat_scale.attention.kernels.triton_launch import (
    choose_tiles,
    forward_constants,
    grad_coef_constants,
    grad_side_constants,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KERNELS = ("forward", "grad_query", "grad_key", "grad_coef")


class Resources(NamedTuple):
    """Of one thread: registers and bytes of stack (0 where nothing spills); of one program: bytes of shared memory."""

    registers: int
    stack: int
    shared: int
    tensor_core: int
    warps: int


def compiled(kernel: str, architecture: int, width: int, rank: int, grid: int, dtype: torch.dtype) -> Resources:
    """Compiles a kernel just as a launch with these sizes does; `architecture` is 80, 90 and so on."""
    tiles = choose_tiles(width, rank, grid, dtype, architecture // 10)
    if kernel == "forward":
        function, constants = forward_kernel, forward_constants(width, width, rank, grid, dtype, tiles)
    elif kernel == "grad_coef":
        function, constants = grad_coef_kernel, grad_coef_constants(width, rank, grid, dtype, tiles)
    else:
        own_is_query = kernel == "grad_query"
        function = grad_side_kernel
        constants = grad_side_constants(width, rank, grid, dtype, tiles, own_is_query=own_is_query)
    source = ASTSource(function, _signature(function, constants, DTYPES[dtype]), constants, _alignment(function))
    target = GPUTarget("cuda", architecture, 32)
    return _resources(triton.compile(source, target=target, options=tiles.options), tiles.options["num_warps"])


def _signature(function: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    kinds = {"scale": "fp32", "partial": "*fp32"}
    numbers = ("heads", "tokens", "batches", "batches_per_part", "padded_tokens")

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        is_number = name in numbers or re.search(r"_[bhn]$", name)
        return kinds.get(name, "i32" if is_number else f"*{dtype}")

    return {name: kind(name) for name in function.arg_names}


def _alignment(function: Any) -> dict[tuple[int], list[list[Any]]]:
    """PyTorch's allocations and the usual strides are multiples of 16, which the launcher sees for itself."""
    unaligned = ("heads", "tokens", "batches", "batches_per_part", "scale")
    names = enumerate(function.arg_names)
    return {(i,): [["tt.divisibility", 16]] for i, name in names if name.islower() and name not in unaligned}


def _resources(kernel: Any, warps: int) -> Resources:
    with TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, listing = (
            subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    tensor_core = len(re.findall(r"\bH(?:G)?MMA\b", listing))
    return Resources(registers, stack, kernel.metadata.shared, tensor_core, warps)
