"""What is measured while a run trains: times, losses, efficiency, histograms and traces."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from karat_scale.engine.reporting.interval import (
    MOST_WAITING,
    Efficiency,
    HeadHistograms,
    Interval,
    OwnTime,
    StepProfiler,
    device_peak,
    peak_memory_mb,
)
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter
from karat_scale.models.flops import flops_per_image
from karat_scale.recipe import TrainConfig
from tests.clock import Clock
from tests.conftest import karat_done
from tests.small_engines import equal, train_once, weights
from tests.streams import streams

__all__ = ["streams"]
CPU = torch.device("cpu")


def test_the_first_step_and_pauses_are_not_timed_also_if_the_time_is_taken_in_one() -> None:
    clock = Clock()
    interval = Interval(CPU, clock)
    clock.go(50.0)
    interval.finish_step()
    with interval.paused(), interval.paused():
        clock.go(7.0)
    clock.go(2.0)
    interval.finish_step()
    assert interval.take_time() == (1, 2.0)
    clock = Clock()
    interval = Interval(CPU, clock)
    interval.finish_step()
    clock.go(1.0)
    with interval.paused():
        assert interval.take_time() == (0, 1.0)
        clock.go(5.0)
    clock.go(0.5)
    assert interval.take_time() == (0, 0.5)


def test_the_stopwatch_waits_for_the_device_and_a_step_does_not(monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.go(10.0))
    interval = Interval(CPU, clock)
    interval._device = torch.device("cuda")
    interval.finish_step()  # the first one, which starts the stopwatch
    for _ in range(3):
        clock.go(1.0)
        interval.finish_step()
    assert clock.now == 113.0
    with interval.paused():
        clock.go(100.0)
    assert interval._seconds == 13.0  # what the device still had to do belongs to the steps


def test_losses_add_up_by_name_and_start_anew_and_norms_are_kept_as_they_were() -> None:
    interval = Interval(CPU)
    for loss in (1.0, math.nan, 2.0):
        interval.add_losses({"loss": torch.tensor(loss), "mask": torch.tensor(loss / 2)}, 1)
        interval.finish_step()
    losses, steps = interval.take_losses()
    assert (losses, steps) == ({"counted": 2.0, "loss": 3.0, "mask": 1.5}, 3)
    interval.add_losses({"loss": torch.tensor(5.0)}, 2)
    assert interval.take_losses() == ({"counted": 0.5, "loss": 2.5}, 0)
    assert losses["loss"] == 3.0
    norm = torch.tensor(1.5)
    for value in (1.5, math.inf, 2.5):
        interval.add_norm(norm.fill_(value))  # an engine may use its memory again
    assert interval.take_norms() == [1.5, math.inf, 2.5]
    assert interval.take_norms() == []


def test_peak_memory_is_this_processs() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = int(status["VmHWM"].split()[0])  # threads hold back some pages that they have not counted yet
    assert peak_memory_mb(CPU) >= 0.99 * kibibytes * 1024 / 1e6


def test_data_and_forward_passes_add_up_until_they_are_taken() -> None:
    clock = Clock()
    own_time = OwnTime(torch.device("cpu"), clock)
    with own_time.data():
        clock.go(2.0)
    clock.go(5.0)  # waiting for others is not its own
    with own_time.forward():
        clock.go(1.0)
    assert own_time.take() == 3.0
    assert own_time.take() == 0.0


def test_a_gpus_forward_passes_are_read_when_they_are_taken(streams) -> None:
    clock = Clock()
    own_time = OwnTime(torch.device("cuda"), clock)
    for _ in range(3):
        with own_time.forward():
            clock.go(7.0)  # the host's clock does not matter
            streams.notes.append("work")
    assert not any("waits" in note for note in streams.notes)
    assert own_time.take() == pytest.approx(3 * 2 / 1e3)  # the events are two notes apart, in milliseconds
    assert streams.notes.count("host waits for compute") == 3
    assert own_time.take() == 0.0


@pytest.mark.parametrize("is_done", [True, False])
def test_passes_that_are_done_do_not_pile_up(streams, is_done) -> None:
    own_time = OwnTime(torch.device("cuda"), Clock())
    streams.is_done = is_done
    passes = 10 * MOST_WAITING
    for _ in range(passes):
        with own_time.forward():
            pass
    assert (len(own_time._waiting) <= MOST_WAITING) == is_done
    assert not any("waits" in note for note in streams.notes)
    assert own_time.take() == pytest.approx(passes / 1e3)


def test_mfu_is_the_models_own_flops_over_the_peak_of_all_devices(small_recipe) -> None:
    recipe = small_recipe()
    flops = flops_per_image(recipe.model, recipe.attention).training
    efficiency = Efficiency(recipe, devices=4, peak=8.0 * flops)
    assert efficiency.figures(16.0) == {"tflops": pytest.approx(4 * flops / 1e12), "mfu": pytest.approx(0.5)}
    assert efficiency.figures(None) == {"tflops": None, "mfu": None}
    assert device_peak(CPU, recipe.train) is None
    assert Efficiency(recipe, devices=1, peak=None).figures(16.0).keys() == {"tflops"}


H100 = "NVIDIA H100 80GB HBM3"
PEAKS = [
    *((H100, "bf16", True, 989.4), (H100, "bf16_weights", True, 989.4)),
    *((H100, "fp32", False, 66.9), (H100, "fp32", True, 494.7), ("Tesla T4", "bf16", True, None)),
    *(("Tesla T4", "fp32", True, 8.1), ("Tesla T4", "fp16", True, 65.0), ("Some Accelerator", "bf16", True, None)),
]


def test_the_peak_is_that_of_the_precision_at_work(monkeypatch) -> None:
    for name, precision, tf32, teraflops in PEAKS:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peak = device_peak(torch.device("cuda"), TrainConfig(precision=precision, tf32=tf32))
        assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12)), (name, precision)


HEADS = [
    f"block {block}, {name}/head {head}"
    for block in (0, 1)
    for name in ("cos_coef", "sin_coef", "W")
    for head in (0, 1)
]


def board_of(directory: Path) -> EventAccumulator:
    board = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    board.Reload()
    return board


@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3_offload_params"])
def test_each_head_at_each_stage(small_recipe, make_engine, tmp_path, config) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", "log.trackers=tensorboard", "log.histogram_every_steps=5")
    engine = make_engine(recipe)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    histograms = HeadHistograms(engine, recipe.log, Reporter(PlainDisplay(), log))
    assert [step for step in range(1, 12) if histograms.due(step)] == [5, 10]
    histograms.write(5)
    log.close()
    (line,) = (tmp_path / "histograms.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["step"], sorted(event["histograms"])) == (5, sorted(HEADS))
    found = event["histograms"]["block 1, cos_coef/head 1"]
    names = [name for name, _ in engine.module.named_parameters()]
    coefficients = weights(engine)[names.index("blocks.1.attn.operator.cos_coef")][1]
    assert sum(found["counts"]) == coefficients.numel()
    ends = (coefficients.min().item(), coefficients.max().item())
    assert (found["edges"][0], found["edges"][-1]) == pytest.approx(ends)


def test_none_without_tensorboard_without_a_rate_and_without_operators(small_recipe, make_engine) -> None:
    reporter = Reporter(PlainDisplay(), None)
    for overrides in ((), ("log.trackers=tensorboard", "log.histogram_every_steps=null")):
        recipe = small_recipe(*overrides)
        assert not HeadHistograms(make_engine(recipe), recipe.log, reporter).due(1000)
    recipe = small_recipe("log.trackers=tensorboard", "attention.kind=softmax")
    assert not HeadHistograms(make_engine(recipe), recipe.log, reporter).due(1000)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_at_stage_3(recipe_file, tmp_path) -> None:
    own = ("deepspeed.config=zero3", "log.trackers=tensorboard", "log.histogram_every_steps=4", "train.epochs=1")
    karat_done("train", str(recipe_file), *own, processes=2)
    board = board_of(tmp_path / "run" / "tensorboard")
    assert sorted(board.Tags()["histograms"]) == sorted(HEADS)
    assert [event.step for event in board.Histograms(HEADS[0])] == [4, 8]


@pytest.fixture
def train_three(make_engine, small_recipe, world):
    """Return a function that trains up to step 3 under a profiler and returns the weights."""

    def train(profiler: StepProfiler, first: int = 1):
        engine = make_engine(small_recipe())
        for number in range(first, 4):
            with profiler.step(number):
                train_once(engine, seed=number)
        return weights(engine)

    return train


def test_the_chosen_steps_are_traced_and_change_nothing(train_three, world, tmp_path, capsys) -> None:
    reporter = Reporter(PlainDisplay(), None)
    plain = train_three(StepProfiler(None, tmp_path / "none", world, reporter))
    traced = train_three(StepProfiler((2, 3), tmp_path / "profile", world, reporter))
    assert equal(plain, traced)
    assert not (tmp_path / "none").exists()
    trace, table = sorted((tmp_path / "profile").iterdir())
    assert (trace.name, table.name) == ("rank-00000-steps-2-3.pt.trace.json", "rank-00000-steps-2-3.txt")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert "aten::addmm" in table.read_text()
    lines = [line for line in capsys.readouterr().out.splitlines() if "profiled" in line]
    assert len(lines) == 1
    assert "profiled steps 2 to 3" in lines[0]


def test_a_resumed_run_traces_the_rest_and_a_full_place_is_a_warning(train_three, world, tmp_path, capsys):
    train_three(StepProfiler((1, 3), tmp_path, world, Reporter(PlainDisplay(), None)), first=3)
    assert (tmp_path / "rank-00000-steps-3-3.txt").is_file()
    (tmp_path / "profile").write_text("in the way")
    train_three(StepProfiler((1, 1), tmp_path / "profile", world, Reporter(PlainDisplay(), None)))
    assert "warning: profile of steps 1 to 1 not written" in capsys.readouterr().out
