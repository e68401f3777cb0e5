import time

import pytest
import torch

from karat_scale.train.reporting.interval import Interval, peak_memory_mb


def test_the_first_step_and_pauses_are_not_timed() -> None:
    interval = Interval(torch.device("cpu"))
    time.sleep(0.05)
    interval.finish_step(1.0)
    with interval.paused(), interval.paused():
        time.sleep(0.5)
    time.sleep(0.02)
    interval.finish_step(2.0)
    _, steps, seconds = interval.take_counts()
    assert steps == 1
    assert 0.02 <= seconds < 0.5


def test_counts_may_be_taken_inside_a_pause() -> None:
    interval = Interval(torch.device("cpu"))
    interval.finish_step(None)
    with interval.paused():
        assert interval.take_counts()[2] >= 0
        time.sleep(0.5)
    assert 0 <= interval.take_counts()[2] < 0.5


def test_losses_and_bad_samples_add_up_and_start_anew() -> None:
    interval = Interval(torch.device("cpu"))
    for loss in (1.0, 2.0):
        interval.add_loss(torch.tensor(loss))
        interval.add_bad(2)
        interval.finish_step(None)
    total, steps = interval.take_loss()
    assert (float(total), steps) == (3.0, 2)
    assert interval.take_counts()[0] == 4
    assert float(interval.take_loss()[0]) == 0.0


def test_peak_memory_is_this_processs() -> None:
    assert peak_memory_mb(torch.device("cpu")) == pytest.approx(peak_memory_mb(torch.device("cpu")), rel=0.1)
    assert peak_memory_mb(torch.device("cpu")) > 50
