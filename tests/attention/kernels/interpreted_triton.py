"""Tests of what the Triton kernels compute, in Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, so `test_triton_fourier.py` runs this file in a process of
its own.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from karat_scale.attention import FourierKaratOperator, fourier_karat_attention, fourier_karat_scores
from karat_scale.attention.kernels import triton_launch, triton_tiles
from karat_scale.attention.kernels.triton_features import sine_cosine
from karat_scale.attention.kernels.triton_launch import ForwardPlan
from tests.attention.calls import NAMES, assert_close, make_call, output_and_gradients, relative_error
from tests.attention.kernels.interpreter import install_bfloat16

install_bfloat16()

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1.2e-3}


def kernels(call, upstream, **options):
    return output_and_gradients(call, upstream, implementation="triton", **options)


def oracle(call, upstream, bias=None, **options):
    wide = None if bias is None else bias.detach().double().requires_grad_()
    call = call.to(torch.float64)
    return output_and_gradients(call, upstream.double(), implementation="reference", bias=wide, **options)


def draw(shape, dtype, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def compare(dtype, shape, *, logits=1.0, seed=0, tolerance=None, scale=1.0, **options):
    """Assert that values and every gradient agree with the float64 reference on the same rounded inputs."""
    call = make_call(*shape, logits=logits, seed=seed).to(dtype)
    upstream = draw(call.value.shape, dtype, seed, scale)
    tolerance = tolerance or max(TOLERANCE[dtype], 5e-8 * shape[5] * call.largest_score)
    assert_close(kernels(call, upstream, **options), oracle(call, upstream, **options), tolerance)


# batch, heads, tokens, width, rank, grid: every head width of timm's ViTs, both padded ranks, every kind of kernel.
SHAPES = [
    (1, 1, 1, 16, 1, 1),
    (2, 3, 29, 32, 5, 1),
    (2, 2, 37, 48, 12, 2),
    (3, 1, 50, 64, 16, 3),
    (2, 1, 70, 80, 24, 4),
    (1, 2, 64, 96, 32, 7),
    (1, 2, 20, 24, 20, 5),
    (1, 1, 33, 24, 9, 16),
    (1, 1, 197, 64, 12, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_oracle_at_a_small_size(dtype):
    compare(dtype, (1, 1, 21, 64, 12, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_oracle(shape, dtype):
    compare(dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_any_size_fit_into_float16(dtype, masked):
    # A loss scale may be large, and gradients of a mean over many images are small.
    for scale in (2.0**-12, 2.0**9) if dtype == torch.float16 else (1e-20, 1e20):
        compare(dtype, (1, 2, 20, 16, 4, 3), scale=scale, mask=draw_mask((20, 20)) if masked else None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-7, 1e6])
def test_coefficients_of_any_size_fit_into_float16(size):
    call = make_call(2, 1, 20, 16, 4, 3).to(torch.float32)
    with torch.no_grad():
        call.cos_coef.mul_(size)
        call.sin_coef.mul_(size)
        # Ranks of very different sizes, and one without a function.
        call.cos_coef[:, 1].mul_(1e-3)
        call.sin_coef[:, 1].mul_(1e-3)
        call.cos_coef[:, 2], call.sin_coef[:, 2] = 0, 0
    heads = {n: getattr(call, n).detach().to(torch.bfloat16).requires_grad_() for n in ("query", "key", "value")}
    call = call._replace(**heads)
    upstream = draw(call.value.shape, torch.bfloat16)
    assert_close(kernels(call, upstream), oracle(call, upstream), TOLERANCE[torch.bfloat16])


@pytest.mark.slow
def test_images_with_gradients_of_different_sizes_share_one_sum():
    call = make_call(4, 1, 20, 16, 4, 2).to(torch.bfloat16)
    sizes = torch.tensor([0.0, 1e-12, 1.0, 1e-6], dtype=torch.bfloat16).view(4, 1, 1, 1)
    upstream = draw(call.value.shape, torch.bfloat16) * sizes
    actual, expected = kernels(call, upstream), oracle(call, upstream)
    assert_close(actual, expected, TOLERANCE[torch.bfloat16])
    for image in (1, 3):
        assert relative_error(actual[2][image], expected[2][image]) < TOLERANCE[torch.bfloat16]


def test_a_base_activation_and_a_bias_agree_with_the_oracle():
    bias = draw((1, 1, 20, 20), torch.bfloat16).requires_grad_()
    compare(torch.bfloat16, (1, 1, 20, 16, 4, 1), base="silu", bias=bias)


def draw_mask(shape, seed=0):
    """Return a mask that keeps about three pairs in five and, if there is a query 3, none of its pairs."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    if shape[-2] > 3:
        mask[..., 3, :] = False
    return mask


# Swin's shifted windows: a mask of each window, a bias of each head.
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_a_mask_and_a_bias_agree_with_the_oracle(dtype):
    bias = draw((1, 2, 20, 20), dtype).requires_grad_()
    compare(dtype, (2, 2, 20, 16, 4, 1), bias=bias, mask=draw_mask((2, 1, 20, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [100, 120])
def test_the_smaller_tiles_of_biased_and_masked_calls_agree_with_the_oracle(architecture, monkeypatch):
    monkeypatch.setattr(triton_launch, "architecture", lambda: architecture)
    for plans in ("_forward_plans", "_backward_plans"):
        monkeypatch.setattr(triton_launch, plans, {})
    bias = draw((1, 2, 20, 20), torch.bfloat16).requires_grad_()
    compare(torch.bfloat16, (2, 2, 20, 32, 12, 3), bias=bias, mask=draw_mask((2, 1, 20, 20)))


@pytest.mark.slow
def test_a_query_without_pairs_has_no_output_and_no_gradient():
    call = make_call(1, 2, 20, 16, 4, 2).to(torch.bfloat16)
    mask = draw_mask((20, 20))
    output, query, *_ = kernels(call, draw(call.value.shape, torch.bfloat16), mask=mask)
    assert (output[:, :, 3] == 0).all()
    assert (query[:, :, 3] == 0).all()
    nothing = kernels(call, draw(call.value.shape, torch.bfloat16), mask=torch.zeros_like(mask))
    assert all((x == 0).all() for x in nothing)


def test_a_cut_pair_may_have_an_infinite_score():
    mask = draw_mask((20, 20))
    call = make_call(1, 1, 20, 16, 4, 2).to(torch.float32)
    upstream = draw(call.value.shape, torch.float32)
    bias = torch.zeros(20, 20).masked_fill(~mask, -torch.inf).requires_grad_()
    found = kernels(call, upstream, mask=mask, bias=bias)
    assert_close(found[:7], oracle(call, upstream, mask=mask), 2e-6)
    assert not any(x[:, :, 3].any() for x in found[:2])  # of the query without pairs


@pytest.mark.slow
@pytest.mark.parametrize("mask", [(3, 2, 20, 20), (3, 1, 20, 20), (2, 20, 20), (1, 1, 1, 20), (20, 1)], ids=str)
@pytest.mark.parametrize("bias", [None, (3, 2, 20, 20), (20, 20)], ids=str)
@pytest.mark.parametrize("base", ["zero", "gelu"])
def test_every_broadcast_of_a_mask_agrees_with_the_oracle(base, bias, mask):
    bias = None if bias is None else draw(bias, torch.float32).requires_grad_()
    compare(torch.float32, (3, 2, 20, 16, 4, 4), base=base, bias=bias, mask=draw_mask(mask))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_masked_calls_of_every_kind_of_kernel_agree_with_the_oracle(shape, dtype):
    batch, _, tokens, *_ = shape
    compare(dtype, shape, mask=draw_mask((batch, 1, tokens, tokens)))


@pytest.mark.slow
def test_masked_long_ranks_are_cut_and_batches_summed_in_parts(monkeypatch):
    compare(torch.bfloat16, (1, 2, 20, 16, 70, 2), mask=draw_mask((20, 20)))
    monkeypatch.setattr(triton_tiles, "PROGRAMS_WANTED", 6)
    monkeypatch.setattr(triton_launch, "_backward_plans", {})
    compare(torch.float32, (7, 2, 20, 32, 12, 2), mask=draw_mask((7, 1, 20, 20)))


@pytest.mark.parametrize(
    ("dtype", "masked", "names"),
    [
        (torch.bfloat16, False, ("query", "cos_coef")),
        pytest.param(torch.float32, False, NAMES[1:7], marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, NAMES[1:7], marks=pytest.mark.slow),
    ],
)
def test_an_infinite_input_shows_wherever_it_does_in_the_equation(dtype, masked, names):
    """An infinite input must not vanish in a kernel, because a guard against NaN would then miss it."""
    mask = torch.ones(20, 20, dtype=torch.bool).triu() if masked else None
    for name in names:
        call = make_call(1, 1, 20, 16, 4, 1).to(dtype)
        with torch.no_grad():
            getattr(call, name).view(-1)[5] = torch.inf
        upstream = draw(call.value.shape, dtype)
        found, expected = kernels(call, upstream, mask=mask), oracle(call, upstream, mask=mask)
        for what, a, e in zip(NAMES, found, expected, strict=False):
            # Zero times infinity is NaN in the reference; here a cut pair adds nothing, so fewer entries show it.
            missed = a.isfinite().all() if masked else (a.isfinite() & ~e.isfinite()).any()
            assert e.isfinite().all() or not missed, f"{name} is infinite: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("bias", [None, (3, 2, 20, 20), (1, 2, 20, 20), (3, 1, 1, 20), (20, 20)], ids=str)
@pytest.mark.parametrize("base", ["zero", "identity", "gelu"])
def test_every_broadcast_of_a_bias_agrees_with_the_oracle(base, bias):
    bias = None if bias is None else draw(bias, torch.float32).requires_grad_()
    compare(torch.float32, (3, 2, 20, 16, 4, 4), base=base, bias=bias)


@pytest.mark.slow
def test_a_bias_without_a_gradient_is_added_all_the_same():
    call = make_call(1, 2, 9, 16, 4, 2).to(torch.float32)
    bias = draw((9, 9), torch.float32)
    expected = fourier_karat_attention(*call.to(torch.float64), bias=bias.double(), implementation="reference")
    output = fourier_karat_attention(*call, bias=bias, implementation="triton")
    assert relative_error(output, expected) < 2e-6
    output.sum().backward()


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_where_torch_allows_it(tf32):
    compare(torch.float32, (1, 1, 20, 16, 4, 2), tolerance=1e-3)
    call = make_call(1, 1, 20, 16, 4, 2).to(torch.float32)
    # The switch has an effect, because features are rounded. Scores are not.
    assert triton_launch.products(torch.float32, True).scores == "tf32x3"
    exact = fourier_karat_attention(*call.to(torch.float64), implementation="reference")
    assert relative_error(fourier_karat_attention(*call, implementation="triton"), exact) > 2e-6


# A norm over fewer numbers than these says little about 16-bit arithmetic.
@pytest.mark.slow
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.tuples(*(st.integers(*r) for r in [(1, 3), (1, 2), (16, 80), (8, 128), (2, 32), (1, 16)])),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_oracle_for_drawn_shapes(dtype, shape, seed):
    compare(dtype, shape, seed=seed)


@pytest.mark.parametrize(("grid", "largest"), [(3, 60), pytest.param(4, 60, marks=pytest.mark.slow)])
def test_units_of_16_bits_are_within_a_thousandth(grid, largest):
    call = make_call(1, 1, 40, 64, 12, grid)
    call = call._replace(query=call.query * (largest / call.largest_score))
    heads = [x.detach().to(torch.bfloat16) for x in call[:3]]
    cos, sin, proj = (x.detach().float() for x in call[3:])
    query, key, value = heads
    products = triton_tiles.products(torch.bfloat16, True)
    sizes = triton_tiles.Sizes(1, 1, 40, 64, 64, 12, grid)
    strides = [x.stride() for x in heads]
    plan = ForwardPlan(sizes, products, "zero", (*strides, None, None, None, value.stride()), (1, 1))
    coef, scale = torch.empty(1, 2 * grid, 128, 16, dtype=torch.float16), torch.empty(1)
    narrow, output = torch.empty(1, 1, 16, 64, dtype=torch.bfloat16), torch.empty_like(value)
    hidden = torch.empty(1, 1, 40, 16)  # in float32, because rounding to 16 bits would hide the error under test
    plan.prepare(cos, sin, proj, value, None, coef, scale, narrow, None)
    plan.forward(query, key, None, None, coef, scale, narrow, proj, value, output, hidden)
    scores = query.double() @ key.double().mT / 8
    phases = [m * scores for m in range(1, grid + 1)]
    expected = sum(
        torch.cos(x) @ cos[..., m].double().mT + torch.sin(x) @ sin[..., m].double().mT for m, x in enumerate(phases)
    )
    assert relative_error(hidden[..., :12], expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("grid", [3, 11, 16])
def test_large_scores_keep_their_phase(grid):
    call = make_call(1, 1, 40, 64, 8, grid)
    call = call._replace(query=call.query * (60 / call.largest_score)).to(torch.float32)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(1))
    assert call.largest_score > 59
    assert_close(kernels(call, upstream), oracle(call, upstream), 5e-8 * grid * 60)
    call, upstream = call.to(torch.bfloat16), upstream.bfloat16()
    assert_close(kernels(call, upstream), oracle(call, upstream), TOLERANCE[torch.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_ranks_are_cut(dtype):
    compare(dtype, (1, 2, 20, 16, 70, 2))


@pytest.mark.slow
def test_the_batch_is_summed_in_parts(monkeypatch):
    monkeypatch.setattr(triton_tiles, "PROGRAMS_WANTED", 6)
    monkeypatch.setattr(triton_launch, "_backward_plans", {})
    compare(torch.float32, (7, 2, 20, 32, 12, 2))


@pytest.mark.slow
def test_strided_inputs_give_the_same_bits_and_the_output_layers_want():
    call = make_call(2, 3, 21, 32, 8, 3).to(torch.float32)
    upstream = torch.randn(2, 3, 21, 32, generator=torch.Generator().manual_seed(2))
    expected = kernels(call, upstream)
    # timm's layout, views of one projection's output; and one whose rows are not contiguous.
    fused = torch.stack([x.detach().transpose(1, 2) for x in call[:3]], dim=2).permute(2, 0, 3, 1, 4)
    columns = [x.detach().mT.contiguous().mT for x in call[:3]]
    for views in (fused.unbind(), columns):
        strided = call._replace(**{n: v.requires_grad_() for n, v in zip(call._fields[:3], views, strict=True)})
        assert not strided.query.is_contiguous()
        assert_close(kernels(strided, upstream.mT.contiguous().mT), expected, 0.0)
    assert fourier_karat_attention(*call, implementation="triton").transpose(1, 2).is_contiguous()


@pytest.mark.slow
def test_scores_wider_than_a_tile():
    call = make_call(1, 1, 150, 16, 4, 2).to(torch.float32)
    learned = fourier_karat_scores(*call, implementation="triton")
    expected = fourier_karat_scores(*call.to(torch.float64), implementation="reference")
    assert relative_error(learned, expected) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_scores_and_harmonics_in_float32(inputs):
    call = make_call(2, 2, 20, 32, 12, 11, logits=8.0).to(torch.float32)
    arguments = [x.detach().to(inputs).requires_grad_() for x in call[:3]] + list(call[3:])
    expected = fourier_karat_attention(*(x.double() for x in arguments), implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fourier_karat_attention(*arguments, implementation="triton")
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    # Scores rounded to bfloat16 would be off by order one at the eleventh harmonic.
    assert relative_error(output, expected) < 5e-3
    assert [x.grad.dtype for x in arguments] == [x.dtype for x in arguments]


@pytest.mark.slow
def test_mixed_dtypes_compute_in_float32():
    call = make_call(1, 2, 20, 32, 4, 2)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float16)
    mixed = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(call, dtypes, strict=True)]
    output = fourier_karat_attention(*mixed, implementation="triton")
    expected = fourier_karat_attention(*(x.detach().double() for x in mixed), implementation="reference")
    assert output.dtype == torch.float32
    assert relative_error(output, expected) < 2e-6
    output.sum().backward()
    assert tuple(x.grad.dtype for x in mixed) == dtypes


def test_an_empty_batch_gives_zero_parameter_gradients():
    call = make_call(0, 2, 5, 16, 2, 3).to(torch.float32)
    assert all((g == 0).all() for g in kernels(call, torch.empty(call.value.shape))[4:])


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant):
    call = make_call(1, 2, 20, 16, 4, 2).to(torch.float32)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(4))
    expected = kernels(call, upstream)
    run = lambda *x: fourier_karat_attention(*x, implementation="triton")  # noqa: E731
    checkpoint(run, *call, use_reentrant=reentrant).backward(upstream)
    assert all(torch.equal(x.grad, e) for x, e in zip(call, expected[1:], strict=True))


@pytest.mark.slow
def test_compiles_into_one_graph():
    call = make_call(2, 2, 9, 16, 4, 3).to(torch.float32)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(5))
    compiled = torch.compile(fourier_karat_attention, backend="aot_eager", fullgraph=True)
    assert_close(kernels(call, upstream, attend=compiled), kernels(call, upstream), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rank", "bias", "mask"), [(12, None, None), (17, (6, 6), None), (12, (6, 6), (2, 1, 6, 6))])
def test_registered_operations_are_well_behaved(rank, bias, mask, dtype):
    call = make_call(2, 2, 6, 16, rank, 2).to(dtype)
    mask = None if mask is None else draw_mask(mask)
    bias = None if bias is None else draw(bias, dtype).requires_grad_()
    base = "zero" if bias is None else "silu"
    torch.library.opcheck(torch.ops.karat_scale.triton_forward.default, (*call, bias, mask, base))
    detached = tuple(x.detach() for x in call)
    added = None if bias is None else bias.detach()
    kept = torch.ops.karat_scale.triton_forward(*detached, added, mask, base)
    tests = ("test_schema", "test_faketensor")
    arguments = (*kept, *detached, added, mask, base, added is not None)
    torch.library.opcheck(torch.ops.karat_scale.triton_backward.default, arguments, test_utils=tests)


def test_a_traced_operator_is_saved_and_loaded(tmp_path):
    operator = FourierKaratOperator(5, 1, 2, 1, implementation="triton")
    inputs = [draw((1, 1, 5, 16), torch.float32, seed) for seed in range(3)]
    torch.jit.save(torch.jit.trace(operator, inputs), tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(*inputs), operator(*inputs))


def test_a_second_gradient_is_refused():
    call = make_call(1, 1, 5, 16, 2, 1).to(torch.float32)
    output = fourier_karat_attention(*call, implementation="triton")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(output.sum(), call.query, create_graph=True)


@triton.jit
def evaluate(x, sin, cos, FAST: tl.constexpr):
    at = tl.arange(0, 4096)
    s, c = sine_cosine(tl.load(x + at), FAST)
    tl.store(sin + at, s)
    tl.store(cos + at, c)


@pytest.mark.parametrize("fast", [False, True])
def test_sine_and_cosine_over_many_turns(fast):
    x = torch.linspace(-1000, 1000, 4096)
    sin, cos = torch.empty_like(x), torch.empty_like(x)
    evaluate[(1,)](x, sin, cos, FAST=fast)
    tolerance = 2e-4 if fast else 1.5e-7
    assert (sin - x.double().sin()).abs().max() < tolerance
    assert (cos - x.double().cos()).abs().max() < tolerance


def test_limits_are_named():
    wide, fine = (make_call(1, 1, 3, *x).to(torch.float32) for x in ((129, 2, 1), (16, 2, 17)))
    with pytest.raises(ValueError, match="at most 128 wide and query's are 129"):
        fourier_karat_attention(*wide, implementation="triton")
    with pytest.raises(ValueError, match="at most 16 and cos_coef's is 17"):
        fourier_karat_attention(*fine, implementation="triton")
    with pytest.raises(ValueError, match="float64"):
        fourier_karat_attention(*make_call(1, 1, 3, 16, 2, 1), implementation="triton")
