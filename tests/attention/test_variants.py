"""Each variant against its equation in float64, written out whole."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from karat_scale.attention import FourierKaratOperator, ResidualHeads
from karat_scale.attention import variants as rows_module
from karat_scale.attention.bound import START, BoundedHeads
from karat_scale.attention.variants import (
    BiasedSoftmax,
    ContentOperator,
    ScaledSoftmax,
    SmoothOperator,
    StaticHeads,
)

BATCH, HEADS, TOKENS, WIDTH, RANK, GRID, MODES, BOUND = 2, 3, 10, 4, 3, 2, 5, 1.5


def content(dtype):
    return ContentOperator(FourierKaratOperator(TOKENS, HEADS, RANK, GRID, dtype=dtype))


MAKERS = {
    "static": lambda dtype: StaticHeads(TOKENS, HEADS, dtype=dtype),
    "static_softmax": lambda dtype: ResidualHeads(StaticHeads(TOKENS, HEADS, dtype=dtype)),
    "scaled_softmax": lambda dtype: ScaledSoftmax(TOKENS, HEADS, dtype=dtype),
    "softmax_bias": lambda dtype: BiasedSoftmax(TOKENS, HEADS, dtype=dtype),
    "content": content,
    "smooth": lambda dtype: SmoothOperator(TOKENS, HEADS, RANK, GRID, MODES, dtype=dtype),
    "bounded": lambda dtype: BoundedHeads(content(dtype), BOUND),
}


def make(name, dtype=torch.float64):
    """A module away from its start, where a factor of 0 would hide mistakes."""
    torch.manual_seed(1)
    module = MAKERS[name](dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def heads(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BATCH, HEADS, TOKENS, WIDTH, dtype=dtype, generator=generator) for _ in range(3)]


def harmonics(x):
    orders = torch.arange(1, GRID + 1, dtype=x.dtype)
    return (x[..., None] * orders).cos(), (x[..., None] * orders).sin()


def units(scores, cos_coef, sin_coef, keep):
    cos, sin = harmonics(scores)
    both = torch.einsum("bhkqm,hpqm->bhkqp", cos, cos_coef) + torch.einsum("bhkqm,hpqm->bhkqp", sin, sin_coef)
    return (both * keep[..., None]).sum(3)


def expected(name, module, query, key, bias, keep):
    """S [B, h, N, N] by the equation; `keep` is 1 where a pair takes part."""
    scores = query @ key.mT / WIDTH**0.5 + bias
    if name == "bounded":
        tau = BOUND / (1 + (-module.tau_logit).exp())
        scores = tau.view(-1, 1, 1) * cosine_similarity(query[:, :, :, None], key[:, :, None], -1) + bias
        name, module = "content", module.operator
    by_head = {n: p.view(HEADS, *[1] * 2, -1) for n, p in module.named_parameters()}
    if name == "static":
        return (module.matrix * keep).expand(BATCH, -1, -1, -1)
    if name == "static_softmax":
        softmax = scores.masked_fill(keep == 0, -math.inf).softmax(-1)
        return softmax + module.gate.view(-1, 1, 1) * module.operator.matrix * keep
    if name == "scaled_softmax":
        return module.gain.view(-1, 1, 1) * scores.masked_fill(keep == 0, -math.inf).softmax(-1)
    if name == "softmax_bias":
        return (scores + module.position_bias).masked_fill(keep == 0, -math.inf).softmax(-1)
    if name == "content":
        cos, sin = harmonics(scores)
        psi = by_head["psi_constant"][..., 0] + (cos * by_head["psi_cos"]).sum(-1) + (sin * by_head["psi_sin"]).sum(-1)
        inner = module.operator
        return (psi / TOKENS + units(scores, inner.cos_coef, inner.sin_coef, keep) @ inner.proj.mT) * keep
    cos, sin = (torch.einsum("qj,hpjm->hpqm", module.modes, x) for x in (module.cos_modes, module.sin_modes))
    return units(scores, cos, sin, keep) @ (module.modes @ module.proj_modes).mT * keep


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "bias and mask"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_its_equation(name, masked):
    module = make(name)
    query, key, value = heads()
    bias = mask = None
    if masked:
        bias = torch.randn(HEADS, TOKENS, TOKENS, dtype=torch.float64)
        mask = torch.rand(BATCH, 1, TOKENS, TOKENS) > 0.3
        mask[..., 0] = True
    keep = torch.ones(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64) if mask is None else mask.double()
    found = module.scores(query, key, bias, mask)
    wanted = expected(name, module, query, key, 0 if bias is None else bias, keep.expand(-1, HEADS, -1, -1))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(module(query, key, value, bias, mask), wanted @ value)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name):
    module = make(name)
    tensors = [x.requires_grad_() for x in heads()]
    names, own = zip(*module.named_parameters(), strict=True)
    # Others than the module's own: a backward pass that computes rows again must not read those.
    parameters = [(x.detach() + 0.1).requires_grad_() for x in own]

    def attend(query, key, value, *learned):
        return torch.func.functional_call(module, dict(zip(names, learned, strict=True)), (query, key, value))

    assert torch.autograd.gradcheck(attend, (*tensors, *parameters), fast_mode=True)


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
def test_results_have_the_dtype_that_softmax_attention_has(name):
    module = make(name, torch.float32)
    query, key, value = heads(torch.bfloat16)
    assert module(query, key, value).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        wide = module(query.float(), key.float(), value.float())
    assert wide.dtype == torch.bfloat16
    exact = module.double()(*(x.double() for x in (query, key, value)))
    torch.testing.assert_close(wide.double(), exact, rtol=0.05, atol=0.05)


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
        query = query * 0.1  # large scores leave a row of softmax fewer tokens
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


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_batch_gives_an_empty_result(name):
    module = make(name)
    tensors = [x[:0].requires_grad_() for x in heads()]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    output = module(*tensors, bias=mask.double(), mask=mask)
    assert output.shape == (0, HEADS, TOKENS, WIDTH)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.scores(*tensors[:2]).shape == (0, HEADS, TOKENS, TOKENS)
