"""The benchmark of growing images, on a few real shards."""

import json
from pathlib import Path

import pytest

from benchmarks.growing_images import main


@pytest.mark.slow
def test_three_runs_of_each_seed_are_compared(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    small = ("model.num_classes=4", "model.depth=1", "train.global_batch=8")
    options = ("--epochs", "3", "--seeds", "1", "--json", str(figures))
    main([str(shards), str(tmp_path / "work"), *options, *small])
    rows = json.loads(figures.read_text())
    assert list(rows) == ["32 px, 3 epochs", "growing, 3 epochs", "growing, equal time"]
    for (run,) in rows.values():
        assert 0 <= run["top1"] <= 100
        assert run["seconds"] > 0
    assert "top-1 over 1 seeds" in capsys.readouterr().out
