"""The second experiment: each arm is a recipe, the next runs follow from the records, and so does the page."""

import json
from pathlib import Path

import pytest

from benchmarks import contrasts, contrasts_report
from benchmarks.contrasts import ARMS, RECIPE, Trial, checked_rates, chosen_rate, next_trials, settings, wanted_rates
from karat_scale.recipe.loading import load_recipe


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records, with two images to test on."""
    for module in (contrasts, contrasts_report):
        monkeypatch.setattr(module, "RECORDS", tmp_path)
    monkeypatch.setattr(contrasts_report, "LABELS", tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("34\n")
    return tmp_path


def keep(trial: Trial, top1: float, predictions: str = "") -> None:
    """Write the record of a run."""
    found = {
        "stage": trial.stage,
        "arm": trial.arm,
        "rate": trial.rate,
        "seed": trial.seed,
        "top1": top1,
        "curve": [[100, top1 / 2, 1.5], [200, top1, 1.0]],
        "content": {"by_query": [0.5, 0.3], "by_image": [0.1, 0.1], "beyond_pi": [0.0, 0.02]},
        "training": [[100, 1.7, 2.0], [200, 1.1, 3.0]],
        "parameters": 475690,
        "predictions": predictions,
    }
    trial.record.write_text(json.dumps(found))


def test_the_page_is_what_the_records_say() -> None:
    assert contrasts_report.PAGE.read_text() == contrasts_report.render()


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_valid_recipe(arm: str) -> None:
    recipe = load_recipe(RECIPE, settings(Trial("main", arm, 1.25e-4, 3), Path("data"), Path("run")))
    assert (recipe.model.embed_dim, recipe.train.global_batch, recipe.optim.lr) == (96, 64, 1.25e-4)


@pytest.mark.usefixtures("records")
def test_the_grid_widens_until_the_best_rate_is_inside() -> None:
    assert wanted_rates("static") == [5e-4, 1e-3, 2e-3]
    for rate, top1 in ((5e-4, 50.0), (1e-3, 51.0), (2e-3, 52.0)):
        keep(Trial("rate", "static", rate, 99), top1)
    assert wanted_rates("static") == [5e-4, 1e-3, 2e-3, 4e-3]
    assert checked_rates("static") == []
    keep(Trial("rate", "static", 4e-3, 99), 51.5)
    assert checked_rates("static") == [2e-3, 4e-3]
    keep(Trial("check", "static", 2e-3, 99), 70.0)
    assert chosen_rate("static") is None
    keep(Trial("check", "static", 4e-3, 99), 70.5)
    assert chosen_rate("static") == 4e-3
    trials = next_trials()
    assert trials is not None
    assert [trial.name for trial in trials if trial.stage == "main"] == [
        f"main-static-lr0.004-seed{seed}" for seed in range(5)
    ]


@pytest.mark.usefixtures("records")
def test_the_page_has_paired_differences_and_images_that_one_arm_alone_gets_right() -> None:
    for seed, (own, other) in enumerate([(72.0, 70.0), (73.0, 70.0)]):
        keep(Trial("main", "smooth", 1e-3, seed), own, "34")
        for arm in ("without_scores", "static_softmax", "static"):
            keep(Trial("main", arm, 1e-3, seed), other, "94")
    rows = [line for line in contrasts_report.render().splitlines() if line.startswith("|smooth - ")]
    # 2.5 +- 12.706 * 0.7071 / sqrt(2); p = 0.1257, three times by Holm.
    assert rows[0] == "|smooth - without_scores|2|+2.50 (-3.85 to +8.85)|0.377|2, 0|"
    assert rows[-1] == "|smooth - biased_softmax|0|not yet run||0, 0|"


@pytest.mark.usefixtures("records")
def test_an_arm_that_differs_in_one_thing_takes_the_others_rate() -> None:
    for arm in ARMS:
        for stage in ("rate", "check"):
            for rate, top1 in ((5e-4, 50.0), (1e-3, 52.0), (2e-3, 51.0)):
                keep(Trial(stage, arm, rate, 99), top1)
    assert chosen_rate("frozen_functions") == chosen_rate("smooth") == 1e-3
    trials = next_trials()
    assert trials is not None
    assert [trial.arm for trial in trials if trial.seed == 3] == [arm for arm in ARMS if arm != "frozen_functions"]
    for trial in trials:
        keep(trial, 70.0)
    assert next_trials() is None
