"""Tests of each benchmark at a small size: what it prints, and the figures in its file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import freed_memory, loaders, order, prepare, remote, resizing, variants
from benchmarks.attention_curve import growth
from karat_scale.foundation.errors import UserError
from tests.conftest import SMALL, benchmark

Measure = Callable[..., dict[str, Any]]
SLOW = pytest.mark.slow


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Return a function that runs a benchmark and returns its figures.

    A `main` function runs in this process, and a benchmark given by its name in a new one.
    """
    out = tmp_path / "figures.json"

    def run(main: Any, *arguments: str) -> dict[str, Any]:
        if isinstance(main, str):
            done = benchmark(main, *arguments, "--json", str(out))
            assert done.returncode == 0, done.stderr
            return {**json.loads(out.read_text()), "printed": done.stdout}
        assert not main([*arguments, "--json", str(out)])
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


def test_growth_is_the_exponent_of_a_power_law() -> None:
    assert growth([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth([5], [1.0]) is None


@SLOW
def test_a_curve_measures_every_length(measure: Measure) -> None:
    result = measure("attention_curve", "64", "128", "--batch", "1", "--rounds", "1")
    assert [row["tokens"] for row in result["rows"]] == [64, 128]
    assert "time grows as N^" in result["printed"]


def test_processor_time_is_finer_than_a_tick_of_the_kernel() -> None:
    before = loaders.processor_seconds_of_all()
    assert 0 < loaders.processor_seconds_of_all() - before < 1


@SLOW
@pytest.mark.parametrize("augment", ["crop", "paper"])
def test_the_loaders_of_other_libraries_are_measured_beside_ours(measure: Measure, augment: str) -> None:
    theirs, ours = "torch DataLoader, Pillow", "ExactLoader, shards"
    left_out = ["DALI, CPU"] if augment == "paper" else []
    small = ("--count", "8", "--batch", "2", "--rounds", "1", "--epochs", "1", "--augment", augment)
    only = [word for name in ("whole decode", ours, theirs, *left_out) for word in ("--only", name)]
    result = measure(loaders.main, *small, *only)
    rows = {row["loader"]: row for row in result["rows"]}
    assert set(rows) == {"whole decode", ours, theirs}
    assert list(result["not_measured"]) == left_out
    assert all(row["per_processor_second"] > 0 for row in rows.values())
    assert [rows[ours][f"{what}_{more}"] for what in ("lost", "repeated") for more in (0, 1)] == [0, 0, 0, 0]
    assert rows[theirs]["repeated_0"] == 4  # it has no state, so it begins the epoch again after one half
    assert rows[ours]["memory_mb"] > 0
    assert rows[ours]["prepare_mb"] > 0 == rows[theirs]["prepare_mb"]


@SLOW
def test_a_library_that_refuses_is_one_line() -> None:
    pytest.importorskip("torchdata", reason="torchdata is not installed: pip install -e '.[loaders]'")
    small = ("--count", "8", "--batch", "2", "--rounds", "1", "--epochs", "1")
    done = benchmark("loaders", *small, "--only", "torchdata StatefulDataLoader")  # it takes no other number of workers
    assert "|refused: AssertionError" in done.stdout
    assert not re.search("Traceback|found in sys.modules", done.stderr), done.stderr


def test_a_place_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 whole colour JPEGs, fewer than two batches of 32; use more images"):
        loaders.main([str(tmp_path)])
    with pytest.raises(UserError, match="--only tensorflow: no such loader; choose from: whole decode; "):
        loaders.main(["--only", "tensorflow"])


@SLOW
def test_freed_memory_that_is_kept_and_given_back_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    small = (*SMALL, "data.backend=synthetic", "data.synthetic_samples=32", "schedule.warmup_epochs=0")
    freed_memory.main(["cifar10_vit_nano_32px", *small, "--steps", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("kept", "given back", "given back / kept: "))


def test_both_orders_are_measured(measure: Measure, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--samples", "5000", "--batch", "50", "--block", "20", "--window", "10", "--path", str(shards))
    full, block = measure(order.main, *small)["rows"]
    assert "global batch 50" in capsys.readouterr().out
    assert (full["order"], block["order"]) == ("full", "block")
    # A batch of 50 of 5,000: about 45 of the 250 blocks in a full shuffle, at most the 10 of a window otherwise.
    assert 40 < full["blocks_per_batch"] < 50
    assert block["blocks_per_batch"] <= 10
    # Of 200 in a window, a batch of 50 has a neighbour with probability about 1 in 4.
    assert full["neighbours_together"] < 0.03
    assert 0.18 < block["neighbours_together"] < 0.28
    assert 0.9 < full["mean_shift"] < 1.1
    assert 0.85 < block["mean_shift"] < 1.15
    assert (full["reads_per_image"], block["reads_per_image"]) == (1, 0.05)
    assert min(full["cold_images_per_second"], block["cold_images_per_second"]) > 0


def test_preparing_is_measured_over_the_least_it_could_cost(measure: Measure) -> None:
    result = measure(prepare.main, "--images", "4", "--rounds", "1", "--resize", "64")
    assert (result["images"], result["resize"]) == (4, 64)
    assert min(result["resize_ratio"], result["copy_ratio"], result["check_ratio"]) > 0
    measured = {result["base"], prepare.OURS, prepare.COPY, prepare.DECODE, prepare.OURS_CHECK}
    assert measured <= set(result["milliseconds_an_image"])
    for option in (["--quality", "101"], ["--tar", "nowhere.tar"]):
        with pytest.raises(UserError, match=option[0]):
            prepare.main(option)


def test_disk_and_url_are_measured_in_turn(measure: Measure, shards: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")
    monkeypatch.setenv("KARAT_DATA_CACHE", str(tmp_path))
    small = ("--copies", "2", "--block", "8", "--window", "4", "--workers", "1", "--latency", "0.001", "--rounds", "1")
    result = measure(remote.main, "--path", str(shards), *small)
    assert "URL over disk, images by the clock: " in capsys.readouterr().out
    assert result["images"] == 128
    assert result["requests"] == result["ideal_requests"] >= 16
    assert 1 < result["bytes"] / result["ideal_bytes"] < 4
    assert result["ratio"] > 0


def test_smaller_images_have_fewer_bytes_and_other_pixels(measure: Measure) -> None:
    result = measure(resizing.main, "--images", "3", "--rounds", "1", "--resize", "64", "200")
    rows = {row["short_side"]: row for row in result["rows"]}
    assert list(rows) == ["as it was", "64", "200"]
    assert rows["64"]["mean_kb"] < rows["200"]["mean_kb"] < rows["as it was"]["mean_kb"]
    assert all(row["speed"] > 0 for row in rows.values())
    for figure in ("training_levels", "evaluation_levels"):
        assert rows["64"][figure] > rows["200"][figure] > rows["as it was"][figure]
    assert rows["as it was"]["evaluation_levels"] == 0
    assert rows["as it was"]["training_levels"] == pytest.approx(0, abs=0.1)
    assert rows["64"]["enlarged"] == 1


@SLOW
def test_a_save_is_measured_in_three_ways(measure: Measure, tmp_path: Path) -> None:
    small = ("--model", "vit_mini_patch4_28", "--image-size", "32", "--batch", "2", "--config", "zero1")
    result = measure("save", *small, "--rounds", "2", "--path", str(tmp_path))
    stalls = result["stall_seconds"]
    assert list(stalls) == ["DeepSpeed's save_checkpoint", "karat, blocking", "karat, beside training"]
    assert all(seconds > 0 for seconds in (*stalls.values(), result["resume_seconds"]))
    assert "beside training: complete after" in result["printed"]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@SLOW
@pytest.mark.multiprocess
def test_each_stage_is_compared_with_ddp(measure: Measure) -> None:
    small = ("--model", "vit_mini_patch4_28", "--image-size", "16", "--batch", "2", "--steps", "1", "--rounds", "2")
    result = measure("stages", *small)
    rows = result["rows"]
    assert [row["contender"] for row in rows] == ["DistributedDataParallel", "zero0", "zero1", "zero2", "zero3"]
    assert rows[0]["ratio_to_ddp"] == 1.0
    assert all(row["milliseconds_a_step"] > 0 for row in rows)
    assert "to DDP" in result["printed"]
    done = benchmark("stages", "--model", "vit_nothing", "--rounds", "1")
    assert done.returncode == 2
    assert "vit_nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_kind_of_attention_is_measured_over_softmax(measure: Measure) -> None:
    kinds = ["static", "content", "hybrid"]
    ratios = measure(variants.main, "--only", *kinds, "--batch", "1", "--tokens", "17", "--rounds", "1")["ratios"]
    assert list(ratios) == ["softmax", *kinds]
    assert ratios["softmax"] == 1
    assert min(ratios.values()) > 0
