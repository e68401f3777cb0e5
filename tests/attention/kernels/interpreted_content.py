"""Tests of the content form's Triton kernels in Triton's interpreter; `test_triton_content.py` runs this file."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from karat_scale.attention.kernels import triton_fourier
from tests.attention.calls import content_module, gradients_of, relative_error
from tests.attention.kernels.interpreter import install_bfloat16

install_bfloat16()

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1.2e-3}
# batch, heads, tokens, width, value width, grid.
SHAPES = [
    (1, 1, 1, 16, 16, 1),
    (2, 3, 29, 32, 32, 1),
    (2, 2, 70, 48, 48, 3),
    (1, 2, 64, 96, 96, 7),
    (1, 1, 33, 24, 24, 16),
    (1, 2, 20, 16, 140, 2),
    (1, 1, 197, 64, 64, 3),
]


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(query, key, value, psi):
    """Return psi(A) V, computed as the equation says."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    grid = psi.shape[1] // 2
    constant, cos, sin = (x[..., None, None] for x in psi.split((1, grid, grid), 1))
    learned = constant[:, 0].expand_as(scores)
    for m in range(grid):
        learned = learned + cos[:, m] * ((m + 1) * scores).cos() + sin[:, m] * ((m + 1) * scores).sin()
    return learned @ value


def compare(dtype, shape, *, logits=1.0, scale=1.0, tolerance=None, attend=triton_fourier.attend_psi):
    """Assert that values and every gradient agree with the equation in float64 on the same rounded inputs."""
    batch, heads, tokens, width, value_width, grid = shape
    qk = [drawn(batch, heads, tokens, width, seed=n, scale=logits**0.5).to(dtype) for n in (1, 2)]
    value = drawn(batch, heads, tokens, value_width, seed=3).to(dtype)
    psi = drawn(heads, 2 * grid + 1, seed=4, scale=1 / tokens).float()
    upstream = drawn(*value.shape, seed=5, scale=scale).to(dtype)
    expected = gradients_of(plain, [x.double() for x in (*qk, value, psi)], upstream.double())
    actual = gradients_of(attend, [*qk, value, psi], upstream)
    for name, a, e in zip(("output", "query", "key", "value", "psi"), actual, expected, strict=True):
        assert (a.shape, a.isfinite().all()) == (e.shape, True), name
        assert relative_error(a, e) <= (tolerance or TOLERANCE[dtype]), f"{name}: {relative_error(a, e):.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_equation_at_a_small_size(dtype):
    compare(dtype, (1, 2, 21, 64, 64, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_equation(shape, dtype):
    compare(dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**9])
def test_gradients_of_any_size_fit_into_float16(scale):
    compare(torch.float16, (1, 2, 20, 16, 16, 3), scale=scale)


@pytest.mark.slow
def test_large_scores_keep_their_phase():
    compare(torch.float32, (1, 1, 40, 64, 64, 11), logits=15.0, tolerance=5e-8 * 11 * 60)


def test_operations_are_well_behaved():
    given = [drawn(2, 2, 6, 16, seed=n).float().requires_grad_() for n in range(3)]
    psi = drawn(2, 5).float().requires_grad_()
    torch.library.opcheck(torch.ops.karat_scale.triton_psi_forward.default, (*given, psi))
    detached = [x.detach() for x in (given[0], *given, psi)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.karat_scale.triton_psi_backward.default, tuple(detached), test_utils=tests)


def test_strided_heads_give_the_same_bits():
    fused = drawn(2, 9, 3, 2, 16).float().permute(2, 0, 3, 1, 4)
    psi, upstream = drawn(2, 5).float(), drawn(2, 2, 9, 16).float()
    expected = gradients_of(triton_fourier.attend_psi, [*(x.contiguous() for x in fused), psi], upstream)
    columns = [x.mT.contiguous().mT for x in fused]
    for heads in (list(fused), columns):
        found = gradients_of(triton_fourier.attend_psi, [*heads, psi], upstream.mT.contiguous().mT)
        assert all(map(torch.equal, found, expected))


def test_a_second_gradient_is_refused_and_an_empty_batch_is_not():
    given = [drawn(1, 1, 5, 16).float().requires_grad_() for _ in range(3)]
    output = triton_fourier.attend_psi(*given, drawn(1, 3).float())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.sum(), given[0], create_graph=True)
    empty = [torch.empty(0, 1, 5, 16) for _ in range(3)]
    assert (gradients_of(triton_fourier.attend_psi, [*empty, drawn(1, 3).float()], empty[0])[-1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module_takes_the_kernels_and_agrees_with_itself_in_float64(dtype, by_rows):
    made = content_module(17)
    exact = copy.deepcopy(made).double()
    heads = [drawn(2, 2, 17, 16, seed=n).to(dtype).requires_grad_() for n in range(3)]
    wide = [x.detach().double().requires_grad_() for x in heads]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = made(*heads)
    assert (output.dtype, by_rows) == (dtype, [])
    expected = exact(*wide)
    assert by_rows
    assert relative_error(output, expected) < TOLERANCE[dtype]
    output.sum().backward()
    expected.sum().backward()
    for name, parameter in made.named_parameters():
        assert relative_error(parameter.grad, exact.get_parameter(name).grad) < 2 * TOLERANCE[dtype], name


def test_a_bias_or_a_mask_goes_by_rows(by_rows):
    made, heads = content_module(17), [drawn(2, 2, 17, 16, seed=n).float() for n in range(3)]
    pairs = torch.zeros(17, 17)
    plain_output = made(*heads)
    for options in ({"bias": pairs}, {"mask": pairs == 0}):
        torch.testing.assert_close(made(*heads, **options), plain_output, rtol=1e-4, atol=1e-5)
    assert len(by_rows) == 2


def test_a_traced_module_is_saved_and_loaded(tmp_path, by_rows):
    made, heads = content_module(5), [drawn(1, 2, 5, 16, seed=n).float() for n in range(3)]
    torch.jit.save(torch.jit.trace(made, heads), tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(*heads), made(*heads))
    assert by_rows == []


def test_checkpointed_and_compiled_modules_give_the_same_bits():
    made, heads = content_module(17), [drawn(2, 2, 17, 16, seed=n).float().requires_grad_() for n in range(3)]
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    again = lambda *x: checkpoint(made, *x, use_reentrant=False)  # noqa: E731
    expected = gradients_of(made, heads, heads[0].detach())
    for attend in (compiled, again):
        assert all(map(torch.equal, gradients_of(attend, heads, heads[0].detach()), expected))
