"""Histograms at every stage hold the weights that the model has."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from karat_scale.engine.reporting.interval import HeadHistograms
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter
from tests.conftest import karat
from tests.small_engines import CONFIGS, weights

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


@pytest.mark.parametrize("config", CONFIGS)
def test_each_head_at_each_stage(small_recipe, make_engine, tmp_path: Path, config: str) -> None:
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
def test_two_ranks_at_stage_3(recipe_file: Path, tmp_path: Path) -> None:
    own = ("deepspeed.config=zero3", "log.trackers=tensorboard", "log.histogram_every_steps=4", "train.epochs=1")
    done = karat("train", str(recipe_file), *own, processes=2)
    assert done.returncode == 0, done.stderr
    board = board_of(tmp_path / "run" / "tensorboard")
    assert sorted(board.Tags()["histograms"]) == sorted(HEADS)
    assert [event.step for event in board.Histograms(HEADS[0])] == [4, 8]
