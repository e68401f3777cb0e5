"""The curves of training and a run's card, from its own files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.history import achieved, analyze_robustness, analyze_training, described, read_history
from karat_scale.commands.analyze.result import NothingToShowError
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from karat_scale.commands.evaluate.predictions import Evaluation, is_complete, keep_evaluation


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
        {"event": "resume", "step": 2}, train(3, 2.0), train(3, 1.5), {"event": "train", "step": None},
    )  # fmt: skip
    history = read_history(run)
    assert [point["loss"] for point in history.train] == [4, 3, 1.5]
    assert [point["top1"] for point in history.evaluations] == [10]
    assert history.damaged_lines == 1
    result = analyze_training({"run": run})
    assert np.isnan(result.arrays["train0_images_per_second"]).all()
    assert result.notes == ["run: 1 damaged line of metrics.jsonl skipped"]


def test_a_start_anew_leaves_nothing_of_the_abandoned_recipe(karat_run: TrainedRun, tmp_path: Path) -> None:
    evaluated = {"event": "eval", "step": 3, "samples": 24, "top1": 90.0, "top5": 99.0, "loss": 1.0}
    begun = {"event": "start", "step": 0, "anew": True}
    events = (begun, train(1, 7.0), train(3, 7.0), evaluated, begun, train(50, 2.0))
    history = read_history(with_events(karat_run, tmp_path / "run", *events))
    assert [point["loss"] for point in history.train] == [2]
    assert history.evaluations == []


def test_runs_are_drawn_together(karat_run: TrainedRun, softmax_run: TrainedRun) -> None:
    result = analyze_training({"karat": karat_run, "softmax": softmax_run})
    assert set(result.figures) == {"loss", "accuracy", "lr", "grad_norm", "images_per_second"}
    assert result.findings == ["No score that training looked at was beyond the functions' reach."]
    softmax = analyze_training({"softmax": softmax_run})
    assert set(softmax.figures) == {"loss", "accuracy", "lr", "grad_norm", "images_per_second"}
    assert {row[0] for row in result.tables[0].rows} == {"karat", "softmax"}
    assert result.numbers["karat"]["train"] == 16


def test_the_card_of_a_run_that_goes_on_is_not_that_of_its_earlier_end(own_run: TrainedRun) -> None:
    for event, budget in (({"event": "start", "step": 16}, "16 steps"), ({**train(17, 1.0), "time": 2e9}, "17 steps")):
        with (own_run.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
        _, facts, _ = achieved(own_run)
        assert facts["outcome"] == "not finished"
        assert facts["budget"].startswith(f"{budget} of 8 images, ")


@pytest.mark.parametrize(("losses", "says"), [((3.0, 1.0, 1.05, 1.2), True), ((3.0, 1.0, 1.05, 1.09), False)])
def test_a_model_that_learns_its_training_images_by_heart_is_told(
    losses: tuple[float, ...], says: bool, karat_run: TrainedRun, tmp_path: Path
) -> None:
    steps = [
        [train(step, 4.0 / step), {"event": "eval", "step": step, "samples": 8 * step, "top1": 50.0, "loss": loss}]
        for step, loss in enumerate(losses, 1)
    ]
    run = with_events(karat_run, tmp_path / "run", *(event for own in steps for event in own))
    findings = analyze_training({"run": run}).findings
    assert (findings[-1:] or [""])[0].startswith(
        "The validation loss was lowest after 16 images (1.00) and is 1.20 at the end, while the training loss went "
        "from 2.00 to 1.00: "
    ) == says


@pytest.mark.parametrize("when", [{}, {"time": 1e300}])
def test_the_card_of_a_log_without_times_has_no_date(when: dict[str, float], own_run: TrainedRun) -> None:
    (own_run.path / "metrics.jsonl").write_text(json.dumps({**train(1, 4.0), **when}) + "\n")
    _, facts, _ = achieved(own_run)
    assert "date" not in facts


def test_what_has_no_curve_is_no_figure(karat_run: TrainedRun, tmp_path: Path) -> None:
    tested = {"event": "eval", "step": 3, "samples": 24, "top1": 10.0, "top5": 100.0, "loss": 3.0}
    first = {**train(1, 4.0), "beyond_reach": 0.0}
    steps = first, {**train(2, 3.0), "beyond_reach": 0.0}, train(3, 2.0)
    one = with_events(karat_run, tmp_path / "one", *steps, tested)
    result = analyze_training({"one": one})
    assert set(result.figures) == {"loss", "lr"}  # no rate, one evaluation
    assert len(result.tables[0].rows) == 1
    assert result.findings == ["No score that training looked at was beyond the functions' reach."]
    beyond = with_events(karat_run, tmp_path / "beyond", *steps, {**train(4, 2.0), "beyond_reach": 0.1})
    assert "beyond_reach" in analyze_training({"one": one, "beyond": beyond}).figures
    alone = with_events(karat_run, tmp_path / "alone", first)
    with pytest.raises(NothingToShowError, match="no run has logged two steps or an evaluation"):
        analyze_training({"alone": alone})
    axes = analyze_training({"alone": alone, "one": one}).figures["loss"][0].axes[0]
    point, curve, mark = axes.lines
    assert (point.get_marker(), len(point.get_xdata()), len(curve.get_xdata())) == (".", 1, 3)
    assert [line.get_label() for line in (point, curve)] == ["alone", "one"]
    assert point.get_linestyle() != curve.get_linestyle() == mark.get_linestyle()  # so equal curves stay visible
    (top1,) = (
        analyze_training({"a": with_events(karat_run, tmp_path / "a", tested, {**tested, "step": 4, "samples": 32})})
        .figures["accuracy"][0]
        .axes[0]
        .lines
    )
    assert top1.get_ydata().tolist() == [10.0, 10.0]  # top-5 is always right


def test_the_card_says_of_which_weights_a_score_is(karat_run: TrainedRun) -> None:
    score, facts, sentence = achieved(open_run(karat_run.path, weights="raw"))
    assert score.endswith(" % top-1 of the ema weights")
    assert " of the ema weights: loss " in facts["evaluation"]
    assert sentence == "In training, other weights were evaluated: ema."


def test_the_card_says_what_the_run_achieved(karat_run: TrainedRun) -> None:
    summary = json.loads((karat_run.path / "summary.json").read_text())
    score, facts, sentence = achieved(karat_run)
    assert score == f"{summary['last_top1']:.2f} % top-1"
    assert facts["budget"] == "16 steps of 8 images, 2 times its 64 training images, seed 0"
    assert sentence.startswith(f"It is right on {summary['last_top1']:.1f} % of 28 test images (95 % ")
    assert "images a second on CPU" in facts["speed"]
    assert facts["date"].startswith("20")
    assert "outcome" not in facts
    assert described(karat_run)["weights"].startswith("ema, of step ")
    evaluations = read_history(karat_run).evaluations
    for shown, other in (evaluations, evaluations[::-1]):
        score, facts, sentence = achieved(open_run(karat_run.path, checkpoint=f"step-{shown['step']:08.0f}"))
        assert score == f"{shown['top1']:.2f} % top-1"
        assert f" images after step {shown['step']:.0f}: loss " in facts["evaluation"]  # no top-5 with four classes
        named = {name: fact for name, fact in facts.items() if name in ("best", "last")}
        assert set(named.values()) <= {f"top-1 {other['top1']:.2f} % after step {other['step']:.0f}"}
        assert ("last" in named) == (other is evaluations[-1])
        assert ("the best of 2" in sentence) == ("best" not in named and "last" in named)


def corrupted(run: TrainedRun, directory: Path, corruptions: dict[str, dict[int, float]]) -> TrainedRun:
    """Return the run in another directory, with what `karat eval --corrupt` would have kept there."""
    directory.mkdir()
    top1 = 50.0 if is_complete(corruptions) else None
    facts = {"source": "", "checkpoint": "step-00000016", "weights": "raw", "date": "2026-11-28 12:00"}
    facts |= {"identity": "", "model": ""}
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


def test_runs_without_events_or_measurements_have_nothing_to_show(karat_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(NothingToShowError, match="karat eval RUN --on DIR"):
        analyze_robustness({"karat": karat_run})
    with pytest.raises(NothingToShowError, match="no run has logged"):
        analyze_training({"run": dataclasses.replace(karat_run, path=tmp_path)})
