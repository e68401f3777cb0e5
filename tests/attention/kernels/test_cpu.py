"""The CPU kernel against the float64 oracle, with each instruction set this machine has."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_scale.attention import fourier_karat_attention, fourier_karat_scores
from karat_scale.commands.measure.attention import Case, peak_memory
from tests.attention.calls import assert_close, make_call, output_and_gradients, relative_error

pytestmark = pytest.mark.usefixtures("isa")


def fast(call, upstream, **options):
    return output_and_gradients(call, upstream, implementation="cpu", **options)


def oracle(call, upstream, **options):
    return output_and_gradients(call.to(torch.float64), upstream.double(), implementation="reference", **options)


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_one_projection(call):
    """Return query, key and value as timm's layers hold them, as views of one projection's output."""
    fused = torch.stack([x.detach().transpose(1, 2) for x in call[:3]], dim=2).permute(2, 0, 3, 1, 4)
    return [x.requires_grad_() for x in fused.unbind()]


@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(40, 110),
    width=st.sampled_from((4, 20, 32, 48, 64, 80, 96, 128)),
    rank=st.integers(4, 32),
    grid=st.integers(1, 16),
    logits=st.sampled_from((0.1, 1.0, 15.0)),
    seed=st.integers(0, 2**16),
)
def test_float32_matches_the_oracle(batch, heads, tokens, width, rank, grid, logits, seed):
    call = make_call(batch, heads, tokens, width, rank, grid, logits=logits, seed=seed).to(torch.float32)
    upstream = normal(call.value.shape, seed)
    actual = fast(call, upstream)
    assert_close(actual, oracle(call, upstream), max(2e-6, 5e-8 * grid * call.largest_score))


SHAPES = {
    torch.float32: [(197, 12, 3), (256, 1, 1), (50, 32, 5), (33, 2, 17), (16, 3, 64)],
    torch.bfloat16: [(197, 12, 3), (256, 4, 1), (129, 32, 5), (33, 8, 17), (32, 5, 64)],
}


@pytest.mark.parametrize(("dtype", "shape"), [(dtype, shape) for dtype in SHAPES for shape in SHAPES[dtype]], ids=str)
def test_other_shapes(dtype, shape):
    tokens, rank, grid = shape
    call = make_call(2, 2, tokens, 64, rank, grid).to(dtype)
    upstream = normal(call.value.shape, 1, dtype)
    tolerance = max(2e-6, 5e-8 * grid * call.largest_score) if dtype == torch.float32 else 5e-3
    assert_close(fast(call, upstream), oracle(call, upstream), tolerance)


def test_a_handful_of_tokens():
    for tokens in range(1, 20):
        call = make_call(2, 2, tokens, 5, 3, 3, logits=0.1, seed=tokens).to(torch.float32)
        upstream = normal(call.value.shape, tokens)
        # A sum of so few numbers may cancel, which makes its relative error large.
        assert_close(fast(call, upstream), oracle(call, upstream), 2e-5)


@settings(max_examples=50)
@given(
    dtype=st.sampled_from((torch.bfloat16, torch.bfloat16, torch.float16)),
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(8, 150),
    width=st.sampled_from((4, 20, 32, 48, 64, 80, 96, 128)),
    rank=st.integers(1, 32),
    grid=st.integers(1, 16),
    logits=st.sampled_from((0.1, 1.0, 15.0)),
    fused=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sixteen_bits_match_the_oracle(dtype, batch, heads, tokens, width, rank, grid, logits, fused, seed):
    call = make_call(batch, heads, tokens, width, rank, grid, logits=logits, seed=seed).to(dtype)
    upstream = normal(call.value.shape, seed, dtype)
    if fused:
        query, key, value = as_one_projection(call)
        call = call._replace(query=query, key=key, value=value)
        upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    actual = fast(call, upstream)
    assert all(x.dtype == dtype for x in actual)
    assert_close(actual, oracle(call, upstream), 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_as_pytorch_rounds_them(dtype, isa):
    if dtype == torch.bfloat16 and isa in ("amx", "avx512bf16"):
        pytest.skip("its products round their operands")
    call = make_call(1, 2, 37, 20, 4, 2).to(dtype)
    wide = [x.detach().float() for x in call]
    expected = fourier_karat_attention(*wide, implementation="cpu").to(dtype)
    assert torch.equal(fourier_karat_attention(*call, implementation="cpu"), expected)


@pytest.mark.parametrize("grid", [1, 8, 16])
def test_scores_up_to_sixty_keep_their_phase(grid):
    call = make_call(1, 2, 50, 64, 12, grid)
    call = call._replace(query=call.query.detach() * (60 / call.largest_score)).to(torch.float32)
    upstream = normal(call.value.shape, 1)
    assert_close(fast(call, upstream), oracle(call, upstream), 5e-8 * grid * 60)
    call, upstream = call.to(torch.bfloat16), upstream.bfloat16()
    assert_close(fast(call, upstream), oracle(call, upstream), 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_stay_bounded_and_nan_stays_nan(dtype):
    call = make_call(1, 1, 40, 8, 4, 3).to(dtype)
    query = call.query.detach().clone()
    query[0, 0, 3] *= 1e12
    query[0, 0, 5] = float("nan")
    output = fourier_karat_attention(query, *call[1:], implementation="cpu")[0, 0]
    assert fourier_karat_attention(*call, implementation="cpu").isfinite().all()  # no NaN is left in the scratch
    rest = torch.cat((output[:5], output[6:]))
    assert rest.isfinite().all()
    assert rest.abs().max() < 100
    assert output[5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_image(dtype):
    call = make_call(2, 1, 40, 20, 12, 3).to(dtype)  # the last block of 32 is more than half padding
    upstream = normal(call.value.shape, 1, dtype)
    whole = fast(call, upstream)
    query = call.query.detach().clone()
    query[0] = float("nan")
    damaged = fast(call._replace(query=query.requires_grad_()), upstream)
    for before, after in zip(whole[:4], damaged[:4], strict=True):  # O, dQ, dK and dV
        assert torch.equal(before[1], after[1])


@settings(max_examples=40)
@given(
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    batch=st.integers(1, 5),
    heads=st.integers(1, 3),
    tokens=st.one_of(st.just(49), st.integers(20, 110)),
    width=st.sampled_from((4, 20, 32, 64)),
    rank=st.integers(1, 20),
    grid=st.integers(1, 6),
    bias=st.tuples(*[st.booleans()] * 4),
    mask=st.one_of(st.none(), st.tuples(*[st.booleans()] * 4)),
    seed=st.integers(0, 2**16),
)
def test_bias_and_mask_match_the_oracle(dtype, batch, heads, tokens, width, rank, grid, bias, mask, seed):
    call = make_call(batch, heads, tokens, width, rank, grid, seed=seed).to(dtype)
    upstream = normal(call.value.shape, seed, dtype)
    sizes = (batch, heads, tokens, tokens)
    bias_shape = broadcast(sizes, bias)
    options = {"bias": normal(bias_shape, seed + 1, dtype).requires_grad_()}
    if mask is not None:
        # About two thirds of the pairs take part; query 3 sees nothing where queries differ.
        keep = normal(broadcast(sizes, mask), seed + 2) > -0.4
        keep[..., min(3, keep.shape[2] - 1), :] &= not mask[2]
        options["mask"] = keep
    actual = fast(call, upstream, **options)
    expected, tolerance = oracle(call, upstream, **options), 2e-5 if dtype == torch.float32 else 1e-2
    assert_close(actual[:7], expected[:7], tolerance)
    # A bias of one number for all pairs gets the sum of their gradients, and most of these cancel.
    assert actual[7].shape == bias_shape
    assert relative_error(actual[7], expected[7]) < 50 * tolerance


def broadcast(sizes, whole):
    """Return a shape that broadcasts to `sizes`, with 1 where `whole` is false."""
    return tuple(size if chosen else 1 for size, chosen in zip(sizes, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifted_windows(dtype):
    """The calls of Swin are right: they have a bias for each head, and for each window a mask by groups of tokens."""
    call = make_call(8, 3, 49, 32, 12, 3).to(dtype)
    upstream = normal(call.value.shape, 1, dtype)
    bias = normal((1, 3, 49, 49), 2, dtype).requires_grad_()
    groups = torch.randint(4, (4, 49), generator=torch.Generator().manual_seed(3))
    mask = (groups[:, None, :] == groups[:, :, None]).repeat(2, 1, 1).unsqueeze(1)
    expected = oracle(call, upstream, bias=bias, mask=mask)
    assert_close(fast(call, upstream, bias=bias, mask=mask), expected, 3e-6 if dtype == torch.float32 else 5e-3)
    frozen = fourier_karat_attention(*call, bias=bias.detach(), mask=mask, implementation="cpu")
    assert_close([*torch.autograd.grad(frozen, call, upstream)], expected[1:7], 5e-3)


def test_masked_pairs_may_have_any_score_and_all_of_them_may_be_masked():
    call = make_call(2, 2, 40, 16, 5, 3).to(torch.float32)
    upstream = normal(call.value.shape, 1)
    mask = normal((40, 40), 2) > 0
    bias = normal((40, 40), 3)
    plain = fast(call, upstream, mask=mask, bias=bias.clone().requires_grad_())
    for odd in (float("inf"), float("nan")):
        actual = fast(call, upstream, mask=mask, bias=bias.masked_fill(~mask, odd).requires_grad_())
        assert all(map(torch.equal, actual, plain))
    for result in fast(call, upstream, mask=torch.zeros(1, 1, dtype=torch.bool)):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_does_not_become_a_number(dtype):
    for tokens, argument in itertools.product((20, 40), range(3)):
        tensors = [x.detach().clone() for x in make_call(1, 1, tokens, 8, 4, 3).to(dtype)]
        tensors[argument][0, 0, 3, 2] = float("inf")
        exact = fourier_karat_attention(*(x.double() for x in tensors), implementation="reference")
        output = fourier_karat_attention(*tensors, implementation="cpu")
        assert not exact.isfinite().all()
        assert not output[~exact.isfinite()].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [33, 49, 150])
def test_nan_in_one_item_leaves_the_others_alone(dtype, tokens):
    call = make_call(3, 1, tokens, 20, 5, 3).to(dtype)
    query = call.query.detach().clone()
    query[0, 0, -1] = float("nan")
    results = fast(call._replace(query=query.requires_grad_()), normal(call.value.shape, 2, dtype))
    expected = fast(call, normal(call.value.shape, 2, dtype))
    for actual, clean in zip(results[:4], expected, strict=False):
        assert torch.equal(actual[1:], clean[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_give_the_same_bits_and_the_layout_that_layers_want(dtype):
    call = make_call(2, 3, 35, 24, 4, 3).to(dtype)
    upstream = normal(call.value.shape, 4, dtype)
    query, key, value = as_one_projection(call)
    # Last strides other than 1.
    value = value.detach().mT.contiguous().mT.requires_grad_()
    strided = call._replace(query=query, key=key, value=value)
    assert not query.is_contiguous()
    expected = fast(call, upstream)
    assert_close(fast(strided, upstream.mT.contiguous().mT), expected, 0.0)
    ones = torch.ones(call.value.shape, dtype=dtype)
    assert_close(fast(call, ones[:1, :1, :1, :1].expand(ones.shape)), fast(call, ones), 0.0)
    assert fourier_karat_attention(*strided, implementation="cpu").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_for_any_number_of_threads(dtype):
    call = make_call(7, 3, 45, 16, 12, 3).to(dtype)
    upstream = normal(call.value.shape, 6, dtype)
    options = {"bias": normal((1, 3, 45, 45), 7).requires_grad_(), "mask": normal((7, 1, 45, 45), 8) > 0}
    expected = fast(call, upstream), fast(call, upstream, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            actual = fast(call, upstream), fast(call, upstream, **options)
            assert all(map(torch.equal, actual[0] + actual[1], expected[0] + expected[1]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_backward_takes_little_memory_beside_its_results(isa):
    """A small batch needs less than 0.8 MB beside its results, because its parts are added to one sum per head."""
    case = Case("tiny", batch=4, grid=3, rank=12, dtype="fp32", device="cpu")
    results = 4 * 4 * 3 * 197 * (4 * 64 + 12) + 4 * 3 * 197 * 12 * 7  # O, dQ, dK, dV, H; those of the parameters
    assert peak_memory("cpu", case) < results / 1e6 + 0.8


def test_registered_operation_is_well_behaved():
    call = make_call(2, 2, 6, 4, 5, 2).to(torch.float32)
    bias, mask = normal((1, 2, 6, 6), 1).requires_grad_(), normal((2, 1, 6, 6), 2) > 0
    torch.library.opcheck(torch.ops.karat_scale.cpu_forward.default, (*call, None, bias, mask))


def test_auto_takes_the_kernel_where_it_can_and_streaming_elsewhere():
    call = make_call(1, 2, 21, 16, 4, 2).to(torch.float32)
    by_name = {name: fourier_karat_attention(*call, implementation=name) for name in ("cpu", "streaming")}
    assert not torch.equal(by_name["cpu"], by_name["streaming"])
    assert torch.equal(fourier_karat_attention(*call), by_name["cpu"])
    wide = make_call(1, 2, 21, 16, 33, 2).to(torch.float32)
    expected = fourier_karat_attention(*wide, implementation="streaming")
    assert torch.equal(fourier_karat_attention(*wide), expected)


def test_what_it_cannot_take_is_refused_by_name_and_streams_under_auto():
    call = make_call(1, 2, 6, 4, 3, 2).to(torch.float32)
    wide = torch.zeros(6, 6, dtype=torch.float64)
    for tensors, options, reason in (
        (call, {"base": "gelu"}, "base = 'gelu'; it has no base activation"),
        (call, {"bias": wide}, "no float64"),
        (call.to(torch.float64), {}, 'takes no float64; use implementation = "streaming"'),
        (make_call(1, 1, 6, 4, 33, 2).to(torch.float32), {}, "r = 33"),
    ):
        for function in (fourier_karat_attention, fourier_karat_scores):
            with pytest.raises(ValueError, match=f"implementation = 'cpu' cannot take this call: .*{reason}"):
                function(*tensors, implementation="cpu", **options)
        expected = fourier_karat_attention(*tensors, implementation="streaming", **options)
        assert torch.equal(fourier_karat_attention(*tensors, **options), expected)


def test_dtypes_may_differ():
    # Under autocast a normalised query and key are float32 where the value is bfloat16.
    call = make_call(2, 2, 12, 8, 4, 3).to(torch.float32)
    mixed = call._replace(value=call.value.detach().bfloat16().requires_grad_())
    upstream = normal(call.value.shape, 9, torch.bfloat16)
    actual = fast(mixed, upstream)
    assert [x.dtype for x in actual[:4]] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert_close(actual, oracle(mixed, upstream), 5e-3)


@pytest.mark.parametrize("width", [8, 4], ids=["by the kernel", "by another"])
def test_scores_are_those_of_the_kernels_attention(width):
    call = make_call(1, 2, 8, width, 3, 2).to(torch.float32)
    learned = fourier_karat_scores(*call, implementation="cpu")
    assert_close([learned @ call.value], [fourier_karat_attention(*call, implementation="cpu")], 1e-6)


DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from karat_scale.attention import FourierKaratOperator
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
operator = FourierKaratOperator(9, 2, rank=4, grid=2, implementation="cpu")
inputs = torch.randn(3, 4, 2, 9, 8)
operator(*inputs).square().sum().backward()
expected = [p.grad.clone() for p in operator.parameters()]
operator.zero_grad()
parallel = DistributedDataParallel(operator)
parallel(*inputs[:, 2 * rank : 2 * rank + 2]).square().sum().backward()
for p, whole in zip(operator.parameters(), expected):
    torch.testing.assert_close(2 * p.grad, whole)
dist.barrier()
del parallel
dist.destroy_process_group()  # without it gloo's threads may abort a process that exits
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_data_parallel_gradients_are_the_whole_batchs(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", DDP, str(i), str(tmp_path / "store")]) for i in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
