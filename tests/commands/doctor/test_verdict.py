"""The judgement on given rates; test_checkup judges measured ones."""

import dataclasses

import pytest

from karat_scale.commands.doctor.report import Setting, Stage, judge
from karat_scale.recipe.loading import load_recipe

COMMON = ("data.path=.", "data.order=full", "train.precision=bf16")
SETTING = Setting(
    recipe=load_recipe("imagenet_vit_tiny", COMMON),
    workers=2,
    worker_rate=105,
    cores=16,
    world_size=1,
    decoder="torchvision",
    device="cuda",
    has_bf16=True,
    accumulation=1,
    stays_cached=False,
)
FAST: dict[Stage, float] = {
    "storage": 90_000,
    "decode": 90_000,
    "augmentation": 90_000,
    "transfer": 90_000,
    "model": 90_000,
    "optimizer": 90_000,
    "communication": 90_000,
}


def setting(*overrides: str, **changes: object) -> Setting:
    recipe = load_recipe("imagenet_vit_tiny", [*COMMON, *overrides])
    return dataclasses.replace(SETTING, recipe=recipe, **changes)


@pytest.mark.parametrize("stage", list(FAST))
@pytest.mark.parametrize("workers", [0, 2])
def test_the_slowest_stage_by_far_bounds(stage: Stage, workers: int) -> None:
    verdict = judge({**FAST, stage: 100}, setting(workers=workers))
    assert verdict.bound == stage
    assert verdict.reason
    assert verdict.advice


def test_too_few_workers_are_counted() -> None:
    verdict = judge({**FAST, "decode": 300, "augmentation": 700, "model": 540}, SETTING)
    assert verdict.bound == "decode"
    assert verdict.data_rate == pytest.approx(210)
    assert "2 workers sustain 210 img/s" in verdict.reason
    assert "raise data.workers to 6" in verdict.advice  # 1.1 x 535 / 105
    assert "data.decoder=native" in verdict.advice
    assert "native" not in judge({**FAST, "decode": 300}, setting(decoder="native")).advice


def test_no_more_workers_than_cores_are_advised() -> None:
    few = judge({**FAST, "decode": 200, "model": 5000}, setting(cores=4))
    assert "raise data.workers to 3 (all cores; " in few.advice
    none_left = judge({**FAST, "decode": 200, "model": 5000}, setting(cores=2, decoder="native"))
    assert "data.workers" not in none_left.advice


def test_workers_take_the_augmentation_in_turn_with_the_decoding() -> None:
    verdict = judge({**FAST, "decode": 300, "augmentation": 200, "model": 150}, SETTING)
    assert verdict.bound == "augmentation"
    assert verdict.data_rate == pytest.approx(120)
    assert "augment.randaugment" in verdict.advice


def test_a_disk_that_is_read_once_does_not_bound() -> None:
    rates = {**FAST, "storage": 100, "model": 500}
    assert judge(rates, SETTING).bound == "storage"
    assert "data.order=block" in judge(rates, SETTING).advice
    assert "data.order=block" not in judge(rates, setting("data.order=block")).advice
    assert judge(rates, setting(stays_cached=True)).bound == "model"


def test_without_workers_everything_takes_turns() -> None:
    verdict = judge({"decode": 300, "augmentation": 600, "model": 290}, setting(workers=0))
    assert verdict.bound == "model"
    assert (verdict.data_rate, verdict.device_rate) == (pytest.approx(200), pytest.approx(290))
    assert "take turns" in verdict.reason
    assert verdict.advice.startswith("raise data.workers to 4, so that they no longer take turns; then ")
    assert "data.workers" not in judge({"decode": 9000, "model": 290}, setting(workers=0)).advice
    assert (
        "data.workers" not in judge({"decode": 300, "model": 290}, setting("data.backend=synthetic", workers=0)).advice
    )


def test_the_advice_for_a_model_depends_on_what_is_not_used_yet() -> None:
    rates = {**FAST, "model": 100}
    assert "bf16" in judge(rates, setting("train.precision=fp32")).advice
    assert "bf16" not in judge(rates, SETTING).advice
    assert "micro_batch" in judge(rates, setting(accumulation=4)).advice
    assert "attention.implementation=auto" in judge(rates, setting("attention.implementation=reference")).advice
    assert "GPU" in judge(rates, setting(device="cpu")).advice


def test_bf16_without_its_instructions_is_the_first_thing_to_change() -> None:
    slow = setting(device="cpu", has_bf16=False, workers=2)
    assert judge({**FAST, "model": 2}, slow).advice.startswith("set train.precision=fp32")
    assert "fp32" not in judge({**FAST, "model": 2}, setting(device="cpu")).advice
    assert "fp32" not in judge({**FAST, "model": 2}, setting(has_bf16=False)).advice  # it trains on a GPU
