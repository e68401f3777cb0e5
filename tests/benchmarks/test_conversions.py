"""The conversions: each run is a valid recipe, the next ones follow from the records, and so does the page."""

import json
from pathlib import Path

import pytest

from benchmarks import conversions
from benchmarks.conversions import (
    ARMS,
    IMAGES,
    ORIGINAL,
    RATES,
    RECIPE,
    Trial,
    best,
    chosen_rate,
    next_trials,
    settings,
)
from karat_scale.recipe.loading import load_recipe


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder of records."""
    monkeypatch.setattr(conversions, "RECORDS", tmp_path)


def keep(trial: Trial, top1: float) -> None:
    """Write the record of a run."""
    matched = {"blocks": [{"block": 0, "matched": [0.25, 0.35]}], "top1": {"at_once": 10.0, "matched": 50.0}}
    found = {"stage": trial.stage, "arm": trial.arm, "images": trial.images, "epochs": trial.epochs, "top1": top1}
    curve = [[step, top1 - 5 + step, 1.0] for step in range(1, 6)]
    trial.record.write_text(json.dumps({**found, "curve": curve, "matched": matched}))


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_valid_recipe(arm: str) -> None:
    given = settings(Trial("convert", arm, 5000, 2e-4, 1), Path("data"), Path("work"))
    recipe = load_recipe(RECIPE, [*given, "init_from=x", "distill.from=x"])
    assert (recipe.model.embed_dim, recipe.convert.images, recipe.train.epochs) == (192, 5000, 5)
    assert recipe.attention.learns
    starts = {
        stage: "mimetic" in str(settings(Trial(stage, arm), Path(), Path()))
        for stage in ("original", "scratch", "whole")
    }
    assert starts == {"original": True, "scratch": False, "whole": False}


def test_one_run_follows_from_the_others() -> None:
    scratch = [Trial("scratch", arm) for arm in ARMS]
    assert next_trials() == [ORIGINAL, *scratch]
    keep(ORIGINAL, 81.0)
    assert next_trials() == [*(Trial("rate", arm, 1000, rate, 99) for arm in ARMS for rate in RATES), *scratch]
    for number, arm in enumerate(ARMS):
        assert (best() is None) == (arm != "static")
        for rate, top1 in zip(RATES, (60.0, 62.0, 61.0), strict=True):
            keep(Trial("rate", arm, IMAGES[0], rate, 99), top1 + number)
    assert chosen_rate("static") == RATES[1]
    assert best() == "hybrid"  # by the held-out images; static is the control
    converted = [trial for trial in next_trials() if trial.stage == "convert"]
    assert [(trial.arm, trial.images, trial.seed) for trial in converted] == [
        *((arm, images, 0) for images in IMAGES for arm in ARMS),
        *((arm, 45000, seed) for seed in (1, 2) for arm in ("hybrid", "static")),
    ]
    for number, trial in enumerate(converted):
        keep(trial, 70.0 + min(number, 11))
    left = [trial for trial in next_trials() if trial.stage != "scratch"]
    assert [(trial.stage, trial.arm, trial.seed) for trial in left] == [("whole", "hybrid", 0), ("whole", "static", 0)]
    for trial in next_trials():
        keep(trial, 75.0)
    assert next_trials() is None
    page = conversions.render()
    assert "|static|45,000|0.300|10.00|50.00|77.00|81.00 (81.00, 81.00, 81.00)|" in page
    assert "|hybrid|65|75.00|" in page


def test_a_page_without_runs_says_so() -> None:
    assert "Not yet run." in conversions.render()
