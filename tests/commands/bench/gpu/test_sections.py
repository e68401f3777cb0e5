"""The code paths for a card's sizes, run on a CPU with a small model: peaks, steps per round, the profiler."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from karat_scale.commands.bench.gpu import attention, loader, steps
from karat_scale.commands.bench.gpu.steps import Group, compare_attention
from tests.commands.bench.gpu.task import FullSizeTask, make_task


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report the allocator of a card, with 5 MB now and 9 MB at the peak."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9_000_000)


def test_attention_is_compared_with_the_backends_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOKENS", 16)
    monkeypatch.setattr(attention, "BATCH", 2)
    monkeypatch.setattr(attention, "CASES", (("tiny", "tf32"),))
    task, told = make_task(kind=FullSizeTask)
    attention.measure(task)
    rows = {row["attention"]: row for row in told["row"]}
    assert "KArAt G3 by FlexAttention" in rows
    assert {"SDPA, torch's choice", "SDPA, math", "KArAt G1", "KArAt G3", "KArAt content, G3"} <= set(rows)
    assert all(row["peak_mb"] == 4.0 and row["both_ms"] > 0 for row in rows.values())
    assert any(row["ratio_best"] == 1.0 for row in rows.values() if row["attention"].startswith("SDPA"))
    assert "cuDNN" in "".join(one["what"] for one in told["left_out"])
    assert "failed" not in told


def test_training_tells_memory_and_launches(tmp_path: Path, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steps._recipe
    toy, _ = make_task()
    monkeypatch.setattr(steps, "_recipe", lambda _task, *rest: real(toy, *rest))
    monkeypatch.setattr(steps, "SECONDS_A_ROUND", 0.01)
    task, told = make_task(kind=FullSizeTask, scratch=tmp_path)
    toy = replace(toy, scratch=tmp_path)
    compare_attention(task, world, Group("eager", "tiny", ("softmax", "KArAt G3")), 2)
    assert set(told) == {"row"}
    assert [row["attention"] for row in told["row"]] == ["softmax", "KArAt G3"]
    for row in told["row"]:
        assert row["peak_mb"] == 4.0
        assert row["kernels"] == row["launches"] == row["waits"] == 0


def test_a_loader_whose_library_is_missing_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loader.our_loaders
    monkeypatch.setattr(loader, "IMAGES", 8)
    monkeypatch.setattr(
        loader, "our_loaders", lambda *given: {k: v for k, v in real(*given).items() if k.startswith("nvjpeg")}
    )
    monkeypatch.setattr(loader, "whole_decoders", lambda *_: {})
    task, told = make_task(kind=FullSizeTask, scratch=tmp_path)
    loader.measure(task)  # nvJPEG needs a GPU, and there is none
    left_out = [one for one in told["left_out"] if one["what"].startswith("nvjpeg")]
    assert len(left_out) == 2
    assert all("set run.device=cuda, or data.backend=webdataset" in one["why"] for one in left_out)
    assert "failed" not in told
