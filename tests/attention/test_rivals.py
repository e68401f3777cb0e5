"""Each rival against its equation in float64, written out whole: values and gradients, plain and with bias and mask."""

import math

import pytest
import torch
from timm.layers import DiffAttention

from karat_scale.attention import AttentionHeads
from karat_scale.attention.rivals import (
    Centred,
    DifferentialHeads,
    GatedHeads,
    PolynomialHeads,
    QueryOnly,
    SigmoidHeads,
)

BATCH, HEADS, TOKENS, WIDTH, EMBED, RANK, GRID = 2, 3, 9, 4, 12, 3, 2
MAKERS = {
    "sigmoid": lambda _: SigmoidHeads(TOKENS, HEADS),
    "polynomial": lambda _: PolynomialHeads(TOKENS, HEADS),
    "gated": lambda dtype: GatedHeads(HEADS, EMBED, dtype=dtype),
    "differential": lambda dtype: DifferentialHeads(HEADS, WIDTH, dtype=dtype),
    "query_only": lambda dtype: QueryOnly(TOKENS, HEADS, WIDTH, RANK, GRID, dtype=dtype),
    "centred": lambda dtype: Centred(TOKENS, HEADS, RANK, GRID, dtype=dtype),
}


def make(name, dtype=torch.float64):
    """A module away from its start, where a factor of 1 would hide mistakes."""
    torch.manual_seed(1)
    module = MAKERS[name](dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def inputs(dtype=torch.float64, batch=BATCH):
    """Query, key and value, and the layer's input."""
    generator = torch.Generator().manual_seed(2)
    heads = [torch.randn(batch, HEADS, TOKENS, WIDTH, dtype=dtype, generator=generator) for _ in range(3)]
    return heads, torch.randn(batch, TOKENS, EMBED, dtype=dtype, generator=generator)


def call(module, heads, x, bias=None, mask=None):
    return module(*heads, bias, mask, **({"x": x} if module.sees_input else {}))


def series(x, cos, sin):
    """sum_m cos_m cos(m x) + sin_m sin(m x), for coefficients [..., G]."""
    orders = torch.arange(1, GRID + 1, dtype=x.dtype)
    return (cos * (x[..., None] * orders).cos() + sin * (x[..., None] * orders).sin()).sum(-1)


def matrix_by_equation(name, module, query, key, x, bias, keep):
    """S [B, h, N, N]; `keep` is 1 where a pair takes part."""
    scores = query @ key.mT / WIDTH**0.5 + bias
    if name == "sigmoid":
        return keep / (1 + TOKENS * (-scores).exp())
    if name == "polynomial":
        return keep * scores * scores * scores / TOKENS**0.5
    if name == "gated":
        gates = torch.einsum("bnd,hd->bhn", x, module.gate_weight).sigmoid()
        return gates[..., None] * scores.masked_fill(keep == 0, -math.inf).softmax(-1)
    if name == "differential":
        half = WIDTH // 2
        first, second = (
            (query[..., part] @ key[..., part].mT / half**0.5 + bias).masked_fill(keep == 0, -math.inf).softmax(-1)
            for part in (slice(half), slice(half, WIDTH))
        )
        plus = (module.lambda_q1 * module.lambda_k1).sum(-1).exp()
        minus = (module.lambda_q2 * module.lambda_k2).sum(-1).exp()
        return first - (plus - minus + 0.8).view(-1, 1, 1) * second
    if name == "query_only":
        each = series(query[:, :, :, None], module.query_cos[:, None], module.query_sin[:, None])
        return keep * torch.einsum("bhkpi,hqp->bhkq", each, module.proj)
    own = module.operator
    each = series(scores[..., None, :], own.cos_coef[:, None], own.sin_coef[:, None]) * keep[..., None, :]
    learned = keep * torch.einsum("bhkpq,hjp->bhkj", each, own.proj)
    return keep * (module.left @ module.right.mT + learned - learned.mean(2, keepdim=True))


def by_equation(name, module, heads, x, bias, keep):
    """S, and O [B, h, N, d]."""
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


@pytest.mark.parametrize("name", MAKERS)
def test_dtypes_and_empty_batches_are_those_of_softmax_attention(name):
    module, (heads, x) = make(name, torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = call(module, heads, x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), call(module, heads, x), rtol=0.1, atol=0.1)
    few, of_none = inputs(torch.float32, batch=0)
    output = call(module, [tensor.requires_grad_() for tensor in few], of_none)
    assert output.shape == (0, HEADS, TOKENS, WIDTH)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


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


def test_starts():
    torch.manual_seed(0)
    tokens, many, width = 65, 12, 16
    query, key, value = (torch.randn(4, many, tokens, width) for _ in range(3))
    sums = SigmoidHeads(tokens, many).scores(0.1 * query, key).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0.1, atol=0.1)
    for heads in (QueryOnly(tokens, many, width), Centred(tokens, many)):
        output = heads(query, key, value).detach()
        assert 0.7 < float(output.std() / value.std()) < 1.7
    gated = GatedHeads(many, 192)
    gates = gated.scores(query, key, x=torch.randn(4, tokens, 192)).sum(-1)
    assert float(gates.detach().mean()) == pytest.approx(0.5, abs=0.02)


def test_heads_say_what_their_matrix_is_by_default():
    class Twice(AttentionHeads):
        num_heads = HEADS

        def forward(self, query, key, value, bias=None, mask=None):
            return 2 * torch.nn.functional.scaled_dot_product_attention(query, key, value)

    (query, key, value), _ = inputs()
    torch.testing.assert_close(Twice().scores(query, key) @ value, Twice()(query, key, value))
