"""Detectors are compared by box AP, and never with classifiers."""

import json
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.compare.finished import MEASURES
from tests.commands.compare.conftest import Copy
from tests.conftest import karat_done, summary

pytest.importorskip("pycocotools", reason="the extra `detection` is not installed")

from karat_scale.training.tasks.classification.task import TrainState
from karat_scale.training.tasks.detection.task import DetectionState
from tests.training.tasks.detection.conftest import coco_set, write_small

__all__ = ["coco_set"]


def test_the_score_that_chooses_the_best_evaluation_is_titled_the_best() -> None:
    for state in (TrainState, DetectionState):
        titles = {name: MEASURES[f"best_{name}"].title for name in state.scores}
        assert [name for name, title in titles.items() if title.startswith("best ")] == [state.scores[0]]


@pytest.mark.slow
def test_detectors_are_compared_by_box_ap(coco_set: Path, copy: Copy, tmp_path: Path, capsys) -> None:
    recipe = write_small(tmp_path / "small.yaml", coco_set)
    for seed in (0, 1):
        karat_done("detect", str(recipe), f"run.seed={seed}", f"run.dir={tmp_path / str(seed)}", "train.epochs=1")
    runs, file = [str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "all.json"
    assert main(["compare", *runs, "--json", str(file), "--out", str(tmp_path / "out")]) == 0
    said = json.loads(file.read_text())
    (group,) = said["groups"]
    assert said["measure"] == "last_box_ap"
    assert [run["last_box_ap"] for run in group["runs"]] == [summary(Path(run))["last_box_ap"] for run in runs]
    assert "mask AP" in capsys.readouterr().out
    assert main(["compare", runs[0], str(copy("classifier"))]) == 2
    assert "one of karat detect; compare them apart" in capsys.readouterr().err
