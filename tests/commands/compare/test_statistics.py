"""Means, intervals, tests and Holm's correction against numbers worked out by hand and by scipy."""

import math

import pytest
from scipy import stats

from karat_scale.commands.compare.comparison import compare, holm, spread


def test_the_spread_of_three_values_is_that_of_a_table() -> None:
    found = spread([70.0, 71.0, 72.0])
    assert (found.count, found.mean, found.deviation) == (3, 71.0, 1.0)
    margin = 4.302652729911275 / math.sqrt(3)  # the 97.5 % point of t with 2 degrees of freedom
    assert found.low == pytest.approx(71 - margin)
    assert found.high == pytest.approx(71 + margin)


def test_one_value_has_no_spread() -> None:
    found = spread([70.0])
    assert (found.mean, found.deviation, found.low, found.high) == (70.0, None, None, None)


def test_only_common_seeds_are_paired() -> None:
    first = {0: 70.0, 1: 71.0, 2: 72.0, 7: 10.0}
    other = {2: 74.5, 1: 72.5, 0: 72.0, 9: 99.0}
    (found,) = compare(first, [other])
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(2.0)  # of 2, 1.5 and 2.5
    assert found.low == pytest.approx(2 - 4.302652729911275 * 0.5 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.302652729911275 * 0.5 / math.sqrt(3))
    assert found.p == pytest.approx(stats.ttest_1samp([2.0, 1.5, 2.5], 0).pvalue)
    assert (found.adjusted, found.verdict, found.is_shown) == (found.p, "higher", True)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_pair_that_holds_alone_may_not_hold_among_many() -> None:
    first = {0: 0.0, 1: 0.0, 2: 0.0}
    better = {0: 2.0, 1: 1.5, 2: 2.5}  # p = 0.0202
    worse = {0: -2.0, 1: -1.5, 2: -2.5}
    noise = {0: 1.0, 1: -1.0, 2: 0.5}
    alone, below = compare(first, [better])[0], compare(first, [worse])[0]
    assert (alone.verdict, below.verdict) == ("higher", "lower")
    among = compare(first, [better, noise, noise])
    assert [one.verdict for one in among] == ["not shown after Holm's correction", "not shown", "not shown"]
    assert among[0].adjusted == pytest.approx(3 * alone.p)
    assert not any(one.is_shown for one in among)


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [
        ({0: 70.0}, {0: 90.0}, "one run each: no statement"),
        ({0: 70.0}, {1: 90.0}, "one run each: no statement"),
        ({0: 70.0, 1: 71.0}, {1: 90.0}, "one common seed: no statement"),
        ({0: 70.0, 1: 71.0}, {2: 90.0, 3: 91.0}, "no common seed: no statement"),
        ({0: 70.0, 1: 71.0}, {0: 72.1, 1: 73.1}, "no spread over seeds: no statement"),
        ({0: 70.0, 1: 71.0}, {0: 70.0, 1: 71.0}, "not shown"),
        ({0: 70.0, 1: 71.0}, {0: 72.0, 1: 74.0}, "not shown"),
        ({}, {0: 72.0}, "no common seed: no statement"),
    ],
)
def test_runs_that_support_nothing_get_no_statement(first: dict, other: dict, verdict: str) -> None:
    (found,) = compare(first, [other])
    assert (found.verdict, found.is_shown) == (verdict, False)
    assert found.p is None or verdict == "not shown"
