"""`python -m paper` takes in runs of `karat detect`, which can be rows of Table 12."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import events, karat_says, summary
from tests.paper.runs import change, copy_run, pretend, rows
from tests.training.tasks.detection.conftest import coco_set, write_small

__all__ = ["coco_set"]
AVERAGES = {"box_ap": 11.0, "box_ap50": 20.0, "box_ap75": 10.5, "mask_ap": 9.5, "mask_ap50": 18.0, "mask_ap75": 9.0}


@pytest.fixture(scope="module")
def trained(coco_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one step."""
    root = tmp_path_factory.mktemp("detector")
    recipe = write_small(root / "small.yaml", coco_set)
    karat_says("detect", str(recipe), f"run.dir={root / 'run'}", "train.max_steps=1")
    return root / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of what the ledger reads of a finished run."""
    return copy_run(trained, tmp_path / "run")


def set_averages(run: Path) -> None:
    lines = [event | (AVERAGES if event["event"] == "eval" else {}) for event in events(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))


def test_a_detector_has_the_averages_of_its_last_evaluation(run: Path, docs: Path, ledger: Callable[..., int]) -> None:
    assert ledger(run) == 0
    (file,) = (docs / "ledger").iterdir()
    kept = json.loads(file.read_text())
    assert kept["summary"] == summary(run)
    (scores,) = events(run, "eval")
    assert kept["averages"] == {name: scores[name] for name in AVERAGES}
    (row,) = rows(docs, "|small")
    assert f"](ledger/{file.name})" in row
    assert "0.08333 x 48 images" in row


def test_a_detector_of_the_papers_recipe_is_its_row(run: Path, docs: Path, ledger: Callable[..., int]) -> None:
    set_averages(run)
    scores = {"last_box_ap": 11.0, "last_mask_ap": 9.5}
    behind = {"init_from": {"name": "imagenet_vit_base"}}
    for recipe, cell, lineage in (
        ("coco_paper_vit_base_g1u_random", "ViTDet-Base+G1U, random start", {}),
        ("coco_paper_vit_base", "ViTDet-Base, ImageNet-1K start", behind),
    ):
        pretend(run, recipe, "coco", 117_266, **scores, lineage=lineage)
        assert ledger(run) == 0
        (row,) = rows(docs, f"COCO 2017: {cell}")
        assert "|[11.00/20.00/10.50; 9.50/18.00/9.00](" in row
        assert f"`karat detect {recipe} data.path=DIR`" in row
    pretend(run, "coco_paper_vit_base_g1b_random", "coco", 117_266, "train.max_steps=100", **scores, lineage={})
    assert ledger(run) == 0
    (row,) = rows(docs, "COCO 2017: ViTDet-Base+G1B, random start")
    assert "|*short:* [" in row
    assert "train.max_steps=100" in row
    pretend(run, "coco_paper_vit_base_g1b", "coco", 117_266, **scores, lineage={})  # nobody knows what it began with
    assert ledger(run) == 0
    assert not rows(docs, "COCO 2017: ViTDet-Base+G1B, ImageNet-1K start")


def test_an_edit_of_a_detectors_file_is_noticed(run: Path, ledger: Callable[..., int], capsys) -> None:
    change(run, last_mask_ap=99.0)
    assert ledger(run) == 2
    assert "has last_mask_ap = 99.0, but the last evaluation in metrics.jsonl" in capsys.readouterr().err
