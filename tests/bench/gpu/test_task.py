"""Running out of memory and of time."""

import pytest
import torch

from karat_scale.bench.gpu.budget import Budget
from tests.bench.gpu.task import make_task


def test_out_of_memory_halves_the_batch_and_says_so() -> None:
    task, told = make_task()

    def attempt(batch: int) -> int:
        torch.empty(2**60 if batch > 32 else 1, dtype=torch.uint8)
        return batch

    assert task.halving("ViT-Base", 128, attempt) == 32
    assert told["notice"] == [
        "ViT-Base: out of memory with a batch of 128, so it is 64",
        "ViT-Base: out of memory with a batch of 64, so it is 32",
    ]
    with pytest.raises(RuntimeError, match="allocate memory"):
        task.halving("ViT-Base", 64, attempt, least=64)


def test_another_failure_is_not_tried_again() -> None:
    task, told = make_task()

    def attempt(_batch: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        task.halving("ViT-Base", 128, attempt)
    assert not told


def test_work_begins_only_where_the_last_of_its_kind_would_have_fitted() -> None:
    budget = Budget(100.0)
    assert budget.allows("eager", 20.0)
    assert not budget.allows("compiled", 200.0)
    budget.note("eager", begun=-1e6)
    assert not budget.allows("eager", 20.0)
    assert Budget(-1.0).left == 0.0
