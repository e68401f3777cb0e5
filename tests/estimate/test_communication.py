"""What a step sends, and how long the links take, against sums done by hand."""

import pytest

from karat_scale.estimate.communication import (
    LATENCY_BETWEEN,
    LATENCY_WITHIN,
    REACHED,
    Links,
    Traffic,
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
    assert sent(0, "bf16") == sent(0, "fp32") == 2 * 4000 * 3 / 4


def test_time_is_bytes_over_the_narrowest_link_and_the_latency_of_the_shorter_way() -> None:
    load = Traffic(all_reduced=8e9, gathered=0, scattered=0, calls=1, hidden=False)
    assert seconds(load, 1, 8, LINKS) == 0
    within = 2 * 8e9 * 3 / 4 / (REACHED * 100e9) + 6 * LATENCY_WITHIN
    assert seconds(load, 4, 8, LINKS) == pytest.approx(within)
    between = 2 * 8e9 * 31 / 32 / (REACHED * 80e9) + 2 * (2 + 7) * LATENCY_BETWEEN
    assert seconds(load, 32, 8, LINKS) == pytest.approx(between)


def test_what_runs_beside_the_backward_pass_costs_what_outlasts_it() -> None:
    hidden, after = (Traffic(1, 0, 0, 1, hidden) for hidden in (True, False))
    assert step_seconds(3.0, hidden, 1.0) == 3.0
    assert step_seconds(3.0, hidden, 5.0) == 6.0
    assert step_seconds(3.0, after, 1.0) == 4.0


def test_gpus_without_nvlink_have_plain_links() -> None:
    assert links_of("h100-80").within > links_of("h100-pcie-80").within > links_of("rtx4090-24").within
