import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.landscape import plane_of_run, principal_plane
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError


def test_a_path_in_a_plane_is_found_with_its_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("karat_scale.commands.analyze.landscape.CHUNK", 7)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(100, 2)))[0].T
    path = np.array([[8.0, 0.0], [-8.0, 1.0], [4.0, -2.0], [0.0, 0.0]])
    plane = principal_plane((path @ basis).astype(np.float32), list("abcd"))
    assert plane.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(plane.directions @ plane.directions.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(plane.coordinates @ plane.directions, path @ basis, atol=1e-5)


def test_the_last_checkpoint_of_a_run_is_the_origin(karat_run: TrainedRun) -> None:
    plane = plane_of_run(karat_run, [])
    np.testing.assert_allclose(plane.coordinates[-1], 0, atol=1e-6)
    assert 0.5 < plane.shares.sum() <= 1 + 1e-9
    assert plane.shares[0] >= plane.shares[1] >= 0


def test_too_few_checkpoints(karat_run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    for name in karat_run.in_order[1:-1]:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    with pytest.raises(RunDirectoryError, match=r"2 checkpoints and snapshots, but PCA of the path needs 3"):
        plane_of_run(dataclasses.replace(karat_run, path=tmp_path / "run"), [])


def test_a_damaged_checkpoint_is_named_and_left_out(karat_run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(karat_run.path, tmp_path / "run")
    (tmp_path / "run" / "snapshots" / karat_run.in_order[0]).write_bytes(b"torn")
    notes: list[str] = []
    plane = plane_of_run(dataclasses.replace(karat_run, path=tmp_path / "run"), notes)
    assert plane.names == karat_run.in_order[1:]
    assert len(plane.coordinates) == 4
    assert len(notes) == 1
    assert f"{karat_run.in_order[0]}: not a whole file of karat export" in notes[0]
