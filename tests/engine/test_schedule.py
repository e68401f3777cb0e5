import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from karat_scale.engine.optimizers import CosineSchedule, build_schedule
from karat_scale.foundation.errors import RecipeError


@given(warmup=st.integers(0, 30), total=st.integers(31, 200), step=st.integers(0, 199))
def test_equals_timms_scheduler_at_every_step(warmup: int, total: int, step: int) -> None:
    ours = CosineSchedule(peak_lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=warmup, total_steps=total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = CosineLRScheduler(optimizer, total, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6, t_in_epochs=False)
    theirs.step_update(step)
    assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_the_papers_rates_for_a_batch_of_128(small_recipe) -> None:
    recipe = small_recipe("train.global_batch=128", "train.epochs=100", "schedule.warmup_epochs=5")
    schedule = build_schedule(recipe, steps_per_epoch=10_009)
    assert schedule.peak_lr == pytest.approx(1.25e-4)
    assert schedule.warmup_steps == 50_045
    assert schedule.total_steps == 1_000_900
    assert schedule.lr(0) == 1e-6
    assert schedule.lr(1_000_900) == 1e-5


@given(warmup=st.integers(0, 50), total=st.integers(51, 300), step=st.integers(0, 299))
def test_a_cosine_after_the_warm_up_is_big_visions(warmup: int, total: int, step: int) -> None:
    ours = CosineSchedule(1e-3, 0.0, 0.0, warmup_steps=warmup, total_steps=total, cosine_from=warmup)
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * progress)) * (min(1.0, step / warmup) if warmup else 1.0)
    assert ours.lr(step) == pytest.approx(rate, rel=1e-12, abs=1e-18)


def test_a_warm_up_counted_in_steps(small_recipe) -> None:
    recipe = small_recipe("schedule.warmup_steps=30", "schedule.warmup_epochs=99", "schedule.cosine_after_warmup=true")
    schedule = build_schedule(recipe, steps_per_epoch=20)
    assert (schedule.warmup_steps, schedule.cosine_from, schedule.total_steps) == (30, 30, 40)
    with pytest.raises(RecipeError, match=r"schedule.warmup_steps = 30 are more than the 20 steps of train.epochs = 2"):
        build_schedule(recipe, steps_per_epoch=10)


def test_lr_batch_null_means_lr_as_it_is(small_recipe) -> None:
    assert build_schedule(small_recipe("optim.lr_batch=null", "optim.lr=0.5"), 10).peak_lr == 0.5
