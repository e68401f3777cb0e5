"""The Triton kernels compiled for each architecture: no spills, tensor cores at work, room for several programs."""

import pytest
import torch

triton = pytest.importorskip("triton")

from tests.attention.kernels.triton_compiled import CUOBJDUMP, KERNELS, compiled  # noqa: E402

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this build of triton brings no cuobjdump")

# Bytes of shared memory of a multiprocessor of an A100 and an H100; the system keeps 1 KiB for each program.
SHARED = {80: 164 * 1024, 90: 228 * 1024}
ARCHITECTURES = tuple(SHARED)
REGISTERS = 65536


def programs_per_multiprocessor(used, architecture):
    by_registers = REGISTERS // (used.registers * 32 * used.warps)
    return min(by_registers, SHARED[architecture] // (used.shared + 1024))


def check(kernel, architecture, width, rank, grid):
    used = compiled(kernel, architecture, width, rank, grid, torch.bfloat16)
    assert used.stack == 0
    assert used.tensor_core > 0
    assert programs_per_multiprocessor(used, architecture) >= 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_papers_operator_spills_nothing(kernel, architecture):
    check(kernel, architecture, 64, 12, 3)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [1, 5, 11])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_grids_spill_nothing(kernel, architecture, grid):
    check(kernel, architecture, 64, 12, grid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "rank", "grid"), [(32, 12, 7), (48, 12, 5), (64, 12, 16), (80, 12, 7), (96, 12, 16), (96, 32, 5)]
)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_head_width_spills_nothing(kernel, architecture, width, rank, grid):
    check(kernel, architecture, width, rank, grid)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_spills_nothing(kernel):
    assert compiled(kernel, 90, 64, 12, 3, torch.float32).stack == 0
