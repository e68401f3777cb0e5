import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from karat_scale.train.schedule import CosineSchedule, build_schedule


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


def test_lr_batch_null_means_lr_as_it_is(small_recipe) -> None:
    assert build_schedule(small_recipe("optim.lr_batch=null", "optim.lr=0.5"), 10).peak_lr == 0.5
