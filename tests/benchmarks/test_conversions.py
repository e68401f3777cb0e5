"""The conversions: each run is a valid recipe, the next ones follow from the records, and so does the page."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks import conversions
from benchmarks.conversions import (
    ARMS,
    FEWER,
    LONGER,
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
    """Use an empty folder of records."""
    monkeypatch.setattr(conversions, "RECORDS", tmp_path)


def keep(trial: Trial, top1: float, original: str = "a", commit: str = "c") -> None:
    """Write the record of a run; its accuracy on the test images is two points higher."""
    errors = [0.0, 0.25, 0.35] if trial.arm == "hybrid" else [0.2, 0.25, 0.35]
    matched = {
        "blocks": [{"block": 0, "matched": errors}, {"block": 1, "matched": [0.5]}],
        "top1": {"at_once": 10.0, "matched": 50.0},
    }
    found = {"stage": trial.stage, "arm": trial.arm, "images": trial.images, "epochs": trial.epochs, "seed": trial.seed}
    found |= {"held_out": top1, "tested": top1 + 2, "matched": matched if trial.is_converted else None}
    found |= {"curve": [[step, top1 - 5 + step, 1.0] for step in range(1, 6)]}
    trial.record.write_text(json.dumps({**found, "original_sha256": original, "commit": commit}))


def stages(trials: Iterable[Trial]) -> list[tuple[str, str, int, int]]:
    return [(trial.stage, trial.arm, trial.images, trial.seed) for trial in trials]


def keep_rates(smooth: tuple[float, ...] = (60.0, 62.0, 61.0)) -> None:
    for arm, results in (("smooth", smooth), ("static", (59.0, 59.5, 59.2))):
        for rate, top1 in zip(RATES, results, strict=True):
            keep(Trial("rate", arm, 45000, rate, 99), top1)


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_valid_recipe(arm: str) -> None:
    given = settings(Trial("convert", arm, 5000, 2e-4, 1), Path("data"), Path("work"))
    recipe = load_recipe(RECIPE, [*given, "init_from=x", "distill.from=x"])
    assert (recipe.model.embed_dim, recipe.convert.images, recipe.train.epochs) == (192, 5000, 5)
    assert recipe.data.path.endswith("held_out_5000")
    assert recipe.attention.learns
    for stage in ("original", "scratch", "whole", "unmatched"):
        recipe = load_recipe(RECIPE, settings(Trial(stage, arm), Path(), Path()))
        assert (recipe.convert.images, bool(recipe.init_from)) == (0, stage == "unmatched")
        assert recipe.model.weight_init != "mimetic"


def test_the_original_starts_alone_and_softmax_learns_from_it_as_long_as_the_others() -> None:
    assert next_trials() == [ORIGINAL]
    recipe = load_recipe(RECIPE, settings(ORIGINAL, Path(), Path()))
    assert (recipe.attention.kind, recipe.model.weight_init, recipe.train.epochs) == ("softmax", "mimetic", 40)
    recipe = load_recipe(RECIPE, settings(Trial("convert"), Path(), Path()))
    assert (recipe.attention.kind, recipe.convert.images, recipe.train.epochs) == ("softmax", 0, 5)
    assert recipe.init_from == recipe.distill.from_ == str(conversions.weights())


def test_an_original_that_is_too_weak_is_trained_on_and_both_are_reported() -> None:
    keep(ORIGINAL, 77.0)
    weak = conversions.weights()
    assert next_trials() == [LONGER]
    recipe = load_recipe(RECIPE, settings(LONGER, Path(), Path()))
    assert (recipe.init_from, recipe.distill.from_, recipe.train.epochs) == (str(weak), "", 40)
    keep(LONGER, 77.5)
    with pytest.raises(SystemExit, match=r"the original has 79.50 % of 80 %: amend the protocol"):
        next_trials()
    keep(LONGER, 80.0, original="b")
    assert conversions.weights() != weak
    for trial in next_trials():
        keep(trial, 60.0, original="b")
    assert Trial("whole", "static").epochs == 85
    assert (
        "The original: 79.00 % of the test images after 40 epochs, 82.00 % after 40 more, which started from its"
    ) in conversions.render()


def test_arms_with_functions_wait_for_the_rate_of_the_control() -> None:
    keep(ORIGINAL, 81.0)
    keep_rates()
    for rate in RATES:
        Trial("rate", "static", 45000, rate, 99).record.unlink()
    for arm in ("smooth", "bound", "hybrid"):
        keep(Trial("convert", arm, 45000, 1e-3), 70.0)
    assert stages(next_trials()) == [("rate", "static", 45000, 99)] * 3 + [("convert", "softmax", 45000, 0)]


def test_the_grid_of_rates_widens_until_the_best_is_inside() -> None:
    keep(ORIGINAL, 81.0)
    assert [trial.rate for trial in next_trials()] == [*RATES, *RATES]
    keep_rates((60.0, 61.0, 62.0))
    assert (chosen_rate("static"), chosen_rate("smooth"), chosen_rate("bound")) == (1e-3, None, None)
    assert [trial.rate for trial in next_trials() if trial.stage == "rate"] == [4e-3]
    keep(Trial("rate", "smooth", 45000, 4e-3, 99), 61.5)
    assert chosen_rate("smooth") == chosen_rate("hybrid") == chosen_rate("softmax") == 2e-3


def test_one_run_follows_from_the_others() -> None:
    keep(ORIGINAL, 81.0)
    keep_rates()
    first = [*ARMS, "softmax"]
    assert stages(next_trials()) == [("convert", arm, 45000, 0) for arm in first]
    assert best() is None
    for number, trial in enumerate(next_trials()):
        keep(trial, 70.0 + number)
    assert best() == "hybrid"  # by the held-out images; static and softmax are controls
    assert stages(next_trials()) == [
        *(("convert", arm, 45000, seed) for seed in (1, 2) for arm in ("hybrid", "static")),
        *(("scratch", arm, 45000, 0) for arm in ("hybrid", "static", "smooth", "bound")),
        *(("convert", arm, images, 0) for images in FEWER for arm in first),
        *(("unmatched", arm, 45000, 0) for arm in ("hybrid", "static")),
        *(("whole", arm, 45000, 0) for arm in ("hybrid", "static")),
    ]
    for trial in next_trials():
        keep(trial, 75.0)
    assert next_trials() is None
    page = conversions.render()
    assert "The original: 83.00 % of the test images after 40 epochs." in page
    assert "|static|0.001|59.50|" in page
    assert "|hybrid|45,000|0.300, 0.500|10.00|50.00|70.33|74.33|75.00, 77.00, 77.00|3|" in page
    assert "|softmax|1,000||||71.00|75.00|77.00|1|" in page
    assert "|hybrid - static|3|+0.67 (-2.20 to +3.54)|" in page
    assert "|whole|hybrid|45|75.00|77.00|" in page
    keep(Trial("unmatched", "static", 45000, 1e-3), 70.0, original="b")
    with pytest.raises(ValueError, match="the runs are not from one original"):
        conversions.render()
    keep(Trial("unmatched", "static", 45000, 1e-3), 70.0, commit="d")
    with pytest.raises(ValueError, match="the runs are not of one commit"):
        conversions.render()


def test_a_page_without_runs_says_so() -> None:
    assert "Not yet run." in conversions.render()
