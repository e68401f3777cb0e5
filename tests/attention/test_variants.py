"""Tests of each variant and rival against its equation in float64.

Values and gradients are compared, without and with a bias and a mask.
"""

import math

import pytest
import torch
from timm.layers import DiffAttention
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from karat_scale.attention import AttentionHeads, FourierKaratOperator, ResidualHeads
from karat_scale.attention import variants as rows_module
from karat_scale.attention.bound import START, BoundedHeads
from karat_scale.attention.rivals import (
    Centred,
    DifferentialHeads,
    GatedHeads,
    PolynomialHeads,
    QueryOnly,
    SigmoidHeads,
)
from karat_scale.attention.variants import BiasedSoftmax, ContentOperator, ScaledSoftmax, SmoothOperator, StaticHeads

BATCH, HEADS, TOKENS, WIDTH, EMBED, RANK, GRID, MODES, BOUND = 2, 3, 10, 4, 12, 3, 2, 5, 1.5


def content(dtype):
    return ContentOperator(FourierKaratOperator(TOKENS, HEADS, RANK, GRID, dtype=dtype))


VARIANTS = {
    "static": lambda dtype: StaticHeads(TOKENS, HEADS, dtype=dtype),
    "static_softmax": lambda dtype: ResidualHeads(StaticHeads(TOKENS, HEADS, dtype=dtype)),
    "scaled_softmax": lambda dtype: ScaledSoftmax(TOKENS, HEADS, dtype=dtype),
    "softmax_bias": lambda dtype: BiasedSoftmax(TOKENS, HEADS, dtype=dtype),
    "content": content,
    "smooth": lambda dtype: SmoothOperator(TOKENS, HEADS, RANK, GRID, MODES, dtype=dtype),
    "bounded": lambda dtype: BoundedHeads(content(dtype), BOUND),
}
RIVALS = {
    "sigmoid": lambda _: SigmoidHeads(TOKENS, HEADS),
    "polynomial": lambda _: PolynomialHeads(TOKENS, HEADS),
    "gated": lambda dtype: GatedHeads(HEADS, EMBED, dtype=dtype),
    "differential": lambda dtype: DifferentialHeads(HEADS, WIDTH, dtype=dtype),
    "query_only": lambda dtype: QueryOnly(TOKENS, HEADS, WIDTH, RANK, GRID, dtype=dtype),
    "centred": lambda dtype: Centred(TOKENS, HEADS, RANK, GRID, dtype=dtype),
}
MAKERS = {**VARIANTS, **RIVALS}


def make(name, dtype=torch.float64):
    """Return a module with parameters away from their start, where a factor of 0 or 1 would hide mistakes."""
    torch.manual_seed(1)
    module = MAKERS[name](dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def inputs(dtype=torch.float64, batch=BATCH):
    """Return query, key and value, and the layer's input."""
    generator = torch.Generator().manual_seed(2)
    heads = [torch.randn(batch, HEADS, TOKENS, WIDTH, dtype=dtype, generator=generator) for _ in range(3)]
    return heads, torch.randn(batch, TOKENS, EMBED, dtype=dtype, generator=generator)


def heads(dtype=torch.float64):
    return inputs(dtype)[0]


def call(module, heads, x, bias=None, mask=None):
    return module(*heads, bias, mask, **({"x": x} if module.sees_input else {}))


def series(x, cos, sin):
    """Return sum_m cos_m cos(m x) + sin_m sin(m x) for coefficients [..., G]."""
    orders = torch.arange(1, GRID + 1, dtype=x.dtype)
    return (cos * (x[..., None] * orders).cos() + sin * (x[..., None] * orders).sin()).sum(-1)


def units(scores, cos_coef, sin_coef, keep):
    """Return H [B, h, N, r], the sums over the keys of functions [h, p, q, G] of the scores."""
    each = series(scores[..., None, :], cos_coef[:, None], sin_coef[:, None])
    return (each * keep[..., None, :]).sum(-1)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("kind", [SigmoidHeads, PolynomialHeads])
def test_a_tracer_records_a_large_matrix_for_any_batch(kind, implementation):
    heads = kind(300, 2, implementation)
    dynamic = ({0: torch.export.Dim("batch")},) * 3
    program = torch.export.export(heads, tuple(torch.randn(3, 2, 2, 300, 4)), dynamic_shapes=dynamic)
    query, key, value = torch.randn(3, 5, 2, 300, 4)
    expected = kind(300, 2)(query, key, value)
    torch.testing.assert_close(program.module()(query, key, value), expected)
    traced = torch.jit.trace(heads, tuple(torch.randn(3, 2, 2, 300, 4)))
    torch.testing.assert_close(traced(query, key, value), expected)


def matrix_by_equation(name, module, query, key, x, bias, keep):
    """Return S [B, h, N, N]; `keep` is 1 where a pair takes part."""
    scores = query @ key.mT / WIDTH**0.5 + bias
    if name == "bounded":
        tau = BOUND / (1 + (-module.tau_logit).exp())
        scores = tau.view(-1, 1, 1) * cosine_similarity(query[:, :, :, None], key[:, :, None], -1) + bias
        name, module = "content", module.operator

    def softmax(scores):
        return scores.masked_fill(keep == 0, -math.inf).softmax(-1)

    def learned(own):
        return units(scores, own.cos_coef, own.sin_coef, keep) @ own.proj.mT

    if name == "static":
        return (module.matrix * keep).expand(BATCH, -1, -1, -1)
    if name == "static_softmax":
        return softmax(scores) + module.gate.view(-1, 1, 1) * module.operator.matrix * keep
    if name == "scaled_softmax":
        return module.gain.view(-1, 1, 1) * softmax(scores)
    if name == "softmax_bias":
        return softmax(scores + module.position_bias)
    if name == "content":
        cos, sin = (coef.view(HEADS, 1, 1, GRID) for coef in (module.psi_cos, module.psi_sin))
        psi = module.psi_constant.view(HEADS, 1, 1) + series(scores, cos, sin)
        return (psi / TOKENS + learned(module.operator)) * keep
    if name == "smooth":
        cos, sin = (torch.einsum("qj,hpjm->hpqm", module.modes, x) for x in (module.cos_modes, module.sin_modes))
        return units(scores, cos, sin, keep) @ (module.modes @ module.proj_modes).mT * keep
    if name == "sigmoid":
        return keep / (1 + TOKENS * (-scores).exp())
    if name == "polynomial":
        return keep * scores * scores * scores / TOKENS**0.5
    if name == "gated":
        gates = torch.einsum("bnd,hd->bhn", x, module.gate_weight).sigmoid()
        return gates[..., None] * softmax(scores)
    if name == "differential":
        half = WIDTH // 2
        first, second = (
            softmax(query[..., part] @ key[..., part].mT / half**0.5 + bias)
            for part in (slice(half), slice(half, WIDTH))
        )
        plus = (module.lambda_q1 * module.lambda_k1).sum(-1).exp()
        minus = (module.lambda_q2 * module.lambda_k2).sum(-1).exp()
        return first - (plus - minus + 0.8).view(-1, 1, 1) * second
    if name == "query_only":
        each = series(query[:, :, :, None], module.query_cos[:, None], module.query_sin[:, None])
        return keep * torch.einsum("bhkpi,hqp->bhkq", each, module.proj)
    found = keep * learned(module.operator)
    return keep * (module.left @ module.right.mT + found - found.mean(2, keepdim=True))


def by_equation(name, module, heads, x, bias, keep):
    """Return S, and O [B, h, N, d]."""
    matrix = matrix_by_equation(name, module, *heads[:2], x, bias, keep)
    output = matrix @ heads[2]
    if name == "differential":
        scale = (output.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        output = 0.2 * module.norm_weight[:, None] * output / scale
    return matrix, output


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "bias and mask"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_its_equation(name, masked):
    module, (heads, x) = make(name), inputs()
    bias = mask = None
    if masked:
        bias = torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
        mask = torch.rand(BATCH, 1, TOKENS, TOKENS) > 0.3
        mask[..., 0] = True
    keep = torch.ones(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64) if mask is None else mask.double()
    keep = keep.expand(-1, HEADS, -1, -1)
    learned = [*heads, x, *module.parameters(), *([bias] if masked else [])]
    for tensor in learned:
        tensor.requires_grad_()
    matrix, wanted = by_equation(name, module, heads, x, bias if masked else 0, keep)
    found = call(module, heads, x, bias, mask)
    torch.testing.assert_close(found, wanted)
    more = {"x": x} if module.sees_input else {}
    torch.testing.assert_close(module.scores(*heads[:2], bias, mask, **more), matrix)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    gradients = [
        torch.autograd.grad((output * weights).sum(), learned, allow_unused=True) for output in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(*(zero if g is None or not g.any() else g for g in (ours, theirs)))


def test_gradients_are_those_of_the_parameters_that_were_given():
    """A backward pass that computes rows again must not read the module's own parameters."""
    module = make("content")
    names, own = zip(*module.named_parameters(), strict=True)
    parameters = [(x.detach() + 0.1).requires_grad_() for x in own]

    def attend(query, key, value, *learned):
        return torch.func.functional_call(module, dict(zip(names, learned, strict=True)), (query, key, value))

    assert torch.autograd.gradcheck(attend, (*(x.requires_grad_() for x in heads()), *parameters), fast_mode=True)


def test_tiles_make_no_difference(monkeypatch):
    module = make("content")
    results = []
    for budget in (2**24, 1):
        monkeypatch.setattr(rows_module, "workspace_budget", lambda _, budget=budget: budget)
        monkeypatch.setattr("karat_scale.attention.routes.MIN_ROWS", 3)
        tensors = [x.requires_grad_() for x in heads()]
        bias = torch.linspace(-1, 1, BATCH * TOKENS * TOKENS, dtype=torch.float64).view(BATCH, 1, TOKENS, TOKENS)
        output = module(*tensors, bias=bias, mask=bias < 0.9)
        grads = torch.autograd.grad(output.sin().sum(), [*tensors, *module.parameters()])
        results.append((output, *grads))
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("name", MAKERS)
def test_dtypes_and_empty_batches_are_those_of_softmax_attention(name):
    module, (given, x) = make(name, torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = call(module, given, x)
    assert narrow.dtype == torch.bfloat16
    tolerance = 0.05 if name in VARIANTS else 0.1
    torch.testing.assert_close(narrow.float(), call(module, given, x), rtol=tolerance, atol=tolerance)
    few, of_none = inputs(torch.float32, batch=0)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    for options in ({}, {"bias": mask.float(), "mask": mask}):
        output = call(module, [tensor.requires_grad_() for tensor in few], of_none, **options)
        assert output.shape == (0, HEADS, TOKENS, WIDTH)
        output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    if name in VARIANTS:
        assert module(*heads(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["content", "smooth", "bounded"])
def test_autocast_does_not_round_what_is_learned(name):
    module = make(name, torch.float32)
    grads = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(*heads(torch.float32))
        # The gradient of the result is a power of two, which 16 bits hold.
        grads.append(torch.autograd.grad(output.float().sum(), list(module.parameters())))
    for narrow, wide in zip(*grads[::-1], strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)


def test_those_that_start_as_softmax_do():
    inputs = heads(torch.float32)
    softmax = scaled_dot_product_attention(*inputs)
    assert torch.equal(ResidualHeads(StaticHeads(TOKENS, HEADS))(*inputs), softmax)
    torch.testing.assert_close(BiasedSoftmax(TOKENS, HEADS)(*inputs), softmax)
    small = [inputs[0] * 0.05, inputs[1] * 0.05, inputs[2]]
    near = content(torch.float32)(*small)
    torch.testing.assert_close(near, scaled_dot_product_attention(*small), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["static", "scaled_softmax", "smooth"])
def test_others_start_with_the_variance_of_the_values(name):
    torch.manual_seed(0)
    tokens, many = 65, 12
    makers = {
        "static": lambda: StaticHeads(tokens, many),
        "scaled_softmax": lambda: ScaledSoftmax(tokens, many),
        "smooth": lambda: SmoothOperator(tokens, many, 12, modes=16),
    }
    query, key, value = (torch.randn(4, many, tokens, 16) for _ in range(3))
    if name == "scaled_softmax":
        query = query * 0.1  # with large scores, few tokens have weight in a row of softmax
    output = makers[name]()(query, key, value)
    assert 0.6 < float(output.detach().std() / value.std()) < 1.5


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e3])
def test_no_score_passes_the_bound_whatever_the_query_and_what_tau_has_learned(size):
    module = BoundedHeads(FourierKaratOperator(TOKENS, HEADS, RANK, GRID), BOUND)
    torch.nn.init.constant_(module.tau_logit, 50.0)
    query, key, value = (x.float().requires_grad_() for x in heads())
    q, k = module.bounded(query * size, key * size)
    assert float((q @ k.mT / WIDTH**0.5).detach().abs().max()) <= BOUND * (1 + 1e-6)
    module(query * size, key * size, value).sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key))


def test_tau_starts_within_any_bound():
    for bound in (0.1, BOUND, 100.0):
        module = BoundedHeads(FourierKaratOperator(TOKENS, HEADS, RANK, GRID), bound)
        torch.testing.assert_close(bound * module.tau_logit.sigmoid(), torch.full((HEADS,), min(START, 0.9 * bound)))


def test_smooth_needs_as_many_tokens_as_modes():
    with pytest.raises(ValueError, match="modes = 11 is more than N = 10 tokens"):
        SmoothOperator(TOKENS, HEADS, modes=11)


def test_the_score_of_a_masked_pair_may_be_infinite():
    module = make("content")
    mask = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[2] = False  # a query that sees nothing
    results = []
    for masked in (0.0, torch.inf, -torch.inf):
        tensors = [x.requires_grad_() for x in heads()]
        bias = torch.full((TOKENS, TOKENS), masked, dtype=torch.float64).masked_fill(mask, 0.5).requires_grad_()
        output = module(*tensors, bias=bias, mask=mask)
        grads = torch.autograd.grad(output.sin().sum(), [*tensors, bias, *module.parameters()])
        results.append((output, module.scores(*tensors[:2], bias, mask), *grads))
    for found in results[1:]:
        for finite, infinite in zip(results[0], found, strict=True):
            torch.testing.assert_close(infinite, finite)


def test_differential_attention_is_timms_at_one_lambda():
    torch.manual_seed(0)
    layer = DiffAttention(HEADS * WIDTH, HEADS, depth=10**6).double()  # where timm's lambda starts at 0.8
    ours = DifferentialHeads(HEADS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.sub_norm.weight.uniform_()
        ours.norm_weight.copy_(layer.sub_norm.weight.expand(HEADS, -1))
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(ours, name).copy_(getattr(layer, name).expand(HEADS, -1))
    x = torch.randn(BATCH, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    heads = layer.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(layer.proj(ours(*heads).transpose(1, 2).flatten(2)), layer(x))
    with pytest.raises(ValueError, match="kind = differential needs heads of an even width, not 3"):
        DifferentialHeads(HEADS, 3)


def test_rivals_starts():
    torch.manual_seed(0)
    tokens, many, width = 65, 12, 16
    query, key, value = (torch.randn(4, many, tokens, width) for _ in range(3))
    sums = SigmoidHeads(tokens, many).scores(0.1 * query, key).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0.1, atol=0.1)
    for rival in (QueryOnly(tokens, many, width), Centred(tokens, many)):
        output = rival(query, key, value).detach()
        assert 0.7 < float(output.std() / value.std()) < 1.7
    gated = GatedHeads(many, 192)
    gates = gated.scores(query, key, x=torch.randn(4, tokens, 192)).sum(-1)
    assert float(gates.detach().mean()) == pytest.approx(0.5, abs=0.02)


def test_heads_say_what_their_matrix_is_by_default():
    class Twice(AttentionHeads):
        num_heads = HEADS

        def forward(self, query, key, value, bias=None, mask=None):
            return 2 * torch.nn.functional.scaled_dot_product_attention(query, key, value)

    query, key, value = heads()
    torch.testing.assert_close(Twice().scores(query, key) @ value, Twice()(query, key, value))
