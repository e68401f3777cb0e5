"""Four cheap cases of `karat bench plan`; the rest are slow. The plan is within a tenth of what is measured."""

import multiprocessing
from pathlib import Path

import pytest

from karat_scale.bench.live_tensors import measure
from karat_scale.bench.plan import CASES, STEPS, Case, compare, recipe_of
from karat_scale.plan.choose import Machine, consider
from karat_scale.plan.subject import Subject
from karat_scale.recipe import Recipe
from tests.conftest import free_port

CHEAP = (0, 1, 6, 12)
OTHERS = [case for number, case in enumerate(CASES) if number not in CHEAP]


@pytest.mark.parametrize("case", [CASES[number] for number in CHEAP], ids=lambda case: case.name)
def test_live_tensors_peak_where_the_plan_says(case: Case) -> None:
    assert abs(compare(case)["error"]) < 0.1


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_so_they_do_in_every_other_case(case: Case) -> None:
    assert abs(compare(case)["error"]) < 0.1


def measure_fp16(recipe: Recipe, port: int) -> int:
    """On a CPU, whose DeepSpeed does the arithmetic of fp16 once it is told that it may."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from karat_scale.train.deepspeed import engine

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.float16]
    engine.check_precision = lambda precision, device: None
    return measure(recipe, 0, 1, port, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "images"), [("zero1", 16), ("zero1", 4), ("zero2", 4), ("zero3", 16)])
def test_so_they_do_in_fp16(config: str, images: int, tmp_path: Path) -> None:
    keys = {"attention.kind": "softmax", "train.precision": "fp16", "train.micro_batch": images}
    recipe = recipe_of(Case(1, config, keys), str(tmp_path))
    planned = consider(Subject(recipe, False), Machine(1, 0, False), config, images).peak.total
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert abs(planned / pool.apply(measure_fp16, (recipe, free_port())) - 1) < 0.1
