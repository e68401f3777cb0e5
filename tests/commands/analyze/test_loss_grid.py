from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from karat_scale.commands.analyze.landscape import filter_normalised, loss_grid
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from tests.models.test_attention_matrices import SIZE


class Bowl(nn.Module):
    """loss = 3 x^2 + y^2 / 2 + 1, at its minimum."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2))
        self.calls = 0

    def loss(self) -> float:
        self.calls += 1
        x, y = self.point.tolist()
        return 3 * x * x + y * y / 2 + 1


FIRST, SECOND = np.linspace(-1, 1, 5), np.linspace(-2, 2, 3)


def compute(bowl: Bowl, partial: Path, identity: str = "bowl", stop_after: int | None = None) -> np.ndarray:
    def progress(done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    directions = np.eye(2, dtype=np.float32)
    return loss_grid(bowl, bowl.loss, directions, FIRST, SECOND, partial, identity, progress)


def test_a_quadratic_bowl(tmp_path: Path) -> None:
    bowl = Bowl()
    losses = compute(bowl, tmp_path / "partial")
    np.testing.assert_allclose(losses, 3 * FIRST**2 + SECOND[:, None] ** 2 / 2 + 1, rtol=1e-6)
    assert not bowl.point.any()
    assert not list(tmp_path.iterdir())


def test_a_stopped_grid_resumes_at_the_same_row(tmp_path: Path) -> None:
    bowl = Bowl()
    with pytest.raises(KeyboardInterrupt):
        compute(bowl, tmp_path / "partial", stop_after=7)
    assert not bowl.point.any()
    again = Bowl()
    np.testing.assert_array_equal(compute(again, tmp_path / "partial"), compute(Bowl(), tmp_path / "other"))
    assert again.calls == 10


def test_what_several_ranks_wrote_down_is_used_by_one(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        compute(Bowl(), partial, stop_after=11)
    with np.load(tmp_path / "partial-0.npz") as content:
        known = dict(content)
    assert known["done"].sum() == 10
    for rank in (0, 3):
        mine = known["done"].copy()
        mine.flat[rank::2] = False
        losses = np.where(mine, known["losses"], np.nan)
        np.savez(tmp_path / f"partial-{rank}.npz", key=known["key"], losses=losses, done=mine)
    again = Bowl()
    np.testing.assert_array_equal(compute(again, partial), compute(Bowl(), tmp_path / "other"))
    assert again.calls == 5
    assert not list(tmp_path.iterdir())


def test_points_that_are_not_a_number_are_not_computed_again(tmp_path: Path) -> None:
    class Cliff(Bowl):
        def loss(self) -> float:
            super().loss()
            return float("nan")

    with pytest.raises(KeyboardInterrupt):
        compute(Cliff(), tmp_path / "partial", stop_after=7)
    again = Cliff()
    assert np.isnan(compute(again, tmp_path / "partial")).all()
    assert again.calls == 10


def test_another_models_partial_grid_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compute(Bowl(), tmp_path / "partial", stop_after=7)
    bowl = Bowl()
    compute(bowl, tmp_path / "partial", identity="another checkpoint")
    assert bowl.calls == 15


def test_random_directions_have_the_norms_of_the_models_filters() -> None:
    model = create_model(SIZE, AttentionConfig(kind="karat"))
    directions = torch.from_numpy(filter_normalised(model, 0))
    start = 0
    for name, parameter in model.named_parameters():
        part = directions[0, start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        if parameter.dim() == 1:
            assert not part.any(), name
        elif name == "blocks.0.attn.operator.cos_coef":
            torch.testing.assert_close(part.flatten(2).norm(dim=2), parameter.detach().flatten(2).norm(dim=2))
        elif name == "head.weight":
            torch.testing.assert_close(part.norm(dim=1), parameter.detach().norm(dim=1))
    assert start == directions.shape[1]


@pytest.mark.parametrize("basis", ["fourier", "chebyshev", "bspline", "rational", "dog"])
def test_a_filter_of_an_operator_is_all_functions_of_one_unit(basis: str) -> None:
    model = create_model(SIZE, AttentionConfig(kind="karat", basis=basis))
    direction = torch.from_numpy(filter_normalised(model, 0))[0]
    start = 0
    for name, parameter in model.named_parameters():
        part = direction[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        if ".operator." in name and not name.endswith(".proj"):
            before_units = parameter.dim() == 4 and basis != "fourier"  # [h, F, p, q], else [h, p, q] or [h, p, q, G]
            ours, models = ((x.movedim(2, 1) if before_units else x).flatten(2) for x in (part, parameter.detach()))
            torch.testing.assert_close(ours.norm(dim=2), models.norm(dim=2))


def test_random_directions_are_nearly_orthogonal() -> None:
    directions = filter_normalised(create_model(SIZE, AttentionConfig(kind="karat")), 0)
    assert abs(np.corrcoef(directions)[0, 1]) < 0.1
