"""No stream of a training step uses memory before another is done with it, whatever a DeepSpeed file sets."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.engine.deepspeed_config import config_directory
from tests.conftest import ROOT, karat_environment
from tests.engine.clocks import Emulation, Event, Stream
from tests.selection import TURNS
from tests.warm import run_program

PRECISIONS = ("fp32", "bf16_weights", "fp16", "sent in bf16")
BOTH = (False, True)
SHARES = 2 * TURNS  # of all combinations: each takes about a minute
STAGE_3 = {
    "stage3_prefetch_bucket_size": (5000, 0, 5_000_000),
    "stage3_param_persistence_threshold": (0, 100_000, 100),
    "stage3_max_reuse_distance": (1_000_000_000, 0, 5000),
    "stage3_max_live_parameters": (1_000_000_000, 0),
}

Case = tuple[list[str], dict[str, Any]]


def case(zero: Mapping[str, Any], precision: str = "fp32", accumulation: int = 1, world: int = 2) -> Case:
    """Return the overrides of a recipe, and a DeepSpeed file."""
    overrides = [f"train.global_batch={2 * world * accumulation}"]
    if precision in ("bf16_weights", "fp16"):
        overrides.append(f"train.precision={precision}")
    sent = {"communication_data_type": "bf16"} if precision == "sent in bf16" else {}
    return overrides, {"zero_optimization": dict(zero), **sent}


def switches() -> Iterator[dict[str, Any]]:
    """Yield each stage's combinations of switches, without those where a switch has no effect."""
    names = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce")
    for stage, values in itertools.product((1, 2), itertools.product(BOTH, repeat=4)):
        zero = dict(zip(names, values, strict=True))
        is_reduced_whole = not (zero["contiguous_gradients"] and zero["reduce_scatter"])
        if not (is_reduced_whole and zero["use_multi_rank_bucket_allreduce"]):
            yield {"stage": stage, **zero}
    names = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "stage3_allgather_sequential")
    for values in itertools.product(BOTH, repeat=5):
        yield {"stage": 3, **dict(zip((*names, "stage3_use_all_reduce_for_fetch_params"), values, strict=True))}


def all_cases() -> list[Case]:
    """Return all switches with each precision, with and without accumulation, and with two bucket sizes.

    One bucket is smaller than a parameter, and the other is larger than all parameters together.
    """
    others = itertools.product(PRECISIONS, (1, 2), (3000, 5_000_000))
    found = []
    for number, (zero, (precision, accumulation, bucket)) in enumerate(itertools.product(switches(), list(others))):
        more = {key: values[number // 7 % len(values)] for key, values in STAGE_3.items()} if zero["stage"] == 3 else {}
        found.append(case({**zero, "reduce_bucket_size": bucket, **more}, precision, accumulation))
    return found


def shipped() -> list[Case]:
    """Return the files of ds_configs without offload, with two micro batches a step."""
    files = sorted(config_directory().glob("*.json"))
    return [(["train.global_batch=8"], json.loads(file.read_text())) for file in files if "offload" not in file.name]


def trained(cases: Sequence[Any], directory: Path, world: int, rank: int) -> list[dict[str, Any]]:
    """Run the cases as one rank; return what the emulation finds in each."""
    directory.mkdir()
    (directory / "cases.json").write_text(json.dumps(cases))
    arguments = [str(directory / "cases.json"), str(directory / "out.json"), str(world), str(rank)]
    done = run_program("tests.engine.clocks", arguments, [karat_environment()], timeout=3500, directory=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads((directory / "out.json").read_text())
    return found


def assert_in_order(cases: Sequence[Case], directory: Path, world: int = 2, rank: int = 0) -> None:
    for (overrides, config), found in zip(cases, trained(cases, directory, world, rank), strict=True):
        assert not found["races"], (overrides, config, found["races"])
        overlaps = config["zero_optimization"].get("overlap_comm", config["zero_optimization"]["stage"] == 3)
        is_plain = config["zero_optimization"]["stage"] == 0 or "train.precision=bf16_weights" in overrides
        assert is_plain or any(name.startswith("side") for name in found["works"]) == overlaps


def test_the_emulation_finds_what_is_not_ordered() -> None:
    emulation = Emulation()
    with emulation:
        side, data = Stream(), torch.zeros(8)
        with emulation.on(side):
            data.add_(1)  # before the zeros are written
        assert emulation.races
        emulation.races.clear()
        side.wait_stream(emulation.default)
        emulation.default.wait_stream(side)
        data[:4].mul_(2)
        event = emulation.default.record_event()
        with emulation.on(side):
            data[4:].mul_(2)  # other bytes
            event.wait()
            data.sum()
        assert not emulation.races
        del data
        torch.ones(8)  # may be in the same memory
        assert "memory of default is used again while aten.sum.default on side 2 needs it" in emulation.races


def test_an_event_orders_what_came_before_it() -> None:
    emulation = Emulation()
    with emulation:
        side, data, event = Stream(), torch.zeros(8), Event()
        event.record()
        data.add_(1)
        with emulation.on(side):
            event.wait()
            data.sum()
        assert list(emulation.races) == ["aten.sum.default on side 2 reads what aten.add_.Tensor on default writes"]


@pytest.mark.slow
def test_streams_are_in_order(tmp_path) -> None:
    """The shipped files, and the settings that raced before a fix, have no races."""
    once_wrong = [
        case({"stage": stage, "overlap_comm": True, "contiguous_gradients": contiguous, "reduce_scatter": scatter,
              "reduce_bucket_size": 3000}, "sent in bf16")
        for stage, contiguous, scatter in itertools.product((1, 2), BOTH, BOTH)
    ]  # fmt: skip
    assert_in_order([*shipped(), *once_wrong], tmp_path / "some")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1), (3, 2), (8, 0), (8, 3)])
def test_the_shipped_files_keep_streams_in_order_on_any_rank_with_any_bucket(world, rank, tmp_path) -> None:
    """The bucket is smaller than every parameter, smaller than some, or larger than all together."""
    cases: list[Case] = []
    stages = (1, 2) if rank else (1, 2, 3)  # at stage 3 each rank compares itself with rank 0, which is not there
    for stage, bucket, accumulation in itertools.product(stages, (1, 3000, 5_000_000), (1, 2)):
        zero = json.loads((config_directory() / f"zero{stage}.json").read_text())["zero_optimization"]
        precision = PRECISIONS[(len(cases) + world) % len(PRECISIONS)]
        cases.append(case({**zero, "reduce_bucket_size": bucket}, precision, accumulation, world))
    assert_in_order(cases, tmp_path / "shipped", world, rank)


@pytest.mark.slow
def test_gradients_whose_hooks_run_on_another_stream_are_reduced_after_they_are_written(tmp_path) -> None:
    cases = []
    for stage, contiguous, bucket, accumulation in itertools.product((1, 2), BOTH, (3000, 5_000_000), (1, 2)):
        zero = {"stage": stage, "contiguous_gradients": contiguous, "reduce_bucket_size": bucket, "overlap_comm": True}
        cases.append((*case(zero, accumulation=accumulation), True))
    for apart, found in zip(cases, trained(cases, tmp_path / "apart", 2, 0), strict=True):
        assert not found["races"], (apart, found["races"])


@pytest.mark.parametrize(
    "share", [pytest.param(number, marks=pytest.mark.slow(turn=number % TURNS)) for number in range(SHARES)]
)
def test_streams_are_in_order_in_every_combination(share, tmp_path) -> None:
    cases = all_cases()
    begin, end = (len(cases) * number // SHARES for number in (share, share + 1))
    assert_in_order(cases[begin:end], tmp_path / "share")
