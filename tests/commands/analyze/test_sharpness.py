import dataclasses

import numpy as np
import pytest
import torch

from karat_scale.commands.analyze.landscape import (
    TOLERANCE,
    Hessian,
    Vector,
    analyze_sharpness,
    largest_eigenvalues,
)
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from tests.models.test_attention_matrices import SIZE

QUICK = Settings(hessian_samples=4, eigenvalues=1)


def test_of_a_real_run(any_run: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("karat_scale.commands.analyze.result.WORTH_TELLING", 0.0)
    settings = dataclasses.replace(QUICK, tell=told.append, progress=lambda what, done, total: told.append(what))
    result = analyze_sharpness(any_run, settings)
    # After so few steps the direction of largest curvature may bend downwards.
    assert abs(result.numbers["top_eigenvalues"][0]) > 0
    assert result.numbers["images"] == 4
    (cost,) = [line for line in told if "takes about" in line]
    assert "(48 x " in cost


def test_the_chosen_checkpoint_is_analysed(karat_run: TrainedRun) -> None:
    names = karat_run.store.names()[:2]
    found = [analyze_sharpness(dataclasses.replace(karat_run, checkpoint=name, weights="raw"), QUICK) for name in names]
    assert [result.numbers["checkpoint"] for result in found] == names
    assert found[0].numbers["trace"] != found[1].numbers["trace"]
    assert found[0].tables[-1].title.endswith(f"{names[0]} (raw weights)")


def test_eigenvalues_and_trace_of_a_quadratic_bowl() -> None:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([50.0, -20.0, 7.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    matrix = turn @ values.diag() @ turn.mT
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def losses():
        both = torch.cat((x, y))
        yield both @ matrix @ both / 4
        yield both @ matrix @ both / 4

    hessian = Hessian([x, y], losses)
    found, converged = hessian.top_eigenvalues(3, 120, 0)
    assert found == pytest.approx([50, -20, 7], rel=1e-4)
    assert converged
    assert not hessian.top_eigenvalues(1, 2, 0)[1]
    trace, error = hessian.trace(400, 0)
    assert trace == pytest.approx(values.sum().item(), abs=4 * error)
    assert error < 5


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig(kind="karat", implementation="reference")])
def test_products_are_differences_of_gradients(attention: AttentionConfig) -> None:
    torch.manual_seed(0)
    model = create_model(SIZE, attention).double().eval()
    images, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images), labels)

    vectors = [torch.randn_like(p) for p in parameters]
    product = Hessian(parameters, lambda: [loss()]).times(vectors)

    def gradient(step: float) -> list[torch.Tensor]:
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=step)
        grads = torch.autograd.grad(loss(), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, vectors, alpha=-step)
        return list(grads)

    for exact, high, low in zip(product, gradient(1e-6), gradient(-1e-6), strict=True):
        torch.testing.assert_close(exact, (high - low) / 2e-6, rtol=1e-4, atol=1e-5)


MIXED = [10, -9.5, 1, 0.5, 0.1]
CLUSTERED = [10, 9, -9.8, 8.5, -8]
TWICE = [10, 10, 9.99, 5, 4, *np.linspace(-0.3, 0.3, 200)]
OPPOSITE_AT_THE_END = [10, 7, 5, -4.95, 3, 2, *np.linspace(-0.3, 0.3, 200)]
LONG_TAIL = (20 * np.arange(1, 300) ** -0.2 * np.where(np.arange(299) % 3, 1, -1)).tolist()


def turned(values: list[float]) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues and with eigenvectors that are not axes."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


def solve(matrix: np.ndarray, count: int = 3, products: int = 120, seed: int = 0) -> tuple[list[float], bool]:
    left = [products]

    def times(vector: Vector) -> Vector:
        left[0] -= 1
        assert left[0] >= 0
        return (matrix @ vector).astype(np.float32)

    return largest_eigenvalues(times, len(matrix), count, products, seed)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("values", [MIXED, CLUSTERED, TWICE, OPPOSITE_AT_THE_END, LONG_TAIL])
def test_of_both_signs_and_close_together(values: list[float], count: int) -> None:
    matrix, largest = turned(values), sorted(values, key=lambda value: -abs(value))[:count]
    for seed in range(5):
        assert solve(matrix, count, 40 * count, seed) == (pytest.approx(largest, rel=TOLERANCE), True), seed


def test_out_of_products_is_not_settled() -> None:
    matrix, settled = turned(LONG_TAIL), []
    for products in range(3, 120, 8):
        found, converged = solve(matrix, products=products)
        settled.append(converged)
        if converged:
            assert found == pytest.approx([-20, 20 * 2**-0.2, 20 * 3**-0.2], rel=TOLERANCE), products
    assert settled[:2] == [False, False]
    assert settled[-1]


def test_of_few_values_or_none() -> None:
    assert solve(np.zeros((4, 4))) == ([0, 0, 0], True)
    assert solve(np.diag([2.0, -3.0]))[0] == pytest.approx([-3, 2])
    assert solve(np.diag([5.0, 0, 0, 0]))[0] == pytest.approx([5, 0, 0], abs=1e-5)


def test_what_is_not_a_number_is_not_settled() -> None:
    found, converged = solve(np.full((4, 4), np.nan))
    assert np.isnan(found).tolist() == [True] * 3
    assert not converged
