"""The curves of training and a run's card, from its own files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.history import achieved, analyze_training, described, read_history
from karat_scale.commands.analyze.result import NothingToShowError
from karat_scale.commands.analyze.trained_run import TrainedRun


def with_events(run: TrainedRun, path: Path, *events: dict[str, object]) -> TrainedRun:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"half')
    return dataclasses.replace(run, path=path)


def train(step: int, loss: float) -> dict[str, object]:
    return {"event": "train", "step": step, "samples": 8 * step, "loss": loss, "lr": 0.1, "images_per_second": None}


def test_a_resumed_run_keeps_what_it_went_on_from(karat_run: TrainedRun, tmp_path: Path) -> None:
    run = with_events(
        karat_run, tmp_path / "run", train(1, 4.0), train(2, 3.0),
        {"event": "eval", "step": 2, "samples": 16, "top1": 10.0, "top5": 20.0, "loss": 3.0}, train(3, 9.0),
        {"event": "resume", "step": 2}, train(3, 2.0), {"event": "train", "step": None},
    )  # fmt: skip
    history = read_history(run)
    assert [point["loss"] for point in history.train] == [4, 3, 2]
    assert [point["top1"] for point in history.evaluations] == [10]
    assert history.damaged_lines == 1
    result = analyze_training({"run": run})
    assert np.isnan(result.arrays["train0_images_per_second"]).all()
    assert result.notes == ["run: 1 damaged line of metrics.jsonl skipped"]


def test_runs_are_drawn_together(karat_run: TrainedRun, softmax_run: TrainedRun) -> None:
    result = analyze_training({"karat": karat_run, "softmax": softmax_run})
    assert set(result.figures) == {"loss", "accuracy", "lr", "grad_norm", "images_per_second"}
    assert {row[0] for row in result.tables[0].rows} == {"karat", "softmax"}
    assert result.numbers["karat"]["train"] == 16


def test_without_events_there_are_no_curves(karat_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(NothingToShowError, match="no run has logged"):
        analyze_training({"run": dataclasses.replace(karat_run, path=tmp_path)})


def test_the_card_says_what_the_run_achieved(karat_run: TrainedRun) -> None:
    summary = json.loads((karat_run.path / "summary.json").read_text())
    score, facts = achieved(karat_run)
    assert score == f"{summary['last_top1']:.2f} % top-1"
    assert facts["budget"] == "16 steps of 8 images, 2 x 64 images, seed 0"
    assert "images a second on CPU" in facts["speed"]
    assert facts["date"].startswith("20")
    assert "outcome" not in facts
    assert described(karat_run)["weights"].startswith("ema, of step ")
