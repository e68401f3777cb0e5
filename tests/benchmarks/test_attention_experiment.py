"""The experiment's queue follows its protocol, and its page its records."""

import fcntl
import json
from pathlib import Path

import pytest

from benchmarks import attention_experiment, attention_figures, attention_results, attention_trials
from benchmarks.attention_trials import ARMS, GONE, RATES, SEEDS, STARTS, VARIANTS, Trial, next_trials
from karat_scale.recipe.loading import load_recipe


def test_the_page_is_what_the_records_say():
    assert attention_results.PAGE.read_text() == attention_results.render()


@pytest.mark.parametrize("arm", [*({*ARMS} - {*GONE}), *STARTS])
def test_each_arm_is_a_valid_recipe(arm):
    recipe = load_recipe(attention_trials.RECIPE, [*{**ARMS, **STARTS}[arm], "optim.lr=2e-3"])
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
    assert {(trial.stage, trial.arm) for trial in third} == {("start", start) for start in STARTS}
    for trial in third:
        finish(trial, 45 if trial.arm == "fourier_kan_decay" else 40)
    last = next_trials()
    best = ("softmax", "static", "content", "fourier_kan_decay")
    assert {(trial.stage, trial.arm) for trial in last} == {("long", arm) for arm in best}
    for trial in last:
        finish(trial, 70)
    assert next_trials() is None


def test_the_interval_is_students():
    low, high = attention_results.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert {*VARIANTS} < {*ARMS}
    assert Trial("rate", "softmax", "1e-3", 99).name == "rate-softmax-lr1e-3-seed99"


def test_a_process_waits_for_the_trials_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_trials, "RECORDS", tmp_path)
    theirs, ours = Trial("rate", "softmax", "5e-4", 99), Trial("compare", "softmax", "5e-4", 0)
    finished, looks = [], 0

    def next_trials() -> list[Trial] | None:
        return next(([trial] for trial in (theirs, ours) if not trial.record.exists()), None)

    def finish(trial: Trial, data: Path, directory: Path) -> None:
        finished.append(trial)
        trial.record.write_text("{}")

    def other_process_ends(seconds: float) -> None:
        nonlocal looks
        looks += 1
        theirs.record.write_text("{}")

    monkeypatch.setattr(attention_experiment, "next_trials", next_trials)
    monkeypatch.setattr(attention_experiment, "finish", finish)
    monkeypatch.setattr("os.nice", lambda _: 19)
    monkeypatch.setattr("time.sleep", other_process_ends)
    with (tmp_path / f"{theirs.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        attention_experiment.run(tmp_path, tmp_path)
    assert (finished, looks) == ([ours], 1)


def test_the_figure_shows_an_arms_comparison_where_it_has_one() -> None:
    shown = attention_figures.shown()
    stages = {arm: {record["stage"] for record in own} for arm, own in shown.items()}
    assert stages["karat"] == {"compare"}
    assert stages["learned_score"] == {"rate"}  # cut by the rule
    assert len(shown["karat"]) == len(SEEDS)
