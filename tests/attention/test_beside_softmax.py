"""Tests of heads beside softmax.

Each part of hybrid heads is what it would be alone. Residual heads start as softmax, and add the learned part in
proportion to the gate.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from karat_scale.attention import HybridHeads, KaratOperator, ResidualHeads


def make(softmax_heads=2):
    torch.manual_seed(0)
    hybrid = HybridHeads(KaratOperator(6, 3, "dog", rank=2), softmax_heads).double()
    return hybrid, [torch.randn(2, 3 + softmax_heads, 6, 4, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("shape", [(6, 6), (5, 6, 1), (2, 5, 6, 6), (1, 1, 1, 6)], ids=str)
def test_each_part_is_what_it_would_be_alone(shape):
    hybrid, inputs = make()
    bias, mask = torch.randn(shape, dtype=torch.float64), torch.rand(shape) > 0.3
    whole = hybrid(*inputs, bias=bias, mask=mask)
    joined = torch.where(mask, bias, -torch.inf).expand(2, 5, 6, 6)
    first = scaled_dot_product_attention(*(x[:, :2] for x in inputs), attn_mask=joined[:, :2])
    every = bias.expand(2, 5, 6, 6)[:, 2:], mask.expand(2, 5, 6, 6)[:, 2:]
    torch.testing.assert_close(whole, torch.cat((first, hybrid.operator(*(x[:, 2:] for x in inputs), *every)), 1))
    learned = hybrid.scores(*inputs[:2], bias=bias, mask=mask)
    torch.testing.assert_close(learned @ inputs[2], whole)


def test_mask_alone_and_nothing():
    hybrid, inputs = make()
    for options in ({}, {"mask": torch.ones(6, dtype=torch.bool).view(1, 6)}):
        torch.testing.assert_close(hybrid.scores(*inputs[:2], **options) @ inputs[2], hybrid(*inputs, **options))


def test_bad_counts_are_named():
    hybrid, inputs = make()
    with pytest.raises(ValueError, match=r"^query has shape \[2, 4, 6, 4\]: expected .* h = 5"):
        hybrid(*(x[:, :4] for x in inputs))
    with pytest.raises(ValueError, match=r"^softmax_heads = 0: expected an integer"):
        HybridHeads(hybrid.operator, 0)


def make_residual(dtype=torch.float64):
    torch.manual_seed(0)
    heads = ResidualHeads(KaratOperator(6, 3, rank=2, dtype=dtype))
    return heads, [torch.randn(2, 3, 6, 4, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 1), (2, 3, 6, 6), (1, 1, 1, 6)], ids=str)
def test_both_parts_have_the_bias_and_the_mask(shape):
    heads, inputs = make_residual()
    torch.nn.init.normal_(heads.gate)
    bias, mask = torch.randn(shape, dtype=torch.float64), torch.rand(shape) > 0.3
    mask[..., -1] = False  # no query sees the last key, or any key if the mask has one column
    joined = torch.where(mask, bias, -torch.inf).expand(2, 3, 6, 6)
    softmax = scaled_dot_product_attention(*inputs, attn_mask=joined)
    learned = heads.operator(*inputs, bias, mask)
    whole = heads(*inputs, bias=bias, mask=mask)
    torch.testing.assert_close(whole, softmax + heads.gate.view(3, 1, 1) * learned)
    torch.testing.assert_close(heads.scores(*inputs[:2], bias=bias, mask=mask) @ inputs[2], whole)


def test_it_starts_as_softmax_to_the_bit():
    heads, inputs = make_residual(torch.float32)
    assert torch.equal(heads(*inputs), scaled_dot_product_attention(*inputs))


def test_the_gate_learns_first_and_the_operator_after_it():
    heads, inputs = make_residual()
    target = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.01)
    losses, seen = [], []
    for _ in range(20):
        loss = (heads(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert (heads.gate.grad != 0).all()
        seen.append(all((p.grad != 0).all() for p in heads.operator.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert seen == [False] + [True] * 19
    assert losses[-1] < 0.9 * losses[0]
