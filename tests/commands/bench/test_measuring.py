from karat_scale.commands.bench.measuring import interleaved_seconds, median_ratio


def test_each_contender_is_timed_once_a_round_after_a_warm_up() -> None:
    calls: list[str] = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_the_ratio_is_the_median_of_paired_rounds() -> None:
    assert median_ratio({"a": [2.0, 9.0, 3.0], "b": [1.0, 3.0, 1.0]}, "a", "b") == 3.0
