"""The Triton kernels bound and compiled for each architecture by a fake driver: what they need, and what they cost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from karat_scale.attention.kernels import triton_fourier, triton_launch  # noqa: E402
from karat_scale.attention.kernels.triton_tiles import Sizes  # noqa: E402
from tests.attention.kernels.fake_driver import SHARED_LIMIT, fake_driver  # noqa: E402
from tests.attention.kernels.operator_launches import TOOLS, arguments, compiled, launch  # noqa: E402

pytestmark = pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this build of triton brings no nvdisasm")

# A multiprocessor's KiB of shared memory (the system keeps one KiB for each program), its registers, and its columns of
# tensor memory, which only compute capability 10 has.
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
REGISTERS = 65536
TENSOR_MEMORY = 512
PAPER = Sizes(batch=2, heads=2, tokens=197, width=64, value_width=64, rank=12, grid=3)


def sizes_of(width, rank, grid, batch=2, tokens=197):
    return Sizes(batch, 2, tokens, width, width, rank, grid)


def warps_per_multiprocessor(kernel, architecture):
    by_registers = REGISTERS // (kernel.registers * 32 * kernel.warps)
    by_shared = SHARED[architecture] * 1024 // (kernel.shared + 1024)
    return kernel.warps * min(by_registers, by_shared, TENSOR_MEMORY // max(1, kernel.tensor_memory))


def check(architecture, sizes, dtype=torch.bfloat16, stack=0, **options):
    """Assert that the kernels fit and spill at most `stack` bytes, and return them by name."""
    *_, driver = launch(architecture, sizes, dtype, **options)
    kernels = compiled(driver, sizes, dtype, bool(options))
    for kernel in kernels:
        assert kernel.stack <= stack, kernel[:7]
        assert kernel.shared <= SHARED_LIMIT[architecture], kernel[:7]
        assert warps_per_multiprocessor(kernel, architecture) >= 8, kernel[:7]
        assert kernel.tensor_core > 0 or kernel.name in ("prepare_kernel", "reduce_kernel"), kernel[:7]
    return {kernel.name: kernel for kernel in kernels}


# Instructions of the main loop for each score, of the forward kernel, dQ, and dK with dC, by the number of harmonics:
# with the asynchronous products of an H100, and with those that all GPUs have. (These kernels do not use the products
# that only compute capability 10 has.)
HOPPER = {1: (9, 11, 13), 3: (16, 22, 32)}
OTHERS = {1: (12, 15, 19), 3: (19, 26, 36)}


def check_budget(architecture, grid):
    kernels = check(architecture, PAPER._replace(grid=grid))
    budget = (HOPPER if architecture == 90 else OTHERS)[grid]
    for name, most in zip(("forward_kernel", "grad_query_kernel", "grad_key_kernel"), budget, strict=True):
        assert kernels[name].loop_per_score <= most, f"{name}: {kernels[name].loop_per_score}"
        assert kernels[name].tensor_memory == 0
        assert any("HGMMA" in line for line in kernels[name].code) == (architecture == 90)


@pytest.mark.parametrize("grid", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_instructions_a_score_on_hopper(grid):
    check_budget(90, grid)


# Swin's windows: 49 tokens with a position bias, and in every second layer a mask.
WINDOWS = Sizes(batch=2, heads=2, tokens=49, width=32, value_width=32, rank=12, grid=3)
BIAS, MASK = (1, 2, 49, 49), (2, 1, 49, 49)


@pytest.mark.slow
def test_biased_and_masked_windows_spill_nothing_on_hopper():
    check(90, WINDOWS, bias=BIAS, mask=MASK)


@pytest.mark.slow
def test_every_pairing_of_bias_and_mask_spills_nothing_on_hopper():
    for grid in (1, 3):
        for options in (
            {"bias": BIAS},
            {"mask": MASK},
            {"bias": (2, 2, 49, 49)},
            {"bias": (2, 2, 49, 49), "mask": MASK},
        ):
            check(90, WINDOWS._replace(grid=grid), **options)


class Operations(TorchDispatchMode):
    """A dispatch mode that keeps the names of operations that would launch a kernel: all but views and new memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# The gradient of a bias takes a sum and a copy. More harmonics than one program holds sums of take another kernel.
HARD = sizes_of(16, 4, 5, tokens=20)


@pytest.mark.parametrize(
    ("sizes", "base", "bias", "mask", "backward"),
    [(PAPER, "zero", None, None, 4), (WINDOWS, "zero", BIAS, MASK, 6), (HARD, "silu", (1, 2, 20, 20), (20, 20), 7)],
)
def test_kernels_of_a_forward_and_a_backward_pass(sizes, base, bias, mask, backward):
    with Operations() as operations:
        ahead, back, _ = launch(90, sizes, base=base, bias=bias, mask=mask)
    # `arguments` makes zeros and ones.
    extra = [name for name in operations.names if name not in ("zeros", "zero_", "detach", "ones", "fill_")]
    assert len(ahead) == 2
    assert len(back) + len(extra) <= backward, extra


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "off 16 bytes"])
def test_the_same_launch_is_not_bound_twice(monkeypatch, offset):
    """16-bit parameters lie off 16 bytes in the flat buffers of ZeRO stages 1 and 2."""
    given = list(arguments(sizes_of(16, 4, 2, tokens=20), torch.bfloat16))
    given[5] = torch.zeros(given[5].numel() + offset, dtype=torch.bfloat16)[offset:].view(given[5].shape)
    with fake_driver(90) as driver:
        first = triton_fourier._forward(*given, "zero")
        for plan in triton_launch._forward_plans.values():
            monkeypatch.setattr(plan.prepare, "kernel", None)
            monkeypatch.setattr(plan.forward, "kernel", None)
        triton_fourier._forward(*given, "zero")
        assert len(driver.launches) == 4
        assert first[0].shape == (2, 2, 20, 16)


def test_addresses_off_16_bytes_get_a_kernel_of_their_own():
    sizes = sizes_of(16, 4, 2, tokens=20)
    query, *rest = arguments(sizes, torch.bfloat16, strided=False)
    shifted = torch.zeros(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape)
    assert shifted.data_ptr() % 16
    with fake_driver(90) as driver:
        triton_fourier._forward(query, *rest, "zero")
        loaded = len(driver.binaries)
        triton_fourier._forward(shifted, *rest, "zero")
        triton_fourier._forward(query, *rest, "zero")
        assert len(driver.binaries) > loaded
        assert len(driver.launches) == 6


def test_a_bias_whose_rows_are_too_far_apart_for_offsets_of_32_bits_is_copied():
    far = torch.empty(1, dtype=torch.float16, device="meta").as_strided((1, 2, 1025, 1025), (1, 12, 2_103_300, 2052))
    query = torch.empty(1, 2, 1025, 64, device="meta")
    assert triton_launch._spread(far, query).is_contiguous()
    near = torch.empty(1, 1, 1025, 1025, device="meta")
    assert triton_launch._spread(near, query).stride(1) == 0


def test_gradients_are_laid_out_as_the_fake_kernels_promise():
    for strided, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        given = list(arguments(sizes_of(16, 4, 2, tokens=20), dtype, (2, 1, 20, 20), (2, 1, 20, 20), strided))
        given[1] = given[1].mT.contiguous().mT
        given[3] = given[3].mT.contiguous().mT
        with fake_driver(90):
            outputs = triton_fourier._forward(*given, "gelu")
            grads = triton_fourier._backward(*outputs, *given, "gelu", True)
        promised = triton_fourier._fake_forward(*given, "gelu")
        assert [(x.shape, x.stride(), x.dtype) for x in outputs] == [(x.shape, x.stride(), x.dtype) for x in promised]
        promised = triton_fourier._fake_backward(*outputs, *given, "gelu", True)
        assert [(x.shape, x.stride(), x.dtype) for x in grads] == [(x.shape, x.stride(), x.dtype) for x in promised]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_the_papers_operator_fits_each_architecture(architecture):
    for grid in (1, 3):
        check_budget(architecture, grid)
    check(architecture, PAPER, torch.float16)
    for options in ({"bias": BIAS}, {"mask": MASK}, {"bias": BIAS, "mask": MASK}):
        check(architecture, WINDOWS, **options)
    # The error function, and three passes of TF32, spill some.
    launch(architecture, PAPER, torch.float16, base="gelu", bias=(2, 197, 197))
    launch(architecture, PAPER, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_hard_sizes_fit_each_architecture(architecture):
    # Launches that ask for more shared memory than there is are refused by Triton.
    launch(architecture, sizes_of(128, 32, 16))
    launch(architecture, sizes_of(96, 17, 16), torch.float32)
    launch(architecture, sizes_of(24, 5, 4, batch=7, tokens=29))
    launch(architecture, sizes_of(16, 1, 1, batch=1, tokens=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "rank", "grid"),
    [(32, 12, 7), (48, 12, 5), (64, 12, 2), (64, 12, 4), (64, 12, 11), (80, 12, 7), (96, 12, 16), (96, 32, 5)],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_head_width_spills_nothing(architecture, width, rank, grid):
    check(architecture, sizes_of(width, rank, grid))
