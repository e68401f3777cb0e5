"""Tests of a task that runs out of memory or time, or fails."""

import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from karat_scale.commands.bench.gpu.worker import Budget, Task
from tests.commands.bench.gpu.task import Kept, make_task


def test_out_of_memory_halves_the_batch_and_says_so() -> None:
    task, told = make_task()

    done: list[int] = []

    def attempt(batch: int) -> None:
        torch.empty(2**60 if batch > 32 else 1, dtype=torch.uint8)
        done.append(batch)

    task.halving("ViT-Base", 128, attempt)
    assert done == [32]
    assert told["notice"] == [
        "ViT-Base: out of memory with a batch of 128, so it is 64",
        "ViT-Base: out of memory with a batch of 64, so it is 32",
    ]
    task.halving("ViT-Base", 64, attempt, least=64)
    assert "allocate memory" in told["failed"][0]["why"]


def test_another_failure_is_told_and_not_tried_again_but_a_crash_of_a_kernel_ends_the_section() -> None:
    task, told = make_task()
    attempt = Mock(side_effect=ValueError("no such model\nnowhere"))
    task.halving("ViT-Base", 128, attempt)
    attempt.assert_called_once_with(128)
    assert told == {"failed": [{"what": "ViT-Base", "why": "ValueError: no such model"}]}
    crash = Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        task.halving("ViT-Base", 128, crash)


@pytest.mark.parametrize(("capability", "measured"), [((7, 5), "auto"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_a_card_that_is_too_old_for_the_kernels_is_measured_as_it_would_train(
    capability: tuple[int, int], measured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert Task("cuda", Budget(1.0), Kept(), Path("unused")).implementation == measured


def test_work_begins_only_where_the_last_of_its_kind_would_have_fitted() -> None:
    budget = Budget(100.0)
    assert budget.allows("eager", 20.0)
    assert not budget.allows("compiled", 200.0)
    budget.note("eager", begun=-1e6)
    assert not budget.allows("eager", 20.0)
    budget.note("graphs", begun=time.monotonic() - 60.0, count=3)
    assert budget.allows("graphs", 50.0, count=4)
    assert not budget.allows("graphs", 1.0, count=6)
    assert Budget(-1.0).left == 0.0
