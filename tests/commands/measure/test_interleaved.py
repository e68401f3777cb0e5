"""Tests of contenders that are timed in turn, and of how many calls a measurement takes."""

from karat_scale.commands.measure.interleaved import Rounds, calls_for, interleaved_seconds


def test_each_contender_is_timed_once_a_round_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_ratio_is_the_median_of_paired_rounds() -> None:
    assert Rounds({"a": [2.0, 9.0, 3.0], "b": [1.0, 3.0, 1.0]}).ratio("a", "b") == 3.0


def test_a_long_call_is_made_once() -> None:
    made: list[int] = []
    assert calls_for(lambda: made.extend(range(10**6)), "cpu") == 1
    assert calls_for(lambda: None, "cpu") > 1
