"""The experiment's page follows its records."""

import pytest

from benchmarks import attention_figures, attention_results, attention_trials
from benchmarks.attention_trials import ARMS, GONE, SEEDS, STARTS, VARIANTS, Trial
from karat_scale.recipe.loading import load_recipe


def test_the_page_is_what_the_records_say():
    assert attention_results.PAGE.read_text() == attention_results.render()


@pytest.mark.parametrize("arm", [*(arm for arm in ARMS if arm not in GONE), *STARTS])
def test_each_arm_is_a_valid_recipe(arm):
    recipe = load_recipe(attention_trials.RECIPE, [*{**ARMS, **STARTS}[arm], "optim.lr=2e-3"])
    assert (recipe.model.embed_dim, recipe.train.global_batch) == (96, 64)


def test_the_interval_is_students():
    low, high = attention_results.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert {*VARIANTS} < {*ARMS}
    assert Trial("rate", "softmax", "1e-3", 99).name == "rate-softmax-lr1e-3-seed99"


def test_the_figure_shows_an_arms_comparison_where_it_has_one() -> None:
    shown = attention_figures.shown()
    stages = {arm: {record["stage"] for record in own} for arm, own in shown.items()}
    assert stages["karat"] == {"compare"}
    assert stages["learned_score"] == {"rate"}  # cut by the rule
    assert len(shown["karat"]) == len(SEEDS)
