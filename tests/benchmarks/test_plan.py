"""Tests that the plan's memory is within a tenth of what is measured."""

import multiprocessing
from pathlib import Path

import pytest

from benchmarks.live_tensors import measure
from benchmarks.plan import CASES, STEPS, Case, compare, recipe_of
from karat_scale.commands.plan.memory import Machine, Subject, consider
from karat_scale.recipe import Recipe
from tests.conftest import free_port
from tests.engine.fp16_on_cpu import allow_fp16


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_live_tensors_peak_where_the_plan_says(case: Case) -> None:
    assert abs(compare(case)["error"]) < 0.1


def measure_fp16(recipe: Recipe, port: int) -> int:
    allow_fp16()
    return measure(recipe, 0, 1, port, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "images"), [("zero1", 16), ("zero1", 4), ("zero2", 4), ("zero3", 16)])
def test_live_tensors_peak_where_the_plan_says_in_fp16(config: str, images: int, tmp_path: Path) -> None:
    keys = {"attention.kind": "softmax", "train.precision": "fp16", "train.micro_batch": images}
    recipe = recipe_of(Case(1, config, keys), str(tmp_path))
    planned = consider(Subject(recipe, False), Machine(1, 0, False), config, images).peak.total
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert abs(planned / pool.apply(measure_fp16, (recipe, free_port())) - 1) < 0.1
