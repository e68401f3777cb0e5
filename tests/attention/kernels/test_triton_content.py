"""The Triton kernels of the content form: their values in the interpreter, and what they cost when compiled."""

import pytest
import torch

triton = pytest.importorskip("triton")

from karat_scale.attention.call import empty_gradients  # noqa: E402
from karat_scale.attention.kernels import triton_fourier  # noqa: E402
from tests.attention.kernels.fake_driver import SHARED_LIMIT, fake_driver  # noqa: E402
from tests.attention.kernels.in_interpreter import run_interpreted  # noqa: E402
from tests.attention.kernels.operator_launches import TOOLS, compiled  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("share", ["slow", "not slow"])
def test_interpreted_kernels_agree_with_the_equation(share):
    run_interpreted("interpreted_content.py", "-m", share, "--slow=all")


def launch(architecture, dtype, width=64, grid=3, tokens=197):
    """Run a forward and a backward pass, and return the driver."""
    heads = torch.zeros(2, tokens, 3, 2, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
    psi = torch.zeros(2, 2 * grid + 1)
    with fake_driver(architecture) as driver:
        output = triton_fourier._psi_forward(*heads, psi)
        grads = triton_fourier._psi_backward(output, *heads, psi)
    promised = empty_gradients(output, *heads, psi)
    assert [(x.shape, x.stride(), x.dtype) for x in grads] == [(x.shape, x.stride(), x.dtype) for x in promised]
    return driver


def check(architecture, dtype=torch.bfloat16, **sizes):
    kernels = compiled(launch(architecture, dtype, **sizes), None, dtype)
    assert [kernel.name for kernel in kernels] == ["psi_forward_kernel", "psi_grad_query_kernel", "psi_grad_key_kernel"]
    for kernel in kernels:
        assert kernel.stack == 0, kernel[:6]
        assert kernel.shared <= SHARED_LIMIT[architecture], kernel[:6]
        assert kernel.tensor_core > 0, kernel[:6]


needs_disassembler = pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this triton brings no nvdisasm")


@needs_disassembler
def test_three_kernels_that_spill_nothing_on_hopper():
    assert len(launch(90, torch.bfloat16).launches) == 3
    check(90)


@needs_disassembler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_they_fit_each_architecture(architecture):
    check(architecture)
    launch(architecture, torch.float16)
    check(architecture, width=96)
    launch(architecture, torch.float16, width=128, grid=16)  # spills some values
    launch(architecture, torch.float32)
    launch(architecture, torch.float32, width=96, grid=16, tokens=29)
