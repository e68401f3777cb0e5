import math

import numpy as np
import pytest
import torch

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import BASES, make_basis
from karat_scale.commands.analyze.functions import ScoreHistogram, energy_per_frequency, unit_curves


@torch.no_grad()
def planted() -> KaratOperator:
    operator = KaratOperator(5, 2, rank=3)
    operator.cos_coef.zero_()
    operator.sin_coef.zero_()
    operator.cos_coef[1, 2, 4, 1] = 3.0
    operator.sin_coef[1, 0, 0, 0] = 1.0
    return operator


def test_a_planted_cosine_is_drawn_as_that_cosine() -> None:
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    curves = unit_curves(planted(), 1, x)
    torch.testing.assert_close(curves[:, 2, 4], 3 * torch.cos(2 * x))
    torch.testing.assert_close(curves[:, 0, 0], torch.sin(x))
    assert curves.abs().sum((0,)).count_nonzero() == 2
    assert not unit_curves(planted(), 0, x).any()


def test_a_planted_cosine_has_its_share_of_energy() -> None:
    np.testing.assert_allclose(energy_per_frequency(planted())[1], [0.1, 0.9, 0.0])
    assert energy_per_frequency(KaratOperator(5, 2, "chebyshev")) is None


@pytest.mark.parametrize("name", sorted(BASES))
@pytest.mark.parametrize("base", ["zero", "silu"])
def test_curves_summed_over_keys_are_the_operators_own_hidden_rows(name: str, base: str) -> None:
    """With W the identity, S[k, p] = sum_q phi_pq(A[k, q]); here all scores of a row are equal."""
    torch.manual_seed(0)
    operator = KaratOperator(4, 1, make_basis(name), rank=4, base=base).double()
    with torch.no_grad():
        operator.proj.copy_(torch.eye(4).expand(1, 4, 4))
    query = torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 4, 1)
    learned = operator.scores(query, torch.ones_like(query))[0, 0]
    torch.testing.assert_close(unit_curves(operator, 0, query.flatten()).sum(-1), learned)


def test_the_histogram_counts_every_score_and_spans_most() -> None:
    histogram = ScoreHistogram(1, 2)
    scores = torch.randn(3, 2, 50, 50, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0, 0] = 500.0
    for part in scores.split(2):
        histogram.add(0, part)
    assert histogram.counts.sum(-1).tolist() == [[7500, 7500]]
    low, high = histogram.span(0, 1)
    assert -4 < low < -2.5
    assert 2.5 < high < 4
    assert not math.isinf(histogram.span(0, 0)[1])
