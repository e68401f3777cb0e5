"""Tests of the CPU kernel, built for aarch64 and run by an emulator in place of this machine's own.

`make test-aarch64` installs the compiler and the emulator and runs these tests, as CI does. An emulator shows nothing
of the kernel's speed.
"""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.attention.kernels import cpu
from karat_scale.foundation.native_build import FLAGS, INSTRUCTION_SETS, build_arguments
from tests.attention.calls import assert_close, make_call
from tests.attention.kernels import test_cpu, test_cpu_content
from tests.conftest import output_of

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow(together=True),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="make test-aarch64 installs what it needs"
    ),
    pytest.mark.usefixtures("isa"),
]


class Emulated:
    """The kernel's library as ctypes would load it. Each call goes to the emulator with the tensors it points to."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def karat_forward(self, reference: Any) -> int:
        """See attention.cpp."""
        return self._answer(b"f", reference._obj)

    def karat_backward(self, reference: Any) -> int:
        """See attention.cpp."""
        return self._answer(b"b", reference._obj)

    def _answer(self, kind: bytes, call: Any) -> int:
        found = list(tensors(call))
        request = kind + struct.pack("<2Q", ctypes.sizeof(call), len(found)) + bytes(call)
        for offset, address, size in found:
            request += struct.pack("<2Q", offset, size) + ctypes.string_at(address, size)
        done = subprocess.run([EMULATOR, str(self._program)], input=request, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) == sum(size for *_, size in found)
        begin = 0
        for _, address, size in found:
            ctypes.memmove(address, done.stdout[begin : begin + size], size)
            begin += size
        return 0


def tensors(call: Any):
    """Yield where each tensor's address is in the call, the address, and the number of bytes up to its last element."""
    heads, items = (call.batch, call.heads, call.tokens, call.width), (call.batch, call.heads, call.tokens, call.rank)
    coefficients, projector = (call.heads, call.rank, call.tokens, call.grid), (call.heads, call.tokens, call.rank)
    psi = (call.heads, 2 * call.grid + 1)
    shapes = {"cosines": coefficients, "sines": coefficients, "projector": projector, "hidden": items, "psi": psi}
    shapes |= {f"grad_{name}": shape for name, shape in shapes.items()} | {"grad_psi": (call.batch, *psi)}
    for name, kind in call._fields_:
        value, offset = getattr(call, name), getattr(type(call), name).offset
        if kind is cpu._Strided and value.data:
            span = extent(heads, (value.batch, value.head, value.token, 1))
            yield offset, value.data, span * (2 if call.dtype else 4)
        elif kind is cpu._OnScores and value.data:
            span = extent((*heads[:3], call.tokens), (value.batch, value.head, value.query, value.key))
            yield offset, value.data, span * (1 if name == "mask" else 4)
        elif kind is ctypes.c_void_p and value:
            yield offset, value, 4 * torch.Size(shapes[name]).numel()


def extent(shape, strides) -> int:
    """Return how many elements of memory lie from the first to the last element, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    program = tmp_path_factory.mktemp("aarch64") / "emulated"
    flags = [flag for flag in (*FLAGS, *INSTRUCTION_SETS["neon"]) if flag != "-fPIC"]
    flags += [*build_arguments(cpu.SOURCE)[0], "-static"]
    output_of(COMPILER, *flags, Path(__file__).parent / "emulated.cpp", cpu.SOURCE, "-o", program)
    return Emulated(program)


@pytest.fixture
def isa(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "_kernel", lambda: library)
    return "neon"


TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "rank", "grid"),
    [(65, 64, 12, 3), (50, 20, 5, 1), (33, 64, 32, 5), (27, 9, 6, 17), (39, 33, 1, 11), (16, 8, 3, 64), (1, 8, 2, 2)],
)
def test_output_and_gradients_are_those_of_the_equation(dtype, tokens, width, rank, grid):
    call = make_call(2, 2, tokens, width, rank, grid).to(dtype)
    upstream = test_cpu.normal(call.value.shape, 1, dtype)
    tolerance = max(TOLERANCES[dtype], 5e-8 * grid * call.largest_score)
    assert_close(test_cpu.fast(call, upstream), test_cpu.oracle(call, upstream), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("bias", "mask"), [((1, 2, 41, 41), None), ((3, 1, 1, 41), (41, 1)), (None, (3, 1, 41, 41)), ((41, 1), (1, 41))]
)
def test_bias_and_mask(dtype, bias, mask):
    call = make_call(3, 2, 41, 20, 5, 3).to(dtype)
    upstream = test_cpu.normal(call.value.shape, 1, dtype)
    options = {"bias": test_cpu.normal(bias, 2, dtype).requires_grad_()} if bias else {}
    if mask:
        options["mask"] = test_cpu.normal(mask, 3) > -0.4
    expected = test_cpu.oracle(call, upstream, **options)
    assert_close(test_cpu.fast(call, upstream, **options), expected, 2e-5 if dtype == torch.float32 else 1e-2)


# The other tests of the kernel that an emulator runs in seconds.
test_a_handful_of_tokens = test_cpu.test_a_handful_of_tokens
test_rounding = test_cpu.test_sixteen_bits_are_rounded_as_pytorch_rounds_them
test_large_scores = test_cpu.test_scores_up_to_sixty_keep_their_phase
test_huge_scores = test_cpu.test_huge_scores_stay_bounded_and_nan_stays_nan
test_shifted_windows = test_cpu.test_shifted_windows
test_masked_pairs = test_cpu.test_masked_pairs_may_have_any_score_and_all_of_them_may_be_masked
test_infinity = test_cpu.test_infinity_does_not_become_a_number
test_nan_in_one_item = test_cpu.test_nan_in_one_item_leaves_the_others_alone
test_strides = test_cpu.test_strided_inputs_give_the_same_bits_and_the_layout_that_layers_want
test_threads = test_cpu.test_the_same_bits_for_any_number_of_threads
test_dtypes_may_differ = test_cpu.test_dtypes_may_differ
test_psi = test_cpu_content.test_output_and_gradients_are_those_of_the_equation
test_psi_of_16_bits = test_cpu_content.test_16_bits_round_only_inputs_and_outputs
