"""Accuracy, calibration and the choice of pictures, against figures counted by hand and on a real run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from karat_scale.commands.analyze.predictions import (
    FILE,
    analyze_accuracy,
    analyze_calibration,
    analyze_mistakes,
    class_figures,
    confusion,
    most_telling,
    reliability,
)
from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun, open_run
from karat_scale.commands.evaluate.predictions import Predictions, read_predictions, write_predictions
from karat_scale.data.shards.shard_format import read_dataset_record
from tests.conftest import CLASSES, VAL_PER_CLASS


def predictions_from(rows: list[tuple[int, int, float]]) -> Predictions:
    """Return predictions made of rows of (label, predicted, probability)."""
    labels, predicted, chances = (np.array(column) for column in zip(*rows, strict=True))
    losses = np.where(labels == predicted, -np.log(chances), 3.0).astype(np.float32)
    tops = predicted[:, None], chances.astype(np.float32)[:, None]
    return Predictions(np.arange(len(rows)) + 10, labels, *tops, losses, 0, ("a", "b", "c"), "x")


SOME = predictions_from([(0, 0, 0.9), (0, 1, 0.8), (0, 1, 0.6), (1, 1, 0.5), (1, 1, 0.4), (1, 0, 0.95)])


def test_confusion_and_classes() -> None:
    matrix = confusion(SOME)
    assert matrix.tolist() == [[1, 2, 0], [1, 2, 0], [0, 0, 0]]
    assert class_figures(SOME, matrix) == [
        ["a", 3, pytest.approx(100 / 3), 50, "b (2)"],
        ["b", 3, pytest.approx(200 / 3), 50, "a (1)"],
        ["c", 0, None, None, ""],
    ]


def test_the_calibration_error_is_the_mean_gap() -> None:
    found = reliability(predictions_from([(0, 0, 0.95)] * 3 + [(0, 1, 0.95)] + [(0, 0, 0.55)] * 4), bins=10)
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0, 4]
    assert found.error == pytest.approx(0.5 * 0.45 + 0.5 * 0.2, abs=1e-6)
    assert found.largest_gap == pytest.approx(0.45, abs=1e-6)
    edges = reliability(predictions_from([(0, 0, 1.0), (0, 0, 0.5)]), bins=2)
    assert edges.counts.tolist() == [1, 1]  # a bin includes its upper edge


def test_mistakes_come_most_confident_first_and_hits_least_certain_first() -> None:
    assert SOME.ids[most_telling(SOME, hits=False)].tolist() == [15, 11, 12]
    assert SOME.ids[most_telling(SOME, hits=True, count=2)].tolist() == [14, 13]


def test_predictions_are_kept_whole_or_not_read(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    write_predictions(file, SOME)
    again = read_predictions(file, "x")
    assert again is not None
    np.testing.assert_array_equal(again.top_probabilities, SOME.top_probabilities)
    assert again.classes == SOME.classes
    assert read_predictions(file, "y") is None
    file.write_bytes(file.read_bytes()[:-100])
    assert read_predictions(file, "x") is None
    assert read_predictions(tmp_path / "none", "x") is None


def test_a_real_run_is_predicted_once_as_karat_eval_scores_it(own_run: TrainedRun, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("karat_scale.commands.analyze.result.WORTH_TELLING", 0.0)
    settings = Settings(tell=told.append, progress=lambda what, done, total: told.append(f"{done}/{total}"))
    result = analyze_accuracy(own_run, settings)
    assert told[0].startswith("predicting the validation split takes about ")
    assert told[1:] == ["1/4", "2/4", "3/4", "4/4"]
    events = [json.loads(line) for line in (own_run.path / "metrics.jsonl").read_text().splitlines()]
    best = max((event for event in events if event["event"] == "eval"), key=lambda event: event["top1"])
    assert result.numbers["images"] == CLASSES * VAL_PER_CLASS
    assert result.numbers["top1"] == pytest.approx(best["top1"])
    assert result.numbers["loss"] == pytest.approx(best["loss"], rel=1e-4)
    assert result.arrays["confusion"].sum() == CLASSES * VAL_PER_CLASS
    written = (own_run.path / FILE).stat().st_mtime_ns
    again = open_run(own_run.path)
    shown = analyze_mistakes(again, Settings())
    calibration = analyze_calibration(again, Settings())
    assert calibration.numbers["accuracy"] == pytest.approx(best["top1"] / 100)
    sure = f"{100 * calibration.numbers['mean_confidence']:.1f} %"
    (finding,) = calibration.findings
    assert finding.startswith(f"The mean probability of an answer is {sure}, and {best['top1']:.1f} % are right: ")
    assert finding.endswith((": that fits.", f"may be chance, as these are only {CLASSES * VAL_PER_CLASS} images."))
    hardest = min(result.numbers["classes"], key=lambda one: one["accuracy"])
    assert result.findings == [
        f"The hardest class is {hardest['class']}: {hardest['accuracy']:.1f} % of its {VAL_PER_CLASS} images are "
        f"right, and it is most often taken for {hardest['taken_for']}."
    ]
    assert (own_run.path / FILE).stat().st_mtime_ns == written
    tiles = [tile for gallery in shown.galleries.values() for tile in gallery]
    assert len(tiles) == len(shown.numbers["mistakes"]) + len(shown.numbers["close_calls"]) > 0
    assert all(tile.png.startswith(b"\x89PNG") for tile in tiles)
    assert not shown.notes


def test_other_data_at_the_same_path_are_predicted_again(
    own_run: TrainedRun, image_folder: Path, shards: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    recipe = own_run.recipe.changed(data__backend="folder", data__path=str(data))
    before = analyze_accuracy(TrainedRun(own_run.path, recipe), Settings()).numbers
    first, second, *_ = sorted((data / "val").iterdir())
    for old, new in ((first, data / "between"), (second, first), (data / "between", second)):
        old.rename(new)
    assert analyze_accuracy(TrainedRun(own_run.path, recipe), Settings()).numbers != before
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    recipe = own_run.recipe.changed(data__path=str(copy))
    digest = TrainedRun(own_run.path, recipe).data_digest
    assert digest == own_run.data_digest
    record = read_dataset_record(copy)
    (copy / "dataset.json").write_text(record.model_copy(update={"classes": record.classes[::-1]}).model_dump_json())
    assert TrainedRun(own_run.path, recipe).data_digest != digest


def test_without_the_data_what_was_kept_is_still_shown(own_run: TrainedRun, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "data")
    recipe = own_run.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(shards), str(tmp_path / "data")))
    before = analyze_accuracy(open_run(own_run.path), Settings())
    shutil.rmtree(tmp_path / "data")
    run = open_run(own_run.path)
    assert analyze_accuracy(run, Settings()).numbers == before.numbers
    result = analyze_mistakes(run, Settings())
    assert not result.galleries
    assert any(note.startswith("no pictures: ") and str(tmp_path / "data") in note for note in result.notes)
