"""What torch may ask of attention, tested on each implementation that runs here."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from karat_scale.attention import fourier_karat_attention
from tests.attention.calls import assert_close, make_call, output_and_gradients
from tests.compilers import instruction_sets

HERE = ["streaming", "flex", *(["cpu"] if instruction_sets() else [])]
pytestmark = pytest.mark.parametrize("implementation", HERE)


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_inputs_without_gradient_are_left_alone(implementation):
    frozen = [x.detach() for x in make_call(1, 1, 6, 4, 2, 1).to(torch.float32)]
    assert not fourier_karat_attention(*frozen, implementation=implementation).requires_grad
    frozen[3].requires_grad_()
    fourier_karat_attention(*frozen, implementation=implementation).sum().backward()
    assert frozen[3].grad is not None
    assert frozen[0].grad is None


def test_an_empty_batch_gives_zero_parameter_gradients(implementation):
    call = make_call(0, 2, 5, 4, 2, 3).to(torch.float32)
    for gradient in output_and_gradients(call, torch.empty(call.value.shape), implementation=implementation)[4:]:
        assert (gradient == 0).all()


def test_autocast_keeps_scores_and_harmonics_in_float32(implementation):
    call = make_call(2, 2, 20, 32, 12, 11, logits=8.0).to(torch.float32)
    inputs = call._replace(**{name: getattr(call, name).detach().bfloat16() for name in ("query", "key", "value")})
    expected = fourier_karat_attention(*(x.double() for x in inputs), implementation="reference")
    for name in (implementation, "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = fourier_karat_attention(*inputs, implementation=name)
            output.float().square().sum().backward()
        assert output.dtype == torch.bfloat16
        # Scores rounded to bfloat16 would be off by order one at the eleventh harmonic.
        assert_close([output], [expected], 4e-3)
        assert call.cos_coef.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_pytorchs_attention(implementation, dtype):
    implementation = "auto" if dtype == torch.float64 else implementation
    call = make_call(1, 1, 4, 8, 2, 1).to(dtype)
    assert fourier_karat_attention(*call, implementation=implementation).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sdpa = torch.nn.functional.scaled_dot_product_attention(*call[:3])
        assert fourier_karat_attention(*call, implementation=implementation).dtype == sdpa.dtype


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(implementation, reentrant):
    call = make_call(2, 2, 12, 8, 4, 3).to(torch.float32)
    upstream = normal(call.value.shape, 7)

    def attend(*tensors):
        return fourier_karat_attention(*tensors, implementation=implementation)

    plain = output_and_gradients(call, upstream, implementation=implementation)
    output = checkpoint(attend, *call, use_reentrant=reentrant)
    output.backward(upstream)
    again = [output.detach(), *(leaf.grad for leaf in call)]
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("name", ["auto", None])
def test_compiles_into_one_graph(implementation, name):
    call = make_call(2, 2, 9, 8, 4, 3).to(torch.float32)
    bias = torch.zeros(9, 9, requires_grad=True)
    upstream = normal(call.value.shape, 8)
    torch.compiler.reset()
    compiled = torch.compile(fourier_karat_attention, backend="aot_eager", fullgraph=True)
    options = {"bias": bias, "implementation": name or implementation}
    actual = output_and_gradients(call, upstream, attend=compiled, **options)
    assert_close(actual, output_and_gradients(call, upstream, bias=bias, implementation=implementation), 1e-6)


def test_a_second_gradient_is_refused(implementation):
    call = make_call(1, 1, 5, 16, 2, 1).to(torch.float32)
    output = fourier_karat_attention(*call, implementation=implementation)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.sum(), call.query, create_graph=True)
