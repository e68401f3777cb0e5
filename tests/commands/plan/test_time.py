"""What a step sends, and how long the links take, against sums done by hand."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from karat_scale.commands.cli import main
from karat_scale.commands.plan.command import Request, make_plan
from karat_scale.commands.plan.memory import Subject
from karat_scale.commands.plan.report import launch_note, show
from karat_scale.commands.plan.time import (
    LATENCY_BETWEEN,
    LATENCY_WITHIN,
    MATRIX_EFFICIENCY,
    REACHED,
    ComputeTime,
    DataNeed,
    Links,
    Node,
    StepLaunches,
    Traffic,
    compute_seconds,
    curve,
    estimate,
    find_measured,
    seconds,
    step_seconds,
    traffic,
)
from karat_scale.commands.plan.tracing import OPERATOR_BACKWARD, OPERATOR_FORWARD, PSI_BACKWARD, PSI_FORWARD, Launches
from karat_scale.foundation.machine import find_gpu
from karat_scale.models.flops import flops_per_image
from karat_scale.recipe import Recipe, TrainConfig
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL

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
    softmax, content = (launches_of(small_recipe(key)) for key in ("attention.kind=softmax", "attention.form=content"))
    assert fp32.products - softmax.products == 2 * (OPERATOR_FORWARD + OPERATOR_BACKWARD - 4)
    assert content.products - fp32.products == 2 * (PSI_FORWARD + PSI_BACKWARD)
    assert bf16.products == fp32.products
    assert bf16.others > fp32.others + 2 * 4 * 2  # a weight and an input for each linear layer


def test_a_compiler_launches_less_and_a_graph_costs_the_host_almost_nothing() -> None:
    eager, compiled, graphed = (
        StepLaunches.of(SOME, TrainConfig(compile=mode), STAGE_0, SIZES, 12)
        for mode in (False, "default", "reduce-overhead")
    )
    assert eager.micro_batch == 700
    assert compiled.micro_batch == graphed.micro_batch == 400
    assert eager.host(1) > compiled.host(1) > graphed.host(1)
    assert eager.gaps(1) > compiled.gaps(1) == graphed.gaps(1)


def test_a_step_takes_as_long_as_the_slower_of_host_and_gpu() -> None:
    time = ComputeTime(image=1e-4, source="", launches=StepLaunches.of(SOME, TrainConfig(), STAGE_0, SIZES, 12))
    assert time.seconds(1, 1) == time.host(1) == pytest.approx(740 * 10e-6)
    assert time.seconds(1000, 2) == time.device(1000, 2) == pytest.approx(0.2 + time.device(0, 2))
    least = time.least_micro_batch(1)
    assert time.is_bound_by_launches(least // 2, 1)
    assert not time.is_bound_by_launches(least, 1)
    measured = ComputeTime(image=1e-4, source="")
    assert (measured.seconds(1, 1), measured.is_bound_by_launches(1, 1)) == (1e-4, False)


@pytest.mark.parametrize(("compiles", "expected"), [("default", [160.0, 640.0]), ("reduce-overhead", [None, 640.0])])
def test_a_shared_global_batch_is_not_accumulated_by_recorded_graphs(compiles: str, expected: list[float]) -> None:
    keys = ("data.path=.", "train.global_batch=64", f"train.compile={compiles}")
    time = ComputeTime(0.0, "", StepLaunches(0, 0, host_micro_batch=0.1, host_step=0.0))
    found = curve(load_recipe("imagenet_vit_tiny", keys), 1, {}, 16, time, Node(8, Links(1e30, 1e30)))
    assert [found[0].strong, found[2].strong] == [pytest.approx(rate, rel=1e-3) if rate else None for rate in expected]


@pytest.mark.slow
def test_a_plan_names_the_batch_that_is_not_bound_by_launches(small_recipe: Load) -> None:
    small = make_plan(small_recipe(), Request(gpus=2, gpu="h100-80"))
    note = launch_note(small)
    assert small.step is not None
    assert small.time is not None
    assert small.step >= small.time.host(1)
    assert note.endswith(" would end that,\n  and so would train.compile=reduce-overhead")
    found = re.search(r"train.micro_batch=(\d+) train.global_batch=(\d+) \(which is another training\)", note)
    assert found
    assert int(found[2]) == 2 * int(found[1])
    batch = (f"train.micro_batch={found[1]}", f"train.global_batch={found[2]}", f"data.synthetic_samples={found[2]}")
    enough = small_recipe(*batch)
    assert launch_note(make_plan(enough, Request(gpus=2, gpu="h100-80"))) == ""


@pytest.mark.parametrize(
    ("batch", "advice"), [(2500, "train.micro_batch=1250"), (1500, "train.micro_batch=1500"), (999, "micro_batch=1024")]
)
def test_the_advice_is_a_batch_that_a_rank_can_take(batch: int, advice: str, small_recipe: Load) -> None:
    plan = make_plan(
        small_recipe(f"train.global_batch={batch}", "augment.mix_prob=0", "data.synthetic_samples=4000"),
        Request(memory=80.0),
    )
    time = SimpleNamespace(
        is_bound_by_launches=lambda *_: True, host=lambda *_: 1.0, device=lambda *_: 0.5,
        launches=SimpleNamespace(micro_batch=9, step=9), least_micro_batch=lambda _: 1024,
    )  # fmt: skip
    assert advice in launch_note(replace(plan, time=time))


H100 = "NVIDIA H100 80GB HBM3"
RATE = 80_000.0


def leave_a_run(recipe: Recipe, world: int, device: str = H100, rate: float = RATE) -> None:
    """Write the files of a finished run of `recipe` that the plan reads."""
    run = Path(recipe.run.dir)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    start = {"event": "start", "device": device, "world_size": world}
    events = start, {"event": "train", "images_per_second": rate}
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_another_device_and_a_damaged_recipe_are_told(small_recipe: Load) -> None:
    leave_a_run(small_recipe(), 1)
    assert "it ran on NVIDIA H100" in find_measured(small_recipe(), None)[1]
    (Path(small_recipe().run.dir) / "recipe.yaml").write_text("model: 3\n")
    assert "model = 3" in find_measured(small_recipe(), find_gpu("h100-80"))[1]


def test_rates_are_those_of_the_last_start_that_has_any(small_recipe: Load) -> None:
    leave_a_run(small_recipe("train.global_batch=32"), 16)
    events: list[dict[str, object]] = []
    for world, rate, steps in ((8, RATE / 2, 60), (16, RATE, 40), (1, 0.0, 0)):  # the last finds a finished run
        events.append({"event": "start", "device": H100, "world_size": world})
        events += [{"event": "train", "images_per_second": rate}] * steps
    log = Path(small_recipe().run.dir) / "metrics.jsonl"
    log.write_text("\n".join(map(json.dumps, events)) + "\n")
    found, _ = find_measured(small_recipe(), find_gpu("h100-80"))
    assert found is not None
    assert (found.rate, found.world) == (RATE, 16)
    log.write_text(json.dumps({"event": "start"}) + "\n" + json.dumps(events[1]) + "\n")
    assert "do not say on what it ran" in find_measured(small_recipe(), find_gpu("h100-80"))[1]


def test_a_run_whose_images_grew_is_not_used(small_recipe: Load) -> None:
    leave_a_run(small_recipe("schedule.image_sizes=[[0,8],[1,16]]", "train.epochs=2"), 1)
    assert "its images grew" in find_measured(small_recipe(), find_gpu("h100-80"))[1]


def test_blocks_that_recompute_take_their_products_twice(small_recipe: Load) -> None:
    gpu, footprint = find_gpu("h100-80"), Subject(small_recipe(), on_gpu=True).footprint
    assert gpu is not None
    none, every, whole = (
        estimate(small_recipe(f"train.recompute.policy={policy}"), gpu, footprint, STAGE_0, SIZES).image
        for policy in ("none", "every", "all")
    )
    flops = flops_per_image(small_recipe().model, small_recipe().attention)
    assert whole - none == pytest.approx(flops.forward / (MATRIX_EFFICIENCY * gpu.peaks["tf32"]))
    assert every - none == pytest.approx((whole - none) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero0", "zero3"])
def test_a_measured_rate_holds_its_own_collectives_already(small_recipe: Load, config: str, tmp_path: Path) -> None:
    own = tmp_path / "own.json"  # a name of its own keeps the plan from choosing another stage
    own.write_text(json.dumps({"zero_optimization": {"stage": int(config[-1])}, "zero_allow_untested_optimizer": True}))
    keys = (f"deepspeed.config={own}", "model.embed_dim=256", "train.global_batch=256", "data.synthetic_samples=256")
    leave_a_run(small_recipe(*keys), 4, rate=256 / 0.01)
    same, alone, more = (make_plan(small_recipe(*keys), Request(gpus=gpus, gpu="h100-80")) for gpus in (4, 1, 16))
    assert same.communication > 0
    assert same.step == pytest.approx(0.01)
    if config == "zero0":
        assert alone.step < 4 * (0.01 - same.communication)
        assert more.step > (0.01 - same.communication) / 4 + more.communication


def test_a_measured_time_is_carried_to_another_micro_batch_as_the_estimate_is(small_recipe: Load) -> None:
    """Before the fix it was proportional to the micro batch, as if launches took no time."""
    keys = ("train.global_batch=64", "data.synthetic_samples=256", "train.micro_batch=8")
    estimated = [make_plan(small_recipe(*keys), Request(gpus=8, gpu="h100-80"))]
    leave_a_run(small_recipe(*keys), 8, rate=64 / (2 * estimated[0].step))
    measured = [make_plan(small_recipe(*keys), Request(gpus=8, gpu="h100-80"))]
    assert measured[0].time.source.endswith(f"on {H100}")
    assert measured[0].step == pytest.approx(2 * estimated[0].step)
    others = ("train.global_batch=64", "data.synthetic_samples=256", "train.micro_batch=64")
    measured.append(make_plan(small_recipe(*others), Request(gpu="h100-80")))
    assert "with 8 images a micro batch, and scaled" in measured[1].time.source
    Path(small_recipe().run.dir, "metrics.jsonl").unlink()
    estimated.append(make_plan(small_recipe(*others), Request(gpu="h100-80")))
    assert launch_note(estimated[1]) != ""
    compute = [plan.step - plan.communication for plan in (measured[0], estimated[0])]
    assert measured[1].step == pytest.approx(compute[0] / compute[1] * estimated[1].step, rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ((), ""),
        (("optim.lr=1e-4", "data.synthetic_samples=64"), ""),  # these do not set the speed
        (("model.depth=3",), "it ran with model.depth = 2"),
        (("attention.implementation=streaming",), "it ran with attention.implementation = auto"),
        (("train.precision=bf16",), "it ran with train.precision = fp32"),
        (("train.tf32=false",), "it ran with train.tf32 = True"),
        (("distill.from=timm:vit_tiny_patch16_224",), "it ran with distill.from = (empty)"),
        (("train.recompute.policy=all", "augment.run_on=device"), "it ran with augment.run_on = workers, and 1 more"),
    ],
)
def test_a_run_of_another_speed_is_not_used_and_the_plan_says_why(small_recipe, keys, reason) -> None:
    assert find_measured(small_recipe(*keys), find_gpu("h100-80")) == (None, "")
    leave_a_run(small_recipe(), 1)
    found, why = find_measured(small_recipe(*keys), find_gpu("h100-80"))
    assert (found is None) == bool(reason)
    assert f"is not used: {reason}" in why if reason else why == ""


def test_a_run_faster_than_its_collectives_would_be_is_not_used(small_recipe: Load, capsys) -> None:
    """Two ranks of one node were faster than two nodes of one GPU could be, as which the plan counts them."""
    leave_a_run(small_recipe(), 2, "Tesla V100-SXM2-32GB", rate=1e9)
    plan = make_plan(small_recipe(), Request(gpu="v100-32", gpus_per_node=1))
    assert plan.step is not None
    assert plan.step > 0
    show(plan)
    out = capsys.readouterr().out
    assert f"what {small_recipe().run.dir} measured is not used: with --gpus-per-node 1, its collectives" in out
    assert "(estimated from operations, bytes and launches)" in out


@pytest.mark.slow
def test_a_plan_times_the_recipes_own_data(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, figures = tmp_path / "small.yaml", tmp_path / "plan.json"
    recipe.write_text(f"data: {{path: {shards}}}\n")
    small = (*SMALL, "schedule.warmup_epochs=0")
    options = ("--gpu", "a100-80", "--cores-per-gpu", "3", "--json", str(figures))
    assert main(["plan", str(recipe), *small, *options]) == 0
    data = json.loads(figures.read_text())["data"]
    assert data["cores"] == 2
    assert data["per_core"] > 0
    printed = capsys.readouterr().out
    assert "a core of this machine makes" in printed
    assert main(["plan", str(recipe), *small, "data.path=/nowhere", *options]) == 0
    assert "data: not timed here: data.path = /nowhere is not a directory" in capsys.readouterr().out
    why = json.loads(figures.read_text())["data"]["why"]
    assert why == "data.path = /nowhere is not a directory"


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (DataNeed(42_000, 300, 88), "BOUND BY DATA: the GPUs take 42,000 images a second, a core of this machine"),
        (DataNeed(42_000, 300, 88), "and 88 cores make 26,400;\n  use augment.run_on=device, more cores"),
        (DataNeed(42_000, 300, 88, on_device=True), "\n  use more cores"),
        (DataNeed(15_000, 300, 88), "so 50.0 of 88 cores are busy: training does not wait for data"),
    ],
)
def test_the_cores_that_data_needs_are_counted(need: DataNeed, said: str) -> None:
    assert said in "\n".join(need.lines())
    assert need.is_bound == (need.needed == 42_000)
