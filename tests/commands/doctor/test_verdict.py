"""Tests of how long a recipe is timed, and of the verdict on given rates. test_checkup has measured ones."""

import dataclasses
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karat_scale.commands.doctor.recipe import timed_batch
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
FAST: dict[Stage, float] = dict.fromkeys(get_args(Stage), 90_000.0)


def setting(*overrides: str, **changes: object) -> Setting:
    recipe = load_recipe("imagenet_vit_tiny", [*COMMON, *overrides])
    return dataclasses.replace(SETTING, recipe=recipe, **changes)


@pytest.mark.parametrize("stage", FAST)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_slowest_stage_by_far_bounds(stage: Stage, workers: int) -> None:
    verdict = judge({**FAST, stage: 100}, setting(workers=workers))
    assert verdict.bound == stage
    assert verdict.reason
    assert verdict.advice


@pytest.mark.parametrize(
    ("rates", "changes", "bound", "data_rate"),
    [
        # Two workers decode and augment in turn.
        ({**FAST, "decode": 300, "augmentation": 700, "model": 540}, {}, "decode", 210),
        ({**FAST, "decode": 300, "augmentation": 200, "model": 150}, {}, "augmentation", 120),
        ({**FAST, "storage": 100, "model": 500}, {}, "storage", 100),
        ({**FAST, "storage": 100, "model": 500}, {"stays_cached": True}, "model", 45_000),  # it is read once
        ({"decode": 300, "augmentation": 600, "model": 290}, {"workers": 0}, "model", 200),
    ],
)
def test_the_rate_of_the_data_is_that_of_what_runs_in_turn(rates, changes, bound, data_rate) -> None:
    verdict = judge(rates, setting(**changes))
    assert (verdict.bound, verdict.data_rate) == (bound, pytest.approx(data_rate))


DECODES, SLOW = {**FAST, "decode": 200, "model": 5000}, {**FAST, "model": 100}
READS = {**FAST, "storage": 100}
TURNS = {"decode": 300, "augmentation": 600, "model": 290}


@pytest.mark.parametrize(
    ("rates", "given", "advised", "not_advised"),
    [
        (
            {**FAST, "decode": 300, "augmentation": 700, "model": 540},
            setting(),
            "data.workers to 6",
            "",
        ),  # 1.1 x 535 / 105
        (DECODES, setting(), "data.decoder=native", ""),
        (DECODES, setting(decoder="native"), "", "native"),
        (DECODES, setting(cores=4), "raise data.workers to 3 (all cores; ", ""),
        (DECODES, setting(cores=2, decoder="native"), "", "data.workers"),
        (READS, setting(), "data.order=block", ""),
        (READS, setting("data.order=block"), "", "data.order=block"),
        (TURNS, setting(workers=0), "raise data.workers to 4, so that they no longer take turns; then ", ""),
        ({"decode": 9000, "model": 290}, setting(workers=0), "", "data.workers"),
        ({"decode": 300, "model": 290}, setting("data.backend=synthetic", workers=0), "", "data.workers"),
        ({**FAST, "augmentation": 100}, setting(), "augment.randaugment", ""),
        (SLOW, setting("train.precision=fp32"), "bf16", ""),
        (SLOW, setting(accumulation=4), "micro_batch", "bf16"),
        (SLOW, setting("attention.implementation=reference"), "attention.implementation=auto", ""),
        (SLOW, setting(device="cpu"), "GPU", "fp32"),
        (SLOW, setting(device="cpu", has_bf16=False), "set train.precision=fp32", ""),
        (SLOW, setting(has_bf16=False), "", "fp32"),  # it trains on a GPU
    ],
)
def test_the_advice_is_what_is_not_used_yet(rates, given, advised, not_advised) -> None:
    advice = judge(rates, given).advice
    assert advised in advice
    assert not not_advised or not_advised not in advice


@given(
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    world=st.integers(1, 8),
    image_seconds=st.floats(1e-6, 10),
    seconds=st.floats(0.1, 100),
)
def test_the_timed_batch_divides_and_never_grows(micro, accumulation, world, image_seconds, seconds) -> None:
    wanted = micro * accumulation * world
    batch, smaller = timed_batch(wanted, micro, world, image_seconds, seconds)
    assert 1 <= smaller <= micro
    assert batch <= wanted
    assert batch % (smaller * world) == 0
    assert smaller == micro or smaller % 2 == 0


def test_a_step_that_fits_stays_and_one_that_does_not_shrinks() -> None:
    assert timed_batch(256, 64, 2, image_seconds=0.001, seconds=12) == (256, 64)
    assert timed_batch(256, 32, 1, image_seconds=0.01, seconds=12) == (96, 32)
    assert timed_batch(256, 128, 1, image_seconds=0.1, seconds=12) == (10, 10)
    assert timed_batch(256, 128, 2, image_seconds=10, seconds=12) == (4, 2)
