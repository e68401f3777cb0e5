"""Streaming against the float64 oracle: values and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_scale.attention import fourier_karat_attention, routes, streaming
from tests.attention.calls import LargestTensor, assert_close, make_call, output_and_gradients

BASES = ("zero", "identity", "silu", "gelu")
BIAS_SHAPES = ((7,), (7, 1), (2, 1, 7), (3, 1, 1, 7), (1, 2, 7, 1), (3, 2, 7, 7), (1, 1, 1, 1))


def streamed(call, upstream, **options):
    return output_and_gradients(call, upstream, implementation="streaming", **options)


def oracle(call, upstream, **options):
    return output_and_gradients(call, upstream, implementation="reference", **options)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(48, 72),
    width=st.sampled_from((4, 8, 32, 48, 64, 80)),
    rank=st.integers(4, 33),
    grid=st.integers(1, 16),
    logits=st.sampled_from((0.1, 1.0, 15.0)),
    base=st.sampled_from(BASES),
    budget=st.sampled_from((1, 2**12, 2**18)),
    seed=st.integers(0, 2**16),
)
def test_float32_matches_the_oracle(batch, heads, tokens, width, rank, grid, logits, base, budget, seed):
    call = make_call(batch, heads, tokens, width, rank, grid, logits=logits, seed=seed).to(torch.float32)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "workspace_budget", lambda _: budget)
        patch.setattr(routes, "MIN_ROWS", 1)
        actual = streamed(call, upstream, base=base)
    expected = oracle(call.to(torch.float64), upstream.double(), base=base)
    assert_close(actual, expected, max(2e-6, 5e-8 * grid * call.largest_score))


def test_a_handful_of_tokens():
    # In float64: over so few numbers the rounding of float32 scores alone may exceed a relative bound.
    for tokens in range(1, 16):
        call = make_call(2, 2, tokens, 5, 3, 3, seed=tokens)
        upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(tokens)).double()
        assert_close(streamed(call, upstream), oracle(call, upstream), 1e-12)


@settings(max_examples=20)
@given(
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    batch=st.integers(1, 3),
    tokens=st.integers(8, 48),
    width=st.sampled_from((32, 64)),
    grid=st.integers(1, 11),
    base=st.sampled_from(BASES),
    seed=st.integers(0, 2**16),
)
def test_sixteen_bits_match_the_oracle(dtype, batch, tokens, width, grid, base, seed):
    call = make_call(batch, 2, tokens, width, 12, grid, seed=seed).to(dtype)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    actual = streamed(call, upstream, base=base)
    assert all(x.dtype == dtype for x in actual)
    assert_close(actual, oracle(call.to(torch.float64), upstream.double(), base=base), 5e-3)


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias_and_mask_of_any_broadcast_shape(shape, monkeypatch):
    call = make_call(3, 2, 7, 8, 4, 3)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 1, 7, 7, generator=generator) > 0.4
    upstream = torch.randn(call.value.shape, generator=generator, dtype=torch.float64)
    for base in BASES:
        for options in ({"bias": bias}, {"bias": bias, "mask": mask}):
            assert_close(
                streamed(call, upstream, base=base, **options), oracle(call, upstream, base=base, **options), 1e-12
            )
    monkeypatch.setattr(routes, "workspace_budget", lambda _: 1)
    monkeypatch.setattr(routes, "MIN_ROWS", 3)
    mask = torch.rand(shape, generator=generator) > 0.4
    assert_close(streamed(call, upstream, mask=mask), oracle(call, upstream, mask=mask), 1e-12)


def test_masked_pairs_add_nothing_whatever_their_scores():
    call = make_call(1, 2, 6, 8, 4, 2)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, float("-inf")).requires_grad_()
    actual = streamed(call, torch.ones_like(call.value), mask=mask, bias=bias)
    expected = streamed(call, torch.ones_like(call.value), mask=mask)
    assert_close(actual[:7], expected, 0.0)
    assert actual[7].isfinite().all()
    assert (actual[7][~mask] == 0).all()


def test_strided_inputs_give_the_same_bits_and_the_tensors_layouts_want():
    call = make_call(2, 3, 10, 8, 4, 3).to(torch.float32)
    upstream = torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(4))
    # timm's layout: q, k and v are views of one projection's output.
    fused = torch.stack([x.detach().transpose(1, 2) for x in call[:3]], dim=2)
    strided = call._replace(**dict(zip(("query", "key", "value"), fused.permute(2, 0, 3, 1, 4), strict=True)))
    strided = strided._replace(**{name: getattr(strided, name).requires_grad_() for name in ("query", "key", "value")})
    assert not strided.query.is_contiguous()
    assert_close(streamed(strided, upstream.mT.contiguous().mT), streamed(call, upstream), 1e-6)
    assert fourier_karat_attention(*strided, implementation="streaming").transpose(1, 2).is_contiguous()


def test_two_threads_agree_with_the_oracle():
    call = make_call(3, 2, 64, 32, 12, 3).to(torch.float32)
    upstream = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(6))
    torch.set_num_threads(2)
    try:
        actual = streamed(call, upstream)
    finally:
        torch.set_num_threads(1)
    assert_close(actual, oracle(call.to(torch.float64), upstream.double()), 2e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_all_pairs_and_harmonics(masked):
    batch, heads, tokens, width, rank, grid = 2, 2, 700, 16, 16, 3
    call = make_call(batch, heads, tokens, width, rank, grid).to(torch.float32)
    coef = torch.zeros(heads, 2 * grid, rank, tokens)
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if masked else None
    arguments = (*(x.detach() for x in call[:3]), coef, call.proj.detach(), None, mask, mask, "fourier", "zero", False)
    # The kernels themselves: a dispatch mode sees a registered operation as one.
    with LargestTensor() as largest:
        output, hidden = streaming._streaming_forward(*arguments)
        streaming._streaming_backward(torch.ones_like(output), hidden, *arguments, False)
    assert largest.elements <= max(2**18 * torch.get_num_threads(), 32 * tokens * 2 * grid)
    assert largest.elements < tokens * tokens * grid
    assert largest.elements < batch * heads * tokens * tokens


def test_registered_operation_is_well_behaved():
    call = make_call(2, 2, 6, 4, 16, 2).to(torch.float32)
    coef = torch.randn(2, 4, 16, 6, generator=torch.Generator().manual_seed(9)).requires_grad_()
    bias = torch.zeros(1, 1, 6, 6, requires_grad=True)
    arguments = (*call[:3], coef, call.proj, bias, None, None, "fourier", "silu", False)
    torch.library.opcheck(torch.ops.karat_scale.streaming_forward.default, arguments)


def test_a_learned_bias_and_a_projector_of_any_strides_compile():
    call = make_call(2, 2, 6, 4, 16, 2).to(torch.float32)
    coef = torch.randn(2, 4, 16, 6, generator=torch.Generator().manual_seed(9))
    bias = torch.zeros(6, 6, 2).permute(2, 0, 1)[None]
    projector = call.proj.detach().mT.contiguous().mT
    inputs = [x.detach() for x in call[:3]]
    settings = ("fourier", "silu", False)
    output, hidden = torch.ops.karat_scale.streaming_forward(*inputs, coef, projector, bias, None, None, *settings)
    arguments = (output, hidden, *inputs, coef, projector, bias, None, None, *settings, True)
    backward = torch.ops.karat_scale.streaming_backward.default
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))
