import math
from pathlib import Path

import pytest
import torch

from karat_scale.engine.reporting.interval import Interval, peak_memory_mb
from tests.clock import Clock

CPU = torch.device("cpu")


def test_the_first_step_and_pauses_are_not_timed() -> None:
    clock = Clock()
    interval = Interval(CPU, clock)
    clock.go(50.0)
    interval.finish_step()
    with interval.paused(), interval.paused():
        clock.go(7.0)
    clock.go(2.0)
    interval.finish_step()
    assert interval.take_time() == (1, 2.0)


def test_the_time_may_be_taken_inside_a_pause() -> None:
    clock = Clock()
    interval = Interval(CPU, clock)
    interval.finish_step()
    clock.go(1.0)
    with interval.paused():
        assert interval.take_time() == (0, 1.0)
        clock.go(5.0)
    clock.go(0.5)
    assert interval.take_time() == (0, 0.5)


def test_the_stopwatch_waits_for_the_device_and_a_step_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.go(10.0))
    interval = Interval(CPU, clock)
    interval._device = torch.device("cuda")
    interval.finish_step()  # the first one, which starts the stopwatch
    for _ in range(3):
        clock.go(1.0)
        interval.finish_step()
    assert clock.now == 113.0
    with interval.paused():
        clock.go(100.0)
    assert interval._seconds == 13.0  # what the device still had to do belongs to the steps


def test_losses_add_up_by_name_and_start_anew() -> None:
    interval = Interval(CPU)
    for loss in (1.0, 2.0):
        interval.add_losses({"loss": torch.tensor(loss), "mask": torch.tensor(loss / 2)})
        interval.finish_step()
    losses, steps = interval.take_losses()
    assert (losses, steps) == ({"loss": 3.0, "mask": 1.5}, 2)
    interval.add_losses({"loss": torch.tensor(5.0)})
    assert interval.take_losses() == ({"loss": 5.0}, 0)
    assert losses["loss"] == 3.0


def test_norms_are_kept_as_they_were() -> None:
    interval = Interval(CPU)
    norm = torch.tensor(1.5)
    for value in (1.5, math.inf, 2.5):
        interval.add_norm(norm.fill_(value))  # an engine may use its memory again
    assert interval.take_norms() == [1.5, math.inf, 2.5]
    assert interval.take_norms() == []


def test_peak_memory_is_this_processs() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = int(status["VmHWM"].split()[0])  # threads hold back some pages that they have not counted yet
    assert peak_memory_mb(CPU) >= 0.99 * kibibytes * 1024 / 1e6
