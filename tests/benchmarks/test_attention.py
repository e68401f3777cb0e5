"""Tests of the attention experiment: its page follows from its records, and statistics match numbers from elsewhere."""

from typing import Any

import pytest

from benchmarks import attention_figures, attention_results, attention_trials
from benchmarks.attention_results import chance, holm, interval, intervals, longer, replacements
from benchmarks.attention_trials import ARMS, GONE, SEEDS, STARTS
from karat_scale.recipe.loading import load_recipe


def test_the_page_is_what_the_records_say():
    assert attention_results.PAGE.read_text() == attention_results.render()


@pytest.mark.parametrize("arm", [*(arm for arm in ARMS if arm not in GONE), *STARTS])
def test_each_arm_is_a_valid_recipe(arm):
    recipe = load_recipe(attention_trials.RECIPE, [*{**ARMS, **STARTS}[arm], "optim.lr=2e-3"])
    assert (recipe.model.embed_dim, recipe.train.global_batch) == (96, 64)


def test_the_figure_shows_an_arms_comparison_where_it_has_one() -> None:
    shown = attention_figures.shown()
    stages = {arm: {record["stage"] for record in own} for arm, own in shown.items()}
    assert stages["karat"] == {"compare"}
    assert stages["learned_score"] == {"rate"}  # cut by the rule
    assert len(shown["karat"]) == len(SEEDS)


def records(**top1: tuple[float, float, float]) -> dict[str, dict[int, dict[str, float]]]:
    return {arm: {seed: {"top1": x} for seed, x in zip(SEEDS, own, strict=True)} for arm, own in top1.items()}


def test_the_interval_and_the_test_agree() -> None:
    gaps = [1.0, 2.0, 4.5]
    low, high = interval(gaps)
    assert (low, high) == pytest.approx((2.5 - 4.4788, 2.5 + 4.4788), abs=1e-3)  # 4.3027 * 1.8028 / sqrt(3)
    shifted = [gap - low - 0.5 for gap in gaps]  # the lower bound lies at the margin
    assert chance(shifted) == pytest.approx(0.025, rel=1e-6)


def test_holms_correction() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_a_variant_must_hold_against_both_baselines() -> None:
    text = intervals(
        records(
            softmax=(40.0, 40.1, 39.9),
            static_softmax=(47.0, 47.1, 46.9),
            content=(48.0, 48.2, 47.9),
            bounded=(43.0, 43.2, 42.9),
        )
    )
    rows = {line.split("|")[1]: line for line in text.splitlines() if line.startswith("|")}
    assert rows["content"].endswith("|yes|")
    assert "+8.03 (" in rows["content"]
    assert rows["bounded"].endswith("|not shown|")
    assert rows["content"].count("not yet run") == 1  # static has no runs


def test_one_seed_says_nothing() -> None:
    found = records(softmax=(40.0, 40.1, 39.9), static_softmax=(47.0, 47.1, 46.9))
    found["content"] = {0: {"top1": 48.0}}
    assert "|content|not yet run|not yet run|not yet run|not yet run||" in intervals(found)


def long_run(arm: str, seed: int, top1: float, by_query: float) -> dict[str, Any]:
    content = [{"by_query": by_query, "by_image": 0.5}, {"by_query": by_query, "by_image": 0.7}]
    return {"arm": arm, "seed": seed, "top1": top1, "top1_at_a_quarter": top1 - 10, "content": content}


def test_leads_pair_the_seeds_and_no_share_is_below_zero() -> None:
    runs = [long_run("softmax", 0, 60, 0.2), long_run("softmax", 1, 64, 0.2), long_run("static", 1, 66.5, -1e-9)]
    text = longer(runs)
    assert "|static|1|66.50|56.50|0.00|0.60|" in text
    assert "|static|+2.50|+2.50|" in text  # of seed 1 alone
    assert "|softmax|+0.00" not in text


def test_replacements_are_means_over_seeds_of_arms_that_have_them_all() -> None:
    own = {"S": 50.0, "mean over queries": 40.0, "mean over images": 45.0}
    found: dict[str, dict[int, dict[str, Any]]] = {
        "karat": {seed: {"replaced": {name: top1 + seed for name, top1 in own.items()}} for seed in SEEDS},
        "static": {0: {"replaced": own}, 1: {}},
    }
    text = replacements(found)
    assert "|karat|51.0|41.0|46.0|" in text
    assert "static" not in text
    assert replacements({"static": found["static"]}) == ""
