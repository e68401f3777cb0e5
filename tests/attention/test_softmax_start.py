"""The start near softmax, against softmax itself, on the scores of an untrained ViT."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from karat_scale.attention import KaratOperator
from karat_scale.attention.softmax import REACH, fourier_fits, smooth_modes
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import watched
from karat_scale.recipe import AttentionConfig, ModelConfig


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("grid", "error"), [(1, 0.1), (3, 1e-4), (16, 1e-12)])
def test_the_series_fit_what_they_should(grid, error):
    cos, sin, one = fourier_fits(grid)
    x = torch.linspace(-REACH, REACH, 77, dtype=torch.float64).unsqueeze(1)
    phases = x * torch.arange(1, grid + 1)
    difference = phases.cos() @ cos + phases.sin() @ sin - x[:, 0].exp()
    assert (difference - difference.mean()).abs().max() < error
    assert (phases.cos() @ one - 1).abs().max() < error
    assert torch.stack((cos, sin, one)).abs().max() < 5


def test_rank_one_is_the_mean_of_all_values():
    operator = KaratOperator(17, 2, rank=1, init="softmax_like")
    assert torch.equal(operator.proj, torch.full((2, 17, 1), 1 / 17))


@pytest.mark.parametrize(("tokens", "count"), [(197, 11), (65, 64), (49, 23), (201, 11), (7, 3), (2, 1), (1, 0)])
def test_modes_are_orthonormal_and_sum_to_zero(tokens, count):
    modes = smooth_modes(tokens, count)
    torch.testing.assert_close(modes.mT @ modes, torch.eye(count, dtype=torch.float64))
    torch.testing.assert_close(modes.sum(0), torch.zeros(count, dtype=torch.float64))
    if tokens == 201:  # each register token has a mode
        assert modes[:5].unique(dim=0).shape == (5, 11)


@pytest.mark.parametrize("tokens", [65, 201])
def test_modes_do_not_depend_on_the_linear_algebra_library(tokens, monkeypatch):
    modes, qr = smooth_modes(tokens, 15), torch.linalg.qr

    def other_signs(columns):
        orthonormal, triangular = qr(columns)
        return -orthonormal, -triangular

    monkeypatch.setattr(torch.linalg, "qr", other_signs)
    assert torch.equal(smooth_modes(tokens, 15), modes)


@pytest.mark.parametrize(("form", "rank"), [("modular", 12), ("modular", 65), ("full_rank", 12)])
def test_a_vit_starts_with_softmax_as_far_as_its_rank_goes(form, rank):
    """At rank N or full rank it starts as softmax, at a lower rank as softmax projected onto the modes.

    The error is of second order in A.
    """
    torch.manual_seed(0)
    size = ModelConfig(name="vit_tiny_patch16_224", image_size=32, patch_size=4, num_classes=10, depth=2)
    model = create_model(size, AttentionConfig(kind="karat", form=form, rank=rank, init="softmax_like")).double()
    modes = smooth_modes(65, rank - 1) if form == "modular" else smooth_modes(65, 64)
    errors, spreads = [], []

    def visit(_, scores, learned):
        centred = scores.softmax(-1) - 1 / 65
        errors.append(relative(learned - 1 / 65, centred @ modes @ modes.mT))
        spreads.append(float(scores.std()))
        assert float(scores.abs().max()) < REACH

    with watched(model, visit), torch.no_grad():
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    assert len(errors) == 2
    assert max(errors) < 0.02  # relative to softmax without its constant, which is nearly all of it
    assert 0.05 < min(spreads) < max(spreads) < 0.1


def test_it_learns_softmax_no_worse_than_it_began():
    """The start is no dead end: every parameter gets a gradient, the loss falls, and heads become different."""
    torch.manual_seed(0)
    operator = KaratOperator(17, 2, init="softmax_like")
    inputs = [torch.randn(4, 2, 17, 8) for _ in range(3)]
    target = scaled_dot_product_attention(*inputs)
    optimizer = torch.optim.AdamW(operator.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = (operator(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all((p.grad != 0).all() for p in operator.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.linalg.matrix_rank(operator.proj[0]) == 12
    assert not torch.allclose(operator.proj[0], operator.proj[1], atol=1e-3)


def test_what_cannot_start_so_is_refused():
    for settings in ({"basis": "chebyshev"}, {"form": "two_operators"}, {"base": "silu"}):
        with pytest.raises(ValueError, match=r"^init = 'softmax_like' needs the Fourier basis, form = 'modular' or"):
            KaratOperator(9, 2, init="softmax_like", **settings)
    with pytest.raises(ValueError, match=r"^rank = 12 is more than N = 9 tokens"):
        KaratOperator(9, 2, init="softmax_like")
