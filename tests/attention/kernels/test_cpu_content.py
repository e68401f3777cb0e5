"""The content form by one kernel, with each instruction set, against the same module in float64, which takes rows."""

import copy

import pytest
import torch

from karat_scale.attention import FourierKaratOperator, functional, variants
from karat_scale.attention.kernels import cpu
from karat_scale.attention.variants import ContentOperator
from tests.attention.calls import relative_error

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture
def by_rows(monkeypatch):
    """How often the rows of psi were computed one after another."""
    counted, attend = [], variants.attend_rows
    monkeypatch.setattr(variants, "attend_rows", lambda *call: counted.append(1) or attend(*call))
    return counted


def module(tokens, heads=2, rank=4, grid=3, implementation="auto"):
    """A module away from its start, where W is 0."""
    torch.manual_seed(tokens)
    made = ContentOperator(FourierKaratOperator(tokens, heads, rank, grid, implementation=implementation))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def heads_of(tokens, width, batch=2, heads=2):
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(4)]


def results(made, query, key, value, upstream):
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    output = made(*tensors)
    return [output, *torch.autograd.grad(output, (*tensors, *made.parameters()), upstream.to(output.dtype))]


@pytest.mark.parametrize(
    ("tokens", "width", "rank", "grid"),
    [(197, 64, 12, 3), (65, 32, 12, 3), (50, 20, 5, 1), (49, 32, 32, 11), (33, 4, 3, 17), (16, 64, 1, 6), (1, 8, 2, 2)],
)
def test_output_and_gradients_are_those_of_the_equation(tokens, width, rank, grid, by_rows):
    made, heads = module(tokens, rank=rank, grid=grid), heads_of(tokens, width)
    fused = results(made, *heads)
    assert not by_rows
    oracle = results(copy.deepcopy(made).double(), *(x.double() for x in heads))
    assert by_rows
    assert max(relative_error(a, e) for a, e in zip(fused, oracle, strict=True)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_only_inputs_and_outputs(dtype):
    made, heads = module(65), [x.to(dtype) for x in heads_of(65, 32)]
    fused, oracle = results(made, *heads), results(copy.deepcopy(made).double(), *(x.double() for x in heads))
    assert fused[0].dtype == dtype
    assert max(relative_error(a, e) for a, e in zip(fused, oracle, strict=True)) < 5e-3


def test_the_number_of_threads_changes_no_bit():
    made, heads = module(65), heads_of(65, 32, batch=5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(made, *heads))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_a_bias_a_mask_or_another_implementation_goes_by_rows(by_rows):
    query, key, value, _ = heads_of(17, 8)
    pairs = torch.zeros(17, 17)
    plain = module(17)(query, key, value)
    others = [
        module(17)(query, key, value, bias=pairs),
        module(17)(query, key, value, mask=pairs == 0),
        module(17, implementation="streaming")(query, key, value),
    ]
    assert len(by_rows) == 3
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_a_psi_of_zero_leaves_what_the_kernel_gives_without_one():
    made = module(40)
    query, key, value, _ = heads_of(40, 16)
    kept = []
    made.operator(query, key, value, attend=lambda call: kept.append(call) or call.value)
    (call,) = kept
    assert functional.content_kernel(call, "auto") == "cpu"
    zero = cpu.attend(call, torch.zeros(2, 7))
    assert torch.equal(zero, functional.fourier_karat_attention(*call[:6], implementation="cpu"))


def test_compiled_models_take_it_as_one_operation():
    made, heads = module(20), heads_of(20, 8)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled, *heads), results(made, *heads), strict=True):
        torch.testing.assert_close(a, b)
