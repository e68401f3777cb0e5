"""The content form's CPU kernel, with each instruction set, against the same module in float64, computed by rows."""

import copy

import pytest
import torch

from karat_scale.attention import functional
from karat_scale.attention.kernels import cpu
from tests.attention.calls import content_module, gradients_of, relative_error

pytestmark = pytest.mark.usefixtures("isa")


def split(heads):
    """Split the heads into query, key and value, and the gradient of the output."""
    return heads[:3], heads[3]


def heads_of(tokens, width, batch=2, heads=2):
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(4)]


@pytest.mark.parametrize(
    ("tokens", "width", "rank", "grid"),
    [(197, 64, 12, 3), (65, 32, 12, 3), (50, 20, 5, 1), (49, 32, 32, 11), (33, 4, 3, 17), (16, 64, 1, 6), (1, 8, 2, 2)],
)
def test_output_and_gradients_are_those_of_the_equation(tokens, width, rank, grid, by_rows):
    made, heads = content_module(tokens, rank=rank, grid=grid), heads_of(tokens, width)
    fused = gradients_of(made, *split(heads))
    assert not by_rows
    oracle = gradients_of(copy.deepcopy(made).double(), *split([x.double() for x in heads]))
    assert by_rows
    assert max(relative_error(a, e) for a, e in zip(fused, oracle, strict=True)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_only_inputs_and_outputs(dtype):
    made, heads = content_module(65), [x.to(dtype) for x in heads_of(65, 32)]
    fused = gradients_of(made, *split(heads))
    oracle = gradients_of(copy.deepcopy(made).double(), *split([x.double() for x in heads]))
    assert fused[0].dtype == dtype
    assert max(relative_error(a, e) for a, e in zip(fused, oracle, strict=True)) < 5e-3


def test_the_number_of_threads_changes_no_bit():
    made, heads = content_module(65), heads_of(65, 32, batch=5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(gradients_of(made, *split(heads)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_a_bias_a_mask_or_another_implementation_goes_by_rows(by_rows):
    query, key, value, _ = heads_of(17, 8)
    pairs = torch.zeros(17, 17)
    plain = content_module(17)(query, key, value)
    others = [
        content_module(17)(query, key, value, bias=pairs),
        content_module(17)(query, key, value, mask=pairs == 0),
        content_module(17, implementation="streaming")(query, key, value),
    ]
    assert len(by_rows) == 3
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_a_psi_of_zero_leaves_what_the_kernel_gives_without_one():
    made = content_module(40)
    query, key, value, _ = heads_of(40, 16)
    kept = []
    made.operator(query, key, value, attend=lambda call: kept.append(call) or call.value)
    (call,) = kept
    assert functional.content_kernel(call, "auto") == "cpu"
    zero = cpu.attend(call, torch.zeros(2, 7))
    assert torch.equal(zero, functional.fourier_karat_attention(*call[:6], implementation="cpu"))


def test_compiled_models_take_it_as_one_operation():
    made, heads = content_module(20), heads_of(20, 8)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients_of(compiled, *split(heads)), gradients_of(made, *split(heads)), strict=True):
        torch.testing.assert_close(a, b)
