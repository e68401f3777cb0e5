import numpy as np
import pytest
import torch

from karat_scale.attention import KaratOperator
from karat_scale.attention.bases import Fourier
from karat_scale.commands.analyze.matrices import (
    SoftmaxFit,
    Spectrum,
    analyze_content,
    analyze_spectrum,
    can_fit,
    effective_rank,
    scree_rank,
    stable_rank,
)
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun


@pytest.mark.parametrize("k", [1, 3, 10])
def test_k_equal_singular_values_have_rank_k_by_every_measure(k: int) -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(k)))[0]
    values = torch.linalg.svdvals(basis[:, :k] @ basis[:k])
    for rank in (effective_rank, stable_rank, scree_rank):
        assert rank(values).item() == pytest.approx(k, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([9.0, 8.0, 7.0, 0.6, 0.5, 0.4, 0.3, 0.2], 3),
        ([1.0, 0.02, 0.01, 0.005], 1),
        ([4.0, 3.0, 2.0, 1.0], 4),
        ([2.0, 2.0, 2.0], 3),
        ([0.0, 0.0, 0.0], 0),
    ],
)
def test_the_scree_rank_counts_what_is_before_the_elbow(values: list[float], rank: int) -> None:
    assert scree_rank(torch.tensor(values)) == rank


def test_extremes_and_means_are_those_of_all_matrices_whatever_the_batches() -> None:
    matrices = torch.randn(6, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum(1, 9)
    for part in matrices.split(4):
        spectrum.add(0, part, 10 * part)
    values = torch.linalg.svdvals(matrices.flatten(0, 1)).double().numpy()
    low, mean, high = (found[0] for found in spectrum.logs())
    np.testing.assert_allclose(
        [low[0], mean[0], high[0]], np.log([values.min(0), values.mean(0), values.max(0)]), atol=1e-5
    )
    np.testing.assert_allclose(mean[1], np.log(10 * values.mean(0)), atol=1e-5)


def test_of_a_real_run(any_run: TrainedRun) -> None:
    settings = Settings(images=6, batch=4)
    spectrum, content = analyze_spectrum(any_run, settings), analyze_content(any_run, settings)
    assert spectrum.numbers["images"] == content.numbers["images"] == 6
    assert spectrum.arrays["ln_mean"].shape == (2, 2, 17)
    assert set(spectrum.figures) == {"last_block", "ranks"}
    assert len(content.numbers["blocks"]) == 2
    for block in content.numbers["blocks"]:
        assert 0 <= block["by_query"] <= 1
        assert block["frobenius_norm"] > 0


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
