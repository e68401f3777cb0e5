"""Tests of the bases: their values, derivatives and starts."""

import math

import pytest
import torch

from karat_scale.attention import karat_attention, reference
from karat_scale.attention.bases import (
    BASE_ACTIVATIONS,
    BASES,
    BSpline,
    Chebyshev,
    FeatureBasis,
    Fourier,
    basis_of,
    key_of,
    make_basis,
)
from karat_scale.attention.bases.wavelets import SMALLEST_SCALE


class Steps(FeatureBasis):
    """The functions x > knot, with the knots in a tensor."""

    num_features = 2

    def __init__(self, knots):
        self.knots = knots

    def value(self, x):
        return [(x > knot).to(x) for knot in self.knots]

    def derivative(self, x):
        return [torch.zeros_like(x)] * 2


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 7, 16])
def test_fourier_features_and_their_derivative(grid):
    generator = torch.Generator().manual_seed(grid)
    scores = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) * 4
    cos_coef, sin_coef = torch.randn(2, 1, 2, 5, grid, generator=generator, dtype=torch.float64)
    grad_hidden = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    values = torch.empty(2 * grid, *scores.shape, dtype=torch.float64)
    coef = Fourier(grid).pack({"cos_coef": cos_coef, "sin_coef": sin_coef})[0]
    features = Fourier(grid).bind(scores, values)
    features.evaluate()
    hidden = torch.einsum("fbkq,fpq->bkp", values, coef)

    x = scores.clone().requires_grad_()
    phases = x.unsqueeze(-1) * torch.arange(1, grid + 1)
    expected = torch.einsum("bkqm,pqm->bkp", phases.cos(), cos_coef[0])
    expected = expected + torch.einsum("bkqm,pqm->bkp", phases.sin(), sin_coef[0])
    torch.testing.assert_close(hidden, expected.detach(), atol=1e-11, rtol=1e-10)
    (slope,) = torch.autograd.grad(expected, x, grad_hidden)
    torch.testing.assert_close(features.pull_back(grad_hidden.flatten(0, 1), coef), slope, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, base in BASE_ACTIVATIONS.items() if base])
def test_base_activations_vanish_at_zero_and_know_their_derivative(name):
    base = BASE_ACTIVATIONS[name]
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(base.value(x).sum(), x)
    torch.testing.assert_close(base.derivative(x.detach()), slope, atol=1e-12, rtol=1e-10)
    assert base.value(torch.zeros(1)).item() == 0


def hat(t):
    return 2 / (math.pi**0.25 * math.sqrt(3)) * (t**2 - 1) * math.exp(-(t**2) / 2)


def meyer(t):
    def nu(y):
        return y**4 * (35 - 84 * y + 70 * y**2 - 20 * y**3)

    y = abs(t)
    window = 1 if y <= 0.5 else math.cos(math.pi / 2 * nu(2 * y - 1)) if y < 1 else 0
    return math.sin(math.pi * y) * window


# The paper's table, number by number.
MOTHERS = {
    "mexican_hat": hat,
    "morlet": lambda t: math.cos(5 * t) * math.exp(-(t**2) / 2),
    "dog": lambda t: t * math.exp(-(t**2) / 2),
    "meyer": meyer,
    "shannon": lambda t: math.sin(t) / t if t else 1.0,
}
POINTS = [-60.0, -3.2, -1.0, -0.9, -0.5, -0.3, -1e-7, 0.0, 1e-4, 0.2, 0.5, 0.6, 0.70710678, 0.75, 1.0, 2.5, 60.0]


def units_of(basis, parameters, points):
    """Return phi(x) of one function at each point, computed as the reference does."""
    coef = basis.pack(parameters)
    x = torch.tensor(points, dtype=torch.float64).view(1, 1, -1, 1)
    return reference._units(x, torch.ones_like(x), coef, basis).flatten().tolist()


@pytest.mark.parametrize("name", MOTHERS)
@pytest.mark.parametrize("scale", [1.0, -0.7, 0.001])
def test_wavelets_are_the_papers(name, scale):
    basis = make_basis(name)
    numbers = {"weight": 1.7, "translation": 0.3, "scale": scale}
    parameters = {key: torch.full((1, 1, 1), number, dtype=torch.float64) for key, number in numbers.items()}
    kept = math.copysign(max(abs(scale), SMALLEST_SCALE), scale)
    expected = [1.7 * MOTHERS[name]((x - 0.3) / kept) for x in POINTS]
    assert units_of(basis, parameters, POINTS) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", MOTHERS)
def test_wavelets_slopes_are_their_derivatives(name):
    basis = make_basis(name)
    t = torch.tensor([x for x in POINTS if name != "meyer" or x], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(basis.mother(t).sum(), t)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-6)):
        mother, slope = basis.mother_and_slope(t.detach().to(dtype))
        torch.testing.assert_close(mother.double(), basis.mother(t).detach(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(slope.double()[1:-1], expected[1:-1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MOTHERS)
def test_wavelets_of_large_scores_have_a_slope(name):
    wave, slope = make_basis(name).mother_and_slope(torch.tensor([-1e6, -1e5, 1e5, 1e6]))
    assert wave.isfinite().all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", [name for name in BASES if name not in ("fourier", "bspline", "chebyshev")])
def test_an_elementwise_basis_pulls_back_its_derivative(name):
    basis = make_basis(name)
    torch.manual_seed(0)
    x, upstream = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    theta = torch.randn(9 + 1 if name == "rational" else 3, 4, dtype=torch.float64)
    by_x, by_theta = basis.pull_back(x, upstream, theta)
    slope, *parts = basis.derivative(x, *theta)
    torch.testing.assert_close(by_x, slope * upstream)
    torch.testing.assert_close(by_theta, torch.stack([(part * upstream).sum(0) for part in parts]))


def test_shannons_window_is_hammings_over_the_keys():
    basis = make_basis("shannon")
    parameters = {name: torch.ones(1, 2, 9) for name in ("weight", "translation", "scale")}
    window = [0.54 - 0.46 * math.cos(2 * math.pi * q / 8) for q in range(9)]
    assert basis.pack(parameters)[0, 0, 1].tolist() == pytest.approx(window, abs=1e-6)


@pytest.mark.parametrize("orders", [(5, 4), (1, 1), (2, 5)])
def test_rational_is_the_safe_pade_approximant(orders):
    m, n = orders
    torch.manual_seed(0)
    a, b = torch.randn(m + 1).double(), torch.randn(n).double()
    parameters = {"numerator": a.view(1, -1, 1, 1), "denominator": b.view(1, -1, 1, 1)}

    def phi(x):
        above = sum(a[i].item() * x**i for i in range(m + 1))
        return above / (1 + abs(sum(b[j].item() * x ** (j + 1) for j in range(n))))

    actual = units_of(make_basis("rational", orders=orders), parameters, POINTS)
    assert actual == pytest.approx([phi(x) for x in POINTS], rel=1e-12)


def cox_de_boor(x, i, degree, knots):
    if degree == 0:
        return 1.0 if knots[i] <= x < knots[i + 1] else 0.0
    left = (x - knots[i]) / (knots[i + degree] - knots[i])
    right = (knots[i + degree + 1] - x) / (knots[i + degree + 1] - knots[i + 1])
    lower = (cox_de_boor(x, i, degree - 1, knots), cox_de_boor(x, i + 1, degree - 1, knots))
    return left * lower[0] + right * lower[1]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("grid", "extent"), [(1, 1.0), (3, 3.0), (5, 2.0)])
def test_splines_are_cox_and_de_boors(degree, grid, extent):
    basis = BSpline(grid, degree, extent)
    step = 2 * extent / grid
    knots = [-extent + (i - degree) * step for i in range(grid + 2 * degree + 1)]
    points = [-60.0, -3.1, -1.23, -0.2, 0.05, 0.9, 1.7, 2.99, 60.0]
    base, *splines = basis.value(torch.tensor(points, dtype=torch.float64))
    assert base.tolist() == pytest.approx([x / (1 + math.exp(-x)) for x in points])
    expected = [[cox_de_boor(x, i, degree, knots) for x in points] for i in range(grid + degree)]
    assert len(splines) == grid + degree
    for actual, wanted in zip(splines, expected, strict=True):
        assert actual.tolist() == pytest.approx(wanted, abs=1e-12)
    inside = torch.linspace(-extent, extent, 21, dtype=torch.float64)
    torch.testing.assert_close(sum(basis.value(inside)[1:]), torch.ones_like(inside))


def test_splines_are_weighted_with_their_base():
    parameters = {"weight": torch.full((1, 1, 1), 2.0), "coef": torch.arange(1.0, 7.0).view(1, 6, 1, 1)}
    assert BSpline(3, 3).pack(parameters).flatten().tolist() == [2.0, *(2.0 * i for i in range(1, 7))]


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_chebyshev_is_a_cosine_of_multiples(grid):
    points = torch.tensor([-2.0, -0.3, 0.0, 0.4, 1.9], dtype=torch.float64)
    for n, term in enumerate(Chebyshev(grid).value(points), start=1):
        torch.testing.assert_close(term, torch.cos(n * torch.acos(torch.tanh(points))))


@pytest.mark.parametrize("basis", [BSpline(4, 3, 2.0), BSpline(3, 2), Chebyshev(5), Fourier(3)], ids=str)
def test_features_know_their_derivative(basis):
    x = torch.linspace(-4, 4, 77, dtype=torch.float64, requires_grad=True)
    for value, slope in zip(basis.value(x), basis.derivative(x.detach()), strict=True):
        (expected,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        torch.testing.assert_close(slope, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scheme", ["paper", "variance_preserving"])
def test_starts(name, scheme):
    torch.manual_seed(0)
    basis = make_basis(name)
    parameters = {key: torch.empty(shape) for key, shape in basis.shapes(2, 12, 100).items()}
    basis.initialise(parameters, scheme)
    if "translation" in parameters:
        assert (parameters["translation"] == 0).all()
        assert (parameters["scale"] == 1).all()
    if scheme == "paper":
        first = next(iter(parameters.values()))
        assert first.std().item() == pytest.approx(1, rel=0.1)
        return
    scores = torch.randn(8, 2, 50, 100)
    hidden = reference._units(scores, torch.ones_like(scores), basis.pack(parameters), basis)
    assert hidden.std().item() == pytest.approx(1, rel=0.2)


def test_a_basis_is_known_by_its_settings():
    assert key_of(make_basis("bspline", grid=4)) == key_of(BSpline(4)) != key_of(BSpline(5))
    assert basis_of(key_of(BSpline(5))) == BSpline(5)
    near = [Steps(torch.tensor([at, 0.5])) for at in (0.10001, 0.10004)]
    assert [basis_of(key_of(basis)) for basis in near] == near


def test_a_class_that_is_defined_again_is_another_basis():
    """A class may have the same name and settings but other functions, as when a notebook's cell runs again."""
    knots = torch.tensor([0.0, 0.5])
    again = type("Steps", (Steps,), {"value": lambda self, x: [3 * f for f in Steps.value(self, x)]})
    again.__module__, again.__qualname__ = Steps.__module__, Steps.__qualname__
    query, key, value = (torch.randn(1, 1, 5, 4) for _ in range(3))
    parameters, proj = {"coef": torch.randn(1, 2, 3, 5)}, torch.randn(1, 5, 3)
    for basis in (Steps(knots), again(knots), Steps(knots)):
        outputs = [
            karat_attention(query, key, value, basis, parameters, proj, implementation=how)
            for how in ("streaming", "reference")
        ]
        torch.testing.assert_close(*outputs)
