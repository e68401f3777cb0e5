"""FlexAttention as a second implementation: it agrees with the formula in float64 and with the kernels."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from karat_scale.attention import flex, fourier_karat_attention
from karat_scale.attention.call import FourierCall
from karat_scale.attention.functional import automatic, choosing_as_on_a_gpu
from karat_scale.attention.operator import LayerCall
from karat_scale.attention.rivals import PolynomialHeads, SigmoidHeads
from tests.attention.calls import content_module, gradients_of, make_call, output_and_gradients, relative_error
from tests.compilers import instruction_sets


@pytest.fixture(params=[SigmoidHeads, PolynomialHeads])
def pointwise(request):
    return request.param


def random_case(seed):
    """Return a call of random sizes, a gradient of its output and, for every second seed, a bias."""
    draw = random.Random(seed)
    heads, tokens = draw.randint(1, 4), draw.randint(2, 70)
    sizes = draw.randint(1, 3), heads, tokens, draw.randint(1, 64), draw.randint(1, 20), draw.randint(1, 7)
    call = make_call(*sizes, logits=draw.choice([0.5, 1.0, 3.0]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(draw.choice([1, heads]), tokens, tokens, generator=generator, dtype=torch.float64)
    return call, torch.randn(call.value.shape, generator=generator, dtype=torch.float64), bias if seed % 2 else None


@pytest.mark.parametrize("seed", range(8))
def test_it_agrees_with_the_reference_and_with_the_kernel_for_random_shapes(seed):
    call, upstream, bias = random_case(seed)
    expected = output_and_gradients(call, upstream, bias=learned(bias), implementation="reference")
    actual = output_and_gradients(call, upstream, bias=learned(bias), implementation="flex")
    assert max(relative_errors(actual, expected)) < 1e-12
    narrow, small = call.to(torch.float32), None if bias is None else bias.float()
    actual = output_and_gradients(narrow, upstream, bias=learned(small), implementation="flex")
    exact = output_and_gradients(narrow.to(torch.float64), upstream, bias=learned(small, torch.float64))
    rounding = 5e-8 * call.cos_coef.shape[-1] * call.largest_score  # of the largest phase
    assert max(relative_errors(actual, exact)) < 1e-6 + rounding
    if instruction_sets():
        kernels = output_and_gradients(narrow, upstream, bias=learned(small), implementation="cpu")
        assert max(relative_errors(actual, kernels)) < 2e-6 + rounding


def relative_errors(actual, expected):
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


def learned(bias, dtype=None):
    return None if bias is None else bias.detach().to(dtype or bias.dtype).requires_grad_()


@pytest.mark.parametrize("tokens", [1, 9, 40])
def test_psi_of_the_content_form_agrees_with_its_formula(tokens):
    heads = make_call(2, 2, tokens, 8, 4, 3, logits=2.0, seed=tokens)[:3]
    upstream = torch.randn(heads[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    by_name = {
        name: gradients_of(content_module(tokens, implementation=name).double(), heads, upstream)
        for name in ("flex", "reference")
    }
    assert max(relative_errors(*by_name.values())) < 1e-12
    module = content_module(tokens, implementation="flex")
    assert max(relative_errors(gradients_of(module, [x.float() for x in heads], upstream), by_name["reference"])) < 1e-5


def test_one_compiled_flex_attention_takes_many_functions(monkeypatch):
    """As on a GPU, but for the backend. Before the fix, the second G failed, and so did the ninth signature."""

    def attend_by(log, *heads):
        with flex._with_vmap(), torch._dynamo.config.patch(recompile_limit=256):
            read, kept = compiled(*heads, log, return_aux=AuxRequest(lse=True))
        return read, kept.lse.to(read.dtype).exp().unsqueeze(-1)

    compiled = torch.compile(flex_attention, fullgraph=True, backend="eager")
    heads = make_call(2, 2, 20, 16, 4, 3, seed=1)[:3]
    cases = [
        (grid, [x.detach().float()[:, :, :tokens] for x in heads]) for grid in (2, 3, 5) for tokens in (10, 15, 20)
    ]
    drawn = [torch.randn(2, 2 * grid + 1, generator=torch.Generator().manual_seed(grid)) for grid, _ in cases]
    with torch.no_grad():
        expected = [flex.attend_psi(*given, psi) for (_, given), psi in zip(cases, drawn, strict=True)]
        monkeypatch.setattr(flex, "_attend_by", attend_by)
        actual = [flex.attend_psi(*given, psi) for (_, given), psi in zip(cases, drawn, strict=True)]
    assert max(relative_errors(actual, expected)) < 1e-5


def test_sigmoid_and_polynomial_attention_agree_with_their_formulas(pointwise):
    generator = torch.Generator().manual_seed(1)
    query, key, value, upstream = torch.randn(4, 2, 3, 21, 8, dtype=torch.float64, generator=generator)
    heads = [query, key, value]
    with torch.no_grad():  # a query without a positive score, and one without a negative
        key[:, :, :, 0] = key[:, :, :, 0].abs()
        query[:, 0, 3], query[:, 0, 4] = -torch.eye(8, dtype=torch.float64)[0], torch.eye(8, dtype=torch.float64)[0]
    by_rows, by_flex = (gradients_of(pointwise(21, 3, name), heads, upstream) for name in ("auto", "flex"))
    assert max(relative_errors(by_flex, by_rows)) < 1e-12
    narrow = gradients_of(pointwise(21, 3, "flex"), [x.float() for x in heads], upstream.float())
    assert max(relative_errors(narrow, by_rows)) < 2e-6
    torch.library.opcheck(torch.ops.karat_scale.flex_pointwise_forward.default, (*heads, pointwise.kind, 21))
    assert pointwise(21, 3, "flex")(*(x[:0] for x in heads)).shape == (0, 3, 21, 8)


def test_they_take_no_bias_there_and_say_so(pointwise):
    heads = pointwise(6, 2, "flex")
    why = "it has no bias and no mask for these kinds"
    with pytest.raises(ValueError, match=f"implementation = 'flex' cannot take this call: {why}"):
        heads(*make_call(1, 2, 6, 4, 3, 2)[:3], bias=torch.zeros(6, 6))
    cpu = LayerCall(4, torch.device("cpu"))
    assert (heads.refusal(cpu), heads.refusal(cpu._replace(masked=True))) == (None, why)
    assert (
        heads.refusal(cpu._replace(device=torch.device("cuda")))
        == "on a GPU its heads are at least 16 wide and these are 4"
    )
    assert pointwise(6, 2, "streaming").chosen(cpu) == ("PyTorch", None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"base": "silu"}, "base = 'silu'; it has no base activation"),
        ({"mask": torch.ones(6, 6, dtype=torch.bool)}, "it has no mask"),
    ],
)
def test_what_it_cannot_take_is_named(options, why):
    with pytest.raises(ValueError, match=f"implementation = 'flex' cannot take this call: {why}"):
        fourier_karat_attention(*make_call(1, 2, 6, 4, 3, 2), implementation="flex", **options)


@pytest.mark.parametrize(
    ("width", "dtype", "chosen"),
    [(64, torch.float32, "triton"), (160, torch.float32, "flex"), (160, torch.float64, "streaming")],
)
def test_auto_takes_it_on_a_gpu_where_the_kernels_cannot_run(width, dtype, chosen):
    call = FourierCall(*make_call(1, 1, 4, width, 2, 1).to(dtype))
    assert automatic(call) != "flex"
    with choosing_as_on_a_gpu():
        assert automatic(call) == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU answers")
def test_a_machine_that_cannot_run_it_is_told_in_one_line():
    for psi in (False, True):
        why = flex.problem(64, psi)
        assert why.startswith("FlexAttention does not run on this GPU: ")
        assert "\n" not in why
