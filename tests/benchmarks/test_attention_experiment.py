"""The experiment's queue follows its protocol, and its page its records."""

import json

import pytest

from benchmarks import attention_results, attention_trials
from benchmarks.attention_trials import ARMS, RATES, SEEDS, VARIANTS, Trial, next_trials
from karat_scale.recipe.loading import load_recipe


def test_the_page_is_what_the_records_say():
    assert attention_results.PAGE.read_text() == attention_results.render()


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_a_valid_recipe(arm):
    recipe = load_recipe(attention_trials.RECIPE, [*ARMS[arm], "optim.lr=2e-3"])
    assert (recipe.model.embed_dim, recipe.train.global_batch) == (96, 64)


def test_the_queue_follows_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_trials, "RECORDS", tmp_path)

    def finish(trial, top1):
        trial.record.write_text(json.dumps({"top1": top1, "top1_at_a_quarter": 0, "content": []}))

    first = next_trials()
    assert len(first) == len(ARMS) * len(RATES)
    for trial in first:
        # `bounded` is more than 4 points below `karat`, and every arm is best at 1e-3.
        finish(trial, (30 if trial.arm == "bounded" else 40) + (trial.rate == "1e-3"))
    second = next_trials()
    assert {trial.rate for trial in second} == {"1e-3"}
    assert {trial.arm for trial in second} == {*ARMS} - {"bounded"}
    assert {trial.seed for trial in second} == {*SEEDS}
    for trial in second:
        finish(trial, 60 if trial.arm == "content" else 50)
    third = next_trials()
    assert {(trial.stage, trial.arm) for trial in third} == {("long", arm) for arm in ("softmax", "static", "content")}
    for trial in third:
        finish(trial, 70)
    assert next_trials() is None


def test_the_interval_is_students():
    low, high = attention_results.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert {*VARIANTS} < {*ARMS}
    assert Trial("rate", "softmax", "1e-3", 99).name == "rate-softmax-lr1e-3-seed99"
