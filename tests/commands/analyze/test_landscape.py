import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze import landscape
from karat_scale.commands.analyze.result import Result, Settings
from karat_scale.commands.analyze.trained_run import TrainedRun

QUICK = Settings(grid=3, samples=8)


def analyze_landscape(run: TrainedRun, settings: Settings, directory: Path) -> Result:
    return landscape.analyze_landscape(run, dataclasses.replace(settings, directory=directory))


def test_of_a_real_run(any_run: TrainedRun, tmp_path: Path) -> None:
    result = analyze_landscape(any_run, QUICK, tmp_path)
    assert set(result.figures) == {"path_surface", "optimizer_path", "random_surface"}
    # The middle of the random plane is the last checkpoint itself.
    middle = result.arrays["random_loss"][1, 1]
    assert middle == pytest.approx(result.numbers["random_loss"]["least"], rel=0.5)
    assert result.numbers["path"]["steps"] == [0, 4, 8, 12, 16]
    assert not list(tmp_path.iterdir())


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


def test_a_stopped_grid_of_another_range_is_not_resumed(karat_run: TrainedRun, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "landscape, random" and done == 7:
            raise KeyboardInterrupt

    narrow = dataclasses.replace(QUICK, range=0.5)
    with pytest.raises(KeyboardInterrupt):
        analyze_landscape(karat_run, dataclasses.replace(narrow, progress=stop, range=1.0), tmp_path)
    assert list(tmp_path.glob(".landscape-random*"))
    resumed = analyze_landscape(karat_run, narrow, tmp_path).arrays
    whole = analyze_landscape(karat_run, narrow, tmp_path).arrays
    np.testing.assert_array_equal(resumed["random_loss"], whole["random_loss"])
    assert not list(tmp_path.iterdir())


def test_too_few_checkpoints_leave_the_other_figures(karat_run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    for name in karat_run.in_order[1:-1]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    result = analyze_landscape(dataclasses.replace(karat_run, path=tmp_path / "run"), QUICK, tmp_path)
    assert set(result.figures) == {"random_surface"}
    assert "PCA of the path needs 3" in result.notes[0]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_takes_its_place(
    karat_run: TrainedRun, tmp_path: Path
) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    *_, before, last = karat_run.in_order
    (tmp_path / "run" / "checkpoints" / last / "state.json").write_text("{}")
    result = analyze_landscape(dataclasses.replace(karat_run, path=tmp_path / "run"), QUICK, tmp_path)
    assert result.numbers["checkpoint"] == before
    assert result.numbers["path"]["steps"] == [0, 4, 8, 12]
    assert f"({before})" in result.figures["random_surface"][1]
    (note,) = result.notes
    assert f"{last} is damaged" in note


def test_losses_of_other_data_are_not_taken_over(karat_run: TrainedRun, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "landscape, path" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze_landscape(karat_run, dataclasses.replace(QUICK, progress=stop), tmp_path)
    assert list(tmp_path.glob(".landscape-path*"))
    elsewhere = tmp_path / "data"
    shutil.copytree(karat_run.recipe.data.path, elsewhere)
    other = dataclasses.replace(
        karat_run,
        recipe=karat_run.recipe.model_copy(
            update={"data": karat_run.recipe.data.model_copy(update={"path": str(elsewhere)})}
        ),
    )
    points: list[int] = []

    def count(what: str, done: int, total: int) -> None:
        if what == "landscape, path":
            points.append(total)

    analyze_landscape(other, dataclasses.replace(QUICK, progress=count), tmp_path)
    assert set(points) == {9}


def test_its_cost_is_told_before_it_starts(
    karat_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    settings = dataclasses.replace(QUICK, tell=told.append, progress=lambda what, done, total: told.append(what))
    monkeypatch.setattr("karat_scale.commands.analyze.result.WORTH_TELLING", 0.0)
    analyze_landscape(karat_run, settings, tmp_path)
    (cost,) = [line for line in told if "takes at most about" in line]
    assert "(18 x " in cost  # 3 x 3 points in two planes
    assert told.index(cost) < told.index("landscape, path")
