"""The projection onto the simplex: what it is, and its derivative."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.attention import call


@given(width=st.integers(1, 40), spread=st.sampled_from((1e-3, 1.0, 30.0)), seed=st.integers(0, 2**16))
def test_it_is_the_nearest_point_of_the_simplex(width, spread, seed):
    rows = spread * torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    nearest = call.project(rows)
    assert (nearest >= 0).all()
    torch.testing.assert_close(nearest.sum(-1), torch.ones(5, dtype=torch.float64))
    # The set is convex, so no corner lies at an acute angle to the line from the nearest point to the row.
    to_corners = torch.eye(width, dtype=torch.float64) - nearest.unsqueeze(1)
    assert ((rows - nearest).unsqueeze(1) * to_corners).sum(-1).max() < 1e-9 * spread


def test_equal_entries_share_and_a_cut_entry_takes_no_part():
    torch.testing.assert_close(call.project(torch.full((2, 4), 7.0)), torch.full((2, 4), 0.25))
    keep = torch.tensor([[True, True, False, False], [False] * 4])
    expected = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(call.project(torch.tensor([[1.0, 1.0, 9.0, 9.0]] * 2), keep), expected)


def test_what_is_lost_is_not_hidden():
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor([[nan, 1.0, 2.0], [inf, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert call.project(rows).isnan().any(-1).tolist() == [True, True, False]
    keep = torch.tensor([False, True, True])
    assert call.project(rows, keep).isfinite().all()


def test_the_written_derivative_is_autograds():
    rows = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(call.project, rows)
    upstream = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = call.project(rows)
    (expected,) = torch.autograd.grad(projected, rows, upstream)
    torch.testing.assert_close(call.pull_back(projected.detach(), upstream), expected)
