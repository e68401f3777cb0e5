"""What a step sends, and how long the links take, against sums done by hand."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from karat_scale.commands.plan.time import (
    LATENCY_BETWEEN,
    LATENCY_WITHIN,
    REACHED,
    Links,
    Traffic,
    compute_seconds,
    links_of,
    seconds,
    step_seconds,
    traffic,
)

LINKS = Links(within=100e9, between=10e9)


def test_what_each_stage_sends() -> None:
    def sent(stage: int, precision: str) -> float:
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 400}}
        return traffic(1000, config, 2, precision).sent(4)

    for precision, size in (("bf16", 4000), ("fp32", 4000), ("bf16_weights", 2000), ("fp16", 2000)):
        assert sent(1, precision) == (2 * size + size) * 3 / 4
        assert sent(2, precision) == (2 * 2 * size + size) * 3 / 4
        assert sent(3, precision) == 2 * (size + size) * 3 / 4
    assert sent(0, "bf16") == sent(0, "fp32") == traffic(1000, {}, 2, "bf16").sent(4) == 2 * 4000 * 3 / 4


def test_time_is_bytes_over_the_narrowest_link_and_the_latency_of_the_shorter_way() -> None:
    load = Traffic(all_reduced=8e9, gathered=0, scattered=0, calls=1)
    assert seconds(load, 1, 8, LINKS) == 0
    within = 2 * 8e9 * 3 / 4 / (REACHED * 100e9) + 6 * LATENCY_WITHIN
    assert seconds(load, 4, 8, LINKS) == pytest.approx(within)
    between = 2 * 8e9 * 31 / 32 / (REACHED * 80e9) + 2 * (2 + 7) * LATENCY_BETWEEN
    assert seconds(load, 32, 8, LINKS) == pytest.approx(between)


def test_what_runs_beside_the_backward_pass_costs_what_outlasts_it() -> None:
    hidden, after, partly = (Traffic(1, 0, 0, 1, share) for share in (1.0, 0.0, 0.75))
    assert step_seconds(3.0, hidden, 1.0) == 3.0
    assert step_seconds(3.0, hidden, 5.0) == 6.0
    assert step_seconds(3.0, after, 1.0) == 4.0
    assert step_seconds(3.0, partly, 1.0) == 3.25
    assert step_seconds(3.0, replace(partly, passes=0.25), 4.0) == 6.5
    for load, communication in itertools.product((hidden, after, partly, replace(partly, passes=0.25)), (1.0, 5.0)):
        assert compute_seconds(step_seconds(3.0, load, communication), load, communication) == pytest.approx(3.0)


def test_the_weights_are_gathered_after_the_step_and_stage_1_reduces_in_the_last_micro_batch() -> None:
    def hidden(stage: int, precision: str = "bf16", **zero: Any) -> list[float]:
        load = traffic(1000, {"zero_optimization": {"stage": stage, **zero}}, 4, precision)
        return [load.hidden, load.passes]

    assert hidden(1, overlap_comm=True) == pytest.approx([2 / 3, 0.25])
    assert hidden(2, overlap_comm=True) == pytest.approx([8 / 9, 1])
    assert hidden(1)[0] == hidden(2)[0] == hidden(0, overlap_comm=True)[0] == 0
    assert hidden(1, "bf16_weights", overlap_comm=True)[0] == 0
    assert hidden(3) == hidden(3, overlap_comm=None) == [1, 1]


def test_gpus_without_nvlink_have_plain_links() -> None:
    assert links_of("h100-80").within > links_of("h100-pcie-80").within > links_of("rtx4090-24").within
