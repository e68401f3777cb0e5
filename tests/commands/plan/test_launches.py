"""How many kernels a step is counted to launch, and when launching them takes longer than running them."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from karat_scale.commands.plan.command import Request, make_plan
from karat_scale.commands.plan.memory import Subject
from karat_scale.commands.plan.report import launch_note
from karat_scale.commands.plan.time import ComputeTime, StepLaunches
from karat_scale.commands.plan.tracing import OPERATOR_BACKWARD, OPERATOR_FORWARD, PSI_BACKWARD, PSI_FORWARD, Launches
from karat_scale.recipe import Recipe, TrainConfig

Load = Callable[..., Recipe]
SOME = Launches(products=200, others=500)
STAGE_0 = {"zero_optimization": {"stage": 0}}
SIZES = [20] * 100 + [80] * 50


def launches_of(recipe: Recipe) -> Launches:
    return Subject(recipe, on_gpu=True).footprint.launches


def test_each_operation_counts_its_kernels() -> None:
    aten, ours = torch.ops.aten, torch.ops.karat_scale
    products = [aten.mm.default, aten.addmm.default, ours.triton_forward.default, ours.triton_backward.default]
    others = [aten.add.Tensor, aten.native_layer_norm_backward.default]
    assert Launches.of([*products, *others]) == Launches(2 + OPERATOR_FORWARD + OPERATOR_BACKWARD, 1 + 2)


def test_a_trace_counts_what_runs_and_neither_views_nor_allocations(small_recipe: Load) -> None:
    found = launches_of(small_recipe("attention.kind=softmax", "augment.mix_prob=0"))
    blocks = 2
    # One product forward and two backward for qkv, proj, fc1 and fc2; attention 1 and 3. Outside blocks the
    # patch embedding (1 and 3) and the head.
    assert found.products == blocks * (4 * 3 + 4) + 4 + 3
    # In a block, forward: 2 norms, 2 sums, GELU. Backward: 2 norms (2 each), 4 biases, GELU, 2 sums of gradients, and
    # q, k and v put together. A few more outside.
    assert blocks * 15 <= found.others <= blocks * 18 + 25


@pytest.mark.slow
def test_karat_adds_its_own_kernels_and_autocast_its_casts(small_recipe: Load) -> None:
    fp32, bf16 = (launches_of(small_recipe(f"train.precision={precision}")) for precision in ("fp32", "bf16"))
    softmax = launches_of(small_recipe("attention.kind=softmax"))
    assert fp32.products - softmax.products == 2 * (OPERATOR_FORWARD + OPERATOR_BACKWARD - 4)
    assert bf16.products == fp32.products
    assert bf16.others > fp32.others + 2 * 4 * 2  # a weight and an input for each linear layer


def test_the_content_form_adds_the_kernels_of_psi(small_recipe: Load) -> None:
    plain, content = (launches_of(small_recipe(f"attention.form={form}")) for form in ("modular", "content"))
    assert content.products - plain.products == 2 * (PSI_FORWARD + PSI_BACKWARD)


def test_a_compiler_launches_less_and_a_graph_costs_the_host_almost_nothing() -> None:
    eager, compiled, graphed = (
        StepLaunches.of(SOME, TrainConfig(compile=mode), STAGE_0, SIZES, 12)
        for mode in (False, "default", "reduce-overhead")
    )
    assert eager.micro_batch == 700
    assert compiled.micro_batch == graphed.micro_batch == 400
    assert eager.host(1) > compiled.host(1) > graphed.host(1)
    assert eager.gaps(1) > compiled.gaps(1) == graphed.gaps(1)


def test_what_a_stage_launches_beside_the_model() -> None:
    def beside(stage: int, precision: str = "bf16", **zero: Any) -> tuple[int, int]:
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 2000, **zero}}
        found = StepLaunches.of(SOME, TrainConfig(precision=precision), config, SIZES, 12)
        return found.micro_batch - SOME.kernels(compiled=False), found.step

    flat: Any = {"contiguous_gradients": False}
    three_buckets, copies = 9, 225
    assert beside(0) == (0, 40)
    assert beside(1, **flat) == (0, 50 + three_buckets)
    assert beside(2, **flat) == (three_buckets, 50)
    assert beside(1) == (0, 50 + three_buckets + copies)
    assert beside(2) == (three_buckets + copies, 50)
    assert beside(2, "bf16_weights", **flat) == beside(2)
    assert beside(3, "bf16_weights", **flat) == beside(3, **flat) == (three_buckets, 50)
    assert beside(3, **flat, stage3_param_persistence_threshold=60) == (three_buckets + 50, 50)
    assert beside(2, **flat, offload_optimizer={"device": "cpu"}) == (three_buckets + 675, 50)


def test_a_step_takes_as_long_as_the_slower_of_host_and_gpu() -> None:
    time = ComputeTime(image=1e-4, source="", launches=StepLaunches.of(SOME, TrainConfig(), STAGE_0, SIZES, 12))
    assert time.seconds(1, 1) == time.host(1) == pytest.approx(740 * 10e-6)
    assert time.seconds(1000, 2) == time.device(1000, 2) == pytest.approx(0.2 + time.device(0, 2))
    least = time.least_micro_batch(1)
    assert time.is_bound_by_launches(least // 2, 1)
    assert not time.is_bound_by_launches(least, 1)
    measured = replace(time, launches=None)
    assert (measured.seconds(1, 1), measured.is_bound_by_launches(1, 1)) == (1e-4, False)


@pytest.mark.slow
def test_a_plan_names_the_batch_that_is_not_bound_by_launches(small_recipe: Load) -> None:
    small = make_plan(small_recipe(), Request(gpus=2, gpu="h100-80"))
    note = launch_note(small)
    assert small.step is not None
    assert small.time is not None
    assert small.step >= small.time.host(1)
    found = re.search(
        r"train.micro_batch=(\d+) train.global_batch=(\d+),\n  or with train.compile=reduce-overhead$", note
    )
    assert found
    assert int(found[2]) == 2 * int(found[1])
    enough = small_recipe(f"train.micro_batch={found[1]}", f"train.global_batch={found[2]}")
    assert launch_note(make_plan(enough, Request(gpus=2, gpu="h100-80"))) == ""
