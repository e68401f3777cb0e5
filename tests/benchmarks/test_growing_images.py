"""The benchmark of growing images, on a few real shards."""

import json
from pathlib import Path

import pytest

from benchmarks.growing_images import main


@pytest.mark.slow
def test_three_runs_of_each_seed_are_compared(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    small = ("model.num_classes=4", "model.depth=1", "train.global_batch=8")
    options = ("--epochs", "3", "--seeds", "1", "--rounds", "3", "--json", str(figures))
    main([str(shards), str(tmp_path / "work"), *options, *small])
    found = json.loads(figures.read_text())
    assert list(found["top1"]) == ["32 px", "growing, as many images", "growing, as long"]
    assert all(0 <= run <= 100 for (run,) in found["top1"].values())
    assert found["step_costs"]["32"] == 1
    assert found["epochs"]["growing, as long"] >= 3
    assert "top-1 over 1 seeds" in capsys.readouterr().out
