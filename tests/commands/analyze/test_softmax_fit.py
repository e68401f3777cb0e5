import pytest
import torch

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import Fourier
from karat_scale.commands.analyze.matrices import SoftmaxFit, can_fit

TOKENS = 6


def rows() -> torch.Tensor:
    return torch.randn(500, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def fit_of(operator: KaratOperator) -> SoftmaxFit:
    fit = SoftmaxFit(operator, 0)
    for part in rows().split(200):
        fit.add(part)
    return fit


@torch.no_grad()
def test_an_operator_given_the_best_fit_is_at_distance_zero() -> None:
    operator = KaratOperator(TOKENS, 1, Fourier(2), form="full_rank").double()
    theta = fit_of(operator).best().unflatten(0, (4, TOKENS)).transpose(1, 2)
    operator.cos_coef[0] = -2 * theta[:2].permute(1, 2, 0)
    operator.sin_coef[0] = -2 * theta[2:].permute(1, 2, 0)
    distance = fit_of(operator).distance()
    assert distance.to_fit < 1e-6
    assert distance.fit_error == pytest.approx(distance.to_softmax, rel=1e-3)


def test_the_fit_is_least_squares_on_the_rows() -> None:
    operator = KaratOperator(TOKENS, 1, Fourier(3), form="full_rank").double()
    features = torch.cat(Fourier(3).value(rows()), 1)
    solved = torch.linalg.lstsq(features, rows().softmax(-1)).solution
    error = (features @ solved - rows().softmax(-1)).norm() / rows().softmax(-1).norm()
    assert fit_of(operator).distance().fit_error == pytest.approx(error.item(), rel=1e-4)


def test_the_learned_matrix_is_the_operators_and_rank_costs_accuracy() -> None:
    torch.manual_seed(0)
    errors = []
    for rank in (1, 3, TOKENS):
        operator = KaratOperator(TOKENS, 1, Fourier(3), rank=rank).double()
        fit = fit_of(operator)
        errors.append(fit.distance().fit_error)
        assert torch.linalg.matrix_rank(fit.best()) <= rank
    assert errors[0] > errors[1] > errors[2]
    query = torch.randn(1, 1, TOKENS, 3, dtype=torch.float64)
    raw = (query @ query.mT / 3**0.5)[0, 0]
    expected = operator.scores(query, query)[0, 0]
    torch.testing.assert_close(torch.cat(Fourier(3).value(raw), 1) @ fit.learned(), expected)


def test_what_is_not_linear_in_features_has_no_fit() -> None:
    assert can_fit(KaratOperator(TOKENS, 1))
    assert not can_fit(KaratOperator(TOKENS, 1, "morlet"))
    assert not can_fit(KaratOperator(TOKENS, 1, form="project_first"))
    assert not can_fit(KaratOperator(TOKENS, 1, base="silu"))
