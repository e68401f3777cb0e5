import dataclasses
from pathlib import Path

import pytest

from karat_scale.commands.analyze.history import analyze_robustness
from karat_scale.commands.analyze.result import NothingToShowError
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.evaluate.predictions import Evaluation, is_complete, keep_evaluation


def corrupted(run: TrainedRun, directory: Path, corruptions: dict[str, dict[int, float]]) -> TrainedRun:
    """Return the run in another directory, with what `karat eval --corrupt` would have kept there."""
    directory.mkdir()
    top1 = 50.0 if is_complete(corruptions) else None
    facts = {"source": "", "checkpoint": "step-00000016", "weights": "raw", "identity": "", "date": "2026-11-28 12:00"}
    keep_evaluation(
        directory,
        Evaluation(name="val-corrupted", images=9, among=3, classes=3, top1=top1, corruptions=corruptions, **facts),
    )
    return dataclasses.replace(run, path=directory)


def test_means_are_over_the_corruptions_that_all_runs_have(karat_run: TrainedRun, tmp_path: Path) -> None:
    more = corrupted(karat_run, tmp_path / "more", {"fog": {1: 60.0, 2: 40.0}, "snow": {1: 20.0}})
    less = corrupted(karat_run, tmp_path / "less", {"fog": {1: 50.0}})
    result = analyze_robustness({"more": more, "less": less})
    axes = result.figures["severities_val-corrupted"][0].axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1, 60]], [[1, 50]]]
    bars = result.figures["corruptions_val-corrupted"][0].axes[0].patches
    assert [bar.get_height() for bar in bars] == [60, 50]
    # The tables have everything, and no mean of a part stands beside a mean of all.
    assert [row[2] for row in result.tables[0].rows] == [None, None]
    assert result.tables[1].rows == [["fog", 60.0, 40.0, None, None, None], ["snow", 20.0, None, None, None, None]]
    assert "less on val-corrupted: top-1 50.00 %, mean of 1 kinds and severities of 75" in result.notes[1]


def test_runs_without_a_corruption_in_common_have_no_figure(karat_run: TrainedRun, tmp_path: Path) -> None:
    fog = corrupted(karat_run, tmp_path / "fog", {"fog": {1: 60.0}})
    snow = corrupted(karat_run, tmp_path / "snow", {"snow": {1: 20.0}})
    result = analyze_robustness({"fog": fog, "snow": snow})
    assert not result.figures
    assert len(result.tables) == 3


def test_runs_that_were_not_measured_have_nothing_to_show(karat_run: TrainedRun) -> None:
    with pytest.raises(NothingToShowError, match="karat eval RUN --on DIR"):
        analyze_robustness({"karat": karat_run})
