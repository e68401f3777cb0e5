"""Streaming of every basis and form against the float64 oracle, on shapes drawn by hypothesis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karat_scale.attention import BASES, routes
from karat_scale.attention.forms import FORMS
from tests.attention.test_forms import Case, assert_agree, make_case, upstream_of

# How fast the functions of a basis vary if G does not say: the slope of what `make_case` draws, divided by its size.
STEEPNESS = {"bspline": 4, "mexican_hat": 4, "morlet": 8, "dog": 4, "meyer": 8, "shannon": 4}
# |b_1 x + ...| has a kink, which moves with the rounding of x.
KINKED = ("rational",)


def settings_of(name: str, grid: int) -> dict[str, object]:
    return {"fourier": {"grid": grid}, "chebyshev": {"grid": grid}, "bspline": {"grid": 4, "range": 2.0}}.get(name, {})


def drawn(name: str, form: str, grid: int, largest: float | None = None, **shape: int) -> Case:
    """Return a case with tensors that float32 holds exactly, and with scores up to `largest`."""
    case = make_case(name, form, **shape, **settings_of(name, grid))
    query, key, *rest = case.tensors
    if largest:
        query *= largest / raw_scores(case).abs().max()
    return case._replace(tensors=tuple(x.float().double() for x in (query, key, *rest)))


def raw_scores(case: Case) -> Tensor:
    query, key = case.tensors[:2]
    return query @ key.mT / query.shape[-1] ** 0.5


def tolerance(case: Case, steepness: float) -> float:
    """Return max(2e-6, 5e-8 G max|A|), where A are the scores that enter a function.

    With two operators, it allows for the larger scores that enter the second one.
    """
    scores = raw_scores(case)
    largest = scores.abs().max().item()
    if case.form == "project_first":
        largest = max(largest, (scores.abs() @ case.tensors[-1].abs()).max().item())
    if case.form == "two_operators":
        rank, tokens = case.tensors[3].shape[-2:] if case.names[0] != "cos_coef" else case.tensors[3].shape[1:3]
        largest *= steepness * max(rank, tokens)
    return max(2e-6, 5e-8 * steepness * largest)


@settings(max_examples=40)
@given(
    name=st.sampled_from([name for name in BASES if name not in KINKED]),
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    tokens=st.integers(24, 72),
    width=st.sampled_from((8, 32, 48, 64, 80, 96)),
    rank=st.integers(2, 20),
    grid=st.integers(1, 16),
    budget=st.sampled_from((1, 2**14, 2**18)),
    seed=st.integers(0, 2**16),
)
def test_float32_matches_the_oracle(name, form, batch, heads, tokens, width, rank, grid, budget, seed):
    shape = {"batch": batch, "heads": heads, "tokens": tokens, "width": width, "rank": rank, "seed": seed}
    case = drawn(name, form, grid, **shape)
    upstream = upstream_of(case).float().double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "workspace_budget", lambda _: budget)
        patch.setattr(routes, "MIN_ROWS", 5)
        actual = case.results(upstream, torch.float32, implementation="streaming")
    expected = case.results(upstream, implementation="reference")
    assert_agree(actual, expected, tolerance(case, STEEPNESS.get(name, grid)))


@pytest.mark.parametrize("form", ["modular", "full_rank"])
@pytest.mark.parametrize("name", BASES)
def test_scores_up_to_sixty_keep_their_phase(name, form):
    case = drawn(name, form, 16, largest=60, batch=1, tokens=50, width=64, rank=12)
    upstream = upstream_of(case).float().double()
    actual = case.results(upstream, torch.float32, implementation="streaming")
    expected = case.results(upstream, implementation="reference")
    assert_agree(actual, expected, 2e-3 if name in KINKED else tolerance(case, STEEPNESS.get(name, 16)))


@pytest.mark.parametrize("form", ["modular", "full_rank"])
@pytest.mark.parametrize("name", BASES)
def test_sixteen_bits_match_the_oracle(name, form):
    case = drawn(name, form, 16, largest=60, batch=1, tokens=50, width=64, rank=12)
    case = case._replace(tensors=tuple(x.bfloat16().double() for x in case.tensors))
    upstream = upstream_of(case).bfloat16().double()
    actual = case.results(upstream, torch.bfloat16, implementation="streaming")
    assert all(x.dtype == torch.bfloat16 for x in actual)
    assert_agree(actual, case.results(upstream, implementation="reference"), 5e-3)


@pytest.mark.parametrize("name", ["fourier", "bspline", "chebyshev"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_full_rank_with_narrow_heads(name, dtype, monkeypatch):
    """Full rank is right on the route of narrow heads, which spreads the values over the keys and forms no row of S."""
    monkeypatch.setattr(routes, "workspace_budget", lambda _: 1)
    monkeypatch.setattr(routes, "MIN_ROWS", 4)
    case = make_case(name, "full_rank", batch=3, tokens=11, width=4)
    case = case._replace(tensors=tuple(x.to(dtype).double() for x in case.tensors))
    upstream = upstream_of(case).to(dtype).double()
    actual = case.results(upstream, dtype, implementation="streaming")
    expected = case.results(upstream, implementation="reference")
    assert_agree(actual, expected, 1e-10 if dtype == torch.float64 else 5e-3)


def test_full_rank_of_an_empty_batch_has_zero_gradients():
    case = make_case("fourier", "full_rank", batch=0, tokens=11, width=4)
    for gradient in case.results(upstream_of(case), implementation="streaming")[4:]:
        assert (gradient == 0).all()
