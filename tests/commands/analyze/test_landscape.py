import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from karat_scale.commands.analyze import landscape
from karat_scale.commands.analyze.landscape import filter_normalised, loss_grid, plane_of_run, principal_plane
from karat_scale.commands.analyze.result import Result, Settings
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from tests.models.test_attention_matrices import SIZE

QUICK = Settings(grid=3, samples=8)


def analyze_landscape(run: TrainedRun, settings: Settings, directory: Path) -> Result:
    directory.mkdir(exist_ok=True)
    return landscape.analyze_landscape(run, dataclasses.replace(settings, directory=directory))


def test_of_a_real_run(any_run: TrainedRun, tmp_path: Path, monkeypatch) -> None:
    told: list[str] = []
    settings = dataclasses.replace(QUICK, tell=told.append, progress=lambda what, done, total: told.append(what))
    monkeypatch.setattr("karat_scale.commands.analyze.result.WORTH_TELLING", 0.0)
    result = analyze_landscape(any_run, settings, tmp_path)
    assert set(result.figures) == {"path_surface", "optimizer_path", "random_surface"}
    # The middle of the random plane is the last checkpoint itself.
    middle = result.arrays["random_loss"][1, 1]
    assert middle == pytest.approx(result.numbers["random_loss"]["least"], rel=0.5)
    assert result.numbers["path"]["steps"] == [0, 4, 8, 12, 16]
    assert not list(tmp_path.iterdir())
    (cost,) = [line for line in told if "takes about" in line]
    assert "(18 x " in cost  # 3 x 3 points in two planes
    assert told.index(cost) < told.index("landscape, path")


def test_the_axes_follow_the_range(karat_run: TrainedRun, tmp_path: Path) -> None:
    usual, wide = (
        analyze_landscape(karat_run, dataclasses.replace(QUICK, range=reach), tmp_path).arrays for reach in (1, 3)
    )
    np.testing.assert_allclose(usual["random_first"], [-1, 0, 1])
    for axis in ("random_first", "random_second"):
        np.testing.assert_allclose(wide[axis], 3 * usual[axis])
    for i, axis in enumerate(("path_first", "path_second")):
        low, high = usual["path"][:, i].min(), usual["path"][:, i].max()
        np.testing.assert_allclose(usual[axis][[0, -1]], [low - (high - low) / 4, high + (high - low) / 4])
        np.testing.assert_allclose(wide[axis][[0, -1]], [low - (high - low) * 3 / 4, high + (high - low) * 3 / 4])


def test_a_stopped_grid_of_another_range_or_other_data_is_not_resumed(karat_run: TrainedRun, tmp_path: Path) -> None:
    points: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        if what == "landscape, random" and done == 7:
            raise KeyboardInterrupt

    def count(what: str, done: int, total: int) -> None:
        if what == "landscape, random":
            points.append(total)

    shutil.copytree(karat_run.recipe.data.path, tmp_path / "data")
    elsewhere = dataclasses.replace(karat_run, recipe=karat_run.recipe.changed(data__path=str(tmp_path / "data")))
    for run, settings in ((karat_run, dataclasses.replace(QUICK, range=0.5)), (elsewhere, QUICK)):
        with pytest.raises(KeyboardInterrupt):
            analyze_landscape(karat_run, dataclasses.replace(QUICK, progress=stop), tmp_path / "grids")
        assert list((tmp_path / "grids").glob(".landscape-random*"))
        resumed = analyze_landscape(run, dataclasses.replace(settings, progress=count), tmp_path / "grids").arrays
        whole = analyze_landscape(run, settings, tmp_path / "grids").arrays
        np.testing.assert_array_equal(resumed["random_loss"], whole["random_loss"])
        assert not list((tmp_path / "grids").iterdir())
    assert set(points) == {9}


def test_too_few_checkpoints_leave_the_other_figures(own_run: TrainedRun, tmp_path: Path) -> None:
    names = own_run.in_order[1:-1]
    shutil.rmtree(own_run.directory.snapshots)
    for name in names:
        shutil.rmtree(own_run.store.root / name)
    result = analyze_landscape(open_run(own_run.path), QUICK, tmp_path)
    assert set(result.figures) == {"random_surface"}
    assert "PCA of the path needs 3" in result.notes[0]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_takes_its_place(own_run, tmp_path) -> None:
    *_, before, last = own_run.in_order
    (own_run.store.root / last / "state.json").write_text("{}")
    result = analyze_landscape(own_run, QUICK, tmp_path)
    assert result.numbers["checkpoint"] == before
    assert result.numbers["path"]["steps"] == [0, 4, 8, 12]
    assert f"({before})" in result.figures["random_surface"][1]
    (note,) = result.notes
    assert f"{last} cannot be used" in note


def test_a_path_in_a_plane_is_found_with_its_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karat_scale.commands.analyze.landscape.CHUNK", 7)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(100, 2)))[0].T
    path = np.array([[8.0, 0.0], [-8.0, 1.0], [4.0, -2.0], [0.0, 0.0]])
    (path @ basis).astype(np.float32).tofile(tmp_path / "changes")
    plane = principal_plane(tmp_path / "changes", list("abcd"))
    assert plane.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(plane.directions @ plane.directions.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(plane.coordinates @ plane.directions, path @ basis, atol=1e-5)


def test_the_last_checkpoint_of_a_run_is_the_origin(karat_run: TrainedRun) -> None:
    plane = plane_of_run(karat_run, [])
    np.testing.assert_allclose(plane.coordinates[-1], 0, atol=1e-6)
    assert 0.5 < plane.shares.sum() <= 1 + 1e-9
    assert plane.shares[0] >= plane.shares[1] >= 0


class Bowl(nn.Module):
    """A model with the loss 3 x^2 + y^2 / 2 + 1, at its minimum."""

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


class Cliff(Bowl):
    """A bowl with a loss that is not a number."""

    def loss(self) -> float:
        return math.nan * super().loss()


@pytest.mark.parametrize("kind", [Bowl, Cliff])
def test_a_stopped_grid_resumes_at_the_same_row(kind: type[Bowl], tmp_path: Path) -> None:
    bowl, again = kind(), kind()
    with pytest.raises(KeyboardInterrupt):
        compute(bowl, tmp_path / "partial", stop_after=7)
    assert not bowl.point.any()
    np.testing.assert_array_equal(compute(again, tmp_path / "partial"), compute(kind(), tmp_path / "other"))
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


@pytest.mark.parametrize("basis", ["fourier", "chebyshev", "bspline", "rational", "dog"])
def test_random_directions_have_the_norms_of_the_models_filters(basis: str) -> None:
    """In an operator, all functions of one unit are a filter."""
    model = create_model(SIZE, AttentionConfig(kind="karat", basis=basis))
    direction = torch.from_numpy(filter_normalised(model, 0))[0]
    start = 0
    for name, parameter in model.named_parameters():
        part = direction[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
        if parameter.dim() == 1:
            assert not part.any(), name
        elif name == "head.weight":
            torch.testing.assert_close(part.norm(dim=1), parameter.detach().norm(dim=1))
        elif ".operator." in name and not name.endswith(".proj"):
            before_units = parameter.dim() == 4 and basis != "fourier"  # [h, F, p, q], else [h, p, q] or [h, p, q, G]
            ours, models = ((x.movedim(2, 1) if before_units else x).flatten(2) for x in (part, parameter.detach()))
            torch.testing.assert_close(ours.norm(dim=2), models.norm(dim=2))
    assert start == len(direction)
