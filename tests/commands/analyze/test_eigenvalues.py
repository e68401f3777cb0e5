import numpy as np
import pytest

from karat_scale.commands.analyze.curvature import TOLERANCE, Eigenvalue, Vector, largest_eigenvalues

MIXED = [10, -9.5, 1, 0.5, 0.1]
CLUSTERED = [10, 9, -9.8, 8.5, -8]
TWICE = [10, 10, 9.99, 5, 4, *np.linspace(-0.3, 0.3, 200)]
OPPOSITE_AT_THE_END = [10, 7, 5, -4.95, 3, 2, *np.linspace(-0.3, 0.3, 200)]
LONG_TAIL = (20 * np.arange(1, 300) ** -0.2 * np.where(np.arange(299) % 3, 1, -1)).tolist()


def turned(values: list[float]) -> np.ndarray:
    """A symmetric matrix with these eigenvalues, whose eigenvectors are no axes."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))[0]
    return (basis * values) @ basis.T


def solve(matrix: np.ndarray, count: int = 3, products: int = 120, seed: int = 0) -> list[Eigenvalue]:
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
        found = solve(matrix, count, 40 * count, seed)
        assert [one.value for one in found] == pytest.approx(largest, rel=TOLERANCE), seed
        assert all(one.converged for one in found)


def test_out_of_products_is_not_settled() -> None:
    matrix, settled = turned(LONG_TAIL), []
    for products in range(3, 120, 8):
        found = solve(matrix, products=products)
        settled.append([one.converged for one in found])
        for one, value in zip(found, (-20, 20 * 2**-0.2, 20 * 3**-0.2), strict=True):
            assert not one.converged or one.value == pytest.approx(value, rel=TOLERANCE), products
    assert settled[0] == settled[1] == [False] * 3
    assert settled[-1] == [True] * 3


def test_of_few_values_or_none() -> None:
    assert solve(np.zeros((4, 4))) == [Eigenvalue(0, True)] * 3
    assert [one.value for one in solve(np.diag([2.0, -3.0]))] == pytest.approx([-3, 2])
    found = solve(np.diag([5.0, 0, 0, 0]))
    assert [one.value for one in found] == pytest.approx([5, 0, 0], abs=1e-5)


def test_what_is_not_a_number_is_not_settled() -> None:
    found = solve(np.full((4, 4), np.nan))
    assert [(np.isnan(one.value), one.converged) for one in found] == [(True, False)] * 3
