"""Both oracles agree with the package's implementations, and a wrong one is found."""

import functools
import math
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from karat_scale.attention import functional, streaming
from karat_scale.attention.call import FourierCall
from karat_scale.commands.bench.gpu import kernels
from karat_scale.commands.bench.gpu.kernels import (
    BF16,
    FP16,
    FP32,
    LAYOUTS,
    TF32,
    Call,
    compiled_calls,
    core_calls,
    flex_calls,
    make_inputs,
    toy,
)
from tests.commands.bench.gpu.task import make_task


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.compile trace the operations and their derivatives without generating code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def test_every_topic_is_right_in_every_dtype() -> None:
    task, told = make_task()
    before = torch.backends.cuda.matmul.allow_tf32
    kernels.measure(task)
    assert set(told) == {"begin", "row"}
    assert all(row["right"] for row in told["row"])
    assert {row["dtype"] for row in told["row"]} == {BF16, FP16, FP32, TF32}
    assert {row["topic"] for row in told["row"]} == {
        call.topic for call in (*core_calls((BF16,)), *compiled_calls((BF16,)), *flex_calls())
    }
    assert told["row"][0]["dtype"] == BF16
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("harm", [1.01, math.nan])
def test_a_wrong_implementation_is_found_out(harm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: FourierCall) -> torch.Tensor:
        return streaming.attend(call) * harm

    monkeypatch.setitem(functional.IMPLEMENTATIONS, "streaming", wrong)
    task, _ = make_task()
    row = kernels.check(next(toy(core_calls((FP32,)))), task)
    assert not row["right"]
    assert row["error"] > 5e-3


def test_a_kernel_that_is_wrong_only_under_torch_compile_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: FourierCall) -> torch.Tensor:
        return streaming.attend(call) * (1.01 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setitem(functional.IMPLEMENTATIONS, "streaming", wrong)
    task, _ = make_task()
    (compiled,) = toy(compiled_calls((FP32,)))
    assert kernels.check(replace(compiled, compiled=False), task)["right"]
    assert not kernels.check(compiled, task)["right"]


def test_a_refusal_is_left_out_and_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_at_mask(call: FourierCall) -> torch.Tensor:
        if call.mask is not None:
            raise RuntimeError("out of resources: shared memory\nmore")
        return streaming.attend(call)

    monkeypatch.setitem(
        functional.REFUSALS, "streaming", lambda call: "it has no bias" if call.bias is not None else None
    )
    monkeypatch.setitem(functional.IMPLEMENTATIONS, "streaming", fails_at_mask)
    task, told = make_task()
    kernels.measure(task)
    assert {one["why"] for one in told["left_out"]} == {"it has no bias"}
    assert {one["why"] for one in told["failed"]} == {"RuntimeError: out of resources: shared memory"}
    assert len(told["left_out"]) == len(told["failed"]) == 4
    assert all(row["right"] for row in told["row"])


def test_a_card_may_round_otherwise_than_this_cpu() -> None:
    *_, hardest = flex_calls()
    row = kernels.check(hardest, make_task()[0])
    assert row["error"] < 0.75 * row["tolerance"]


def test_what_memory_does_not_suffice_for_is_not_wrong() -> None:
    task, told = make_task()
    outcome: Future[dict[str, object]] = Future()
    outcome.set_exception(torch.OutOfMemoryError("CUDA out of memory"))
    assert kernels._reported(task, next(kernels.flex_calls()), outcome)
    assert [(one["why"], one["late"]) for one in told["left_out"]] == [("memory ran out", True)]
    assert "failed" not in told


def test_what_is_not_done_in_time_is_counted() -> None:
    task, told = make_task(seconds=0.0)
    kernels.measure(task)
    assert set(told) == {"left_out"}
    assert all(one["late"] for one in told["left_out"])
    calls = [*toy(core_calls((BF16, FP16, FP32, TF32))), *toy(compiled_calls((BF16, FP32))), *toy(flex_calls())]
    assert sum(int(one["what"].split()[0]) for one in told["left_out"]) == len(calls)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_differ_in_strides_only(layout: str) -> None:
    call = Call(FP32, tokens=5, width=4, layout=layout)
    tensors = make_inputs(call, "cpu").tensors
    plain = make_inputs(Call(FP32, tokens=5, width=4), "cpu").tensors
    expected = plain["query"][:1].expand_as(plain["query"]) if layout == "same for the batch" else plain["query"]
    assert torch.equal(tensors["query"], expected)
    odd = tensors["query"].stride() != plain["query"].stride() or tensors["query"].storage_offset() % 4
    assert bool(odd) == (layout != "contiguous")
