"""Times in turn, and by a device's events; the device is only written down, as there is none here."""

from typing import Any

import pytest
import torch

from karat_scale.commands.measure.interleaved import Rounds, calls_for, device_seconds, interleaved_seconds


def test_each_contender_is_timed_once_a_round_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_ratio_is_the_median_of_paired_rounds() -> None:
    assert Rounds({"a": [2.0, 9.0, 3.0], "b": [1.0, 3.0, 1.0]}).ratio("a", "b") == 3.0


def test_events_enclose_the_calls_while_the_device_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait for the event")

        def elapsed_time(self, end: Any) -> float:
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("hold"))
    assert device_seconds(lambda: queue.append("call"), 3, "cuda") == pytest.approx(0.002)
    launching = ["wait", "call", "call", "call", "wait"]
    assert queue == [*launching, "hold", "event", "call", "call", "call", "event", "wait for the event"]


def test_a_long_call_is_made_once() -> None:
    made: list[int] = []
    assert calls_for(lambda: made.extend(range(10**6)), "cpu") == 1
    assert calls_for(lambda: None, "cpu") > 1
