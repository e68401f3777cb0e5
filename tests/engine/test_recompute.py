"""Recomputing under DeepSpeed is bit-equal, by its checkpoint or torch's, at each stage and on two ranks."""

import itertools

import pytest
import torch

from karat_scale.engine.engine import Engine
from karat_scale.engine.memory import apply_recompute
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from tests.engine.stage_jobs import Job, launch_jobs
from tests.small_engines import equal, train_once, weights

DEPTH = "model.depth=3"
DROPS = ("model.drop_path=0.3", "model.proj_drop=0.2")
METHODS = {"torch": ("train.recompute.method=torch",), "deepspeed": ("train.recompute.method=deepspeed",)}
POLICIES = {
    "attention": ("train.recompute.policy=attention",),
    "every": ("train.recompute.policy=every",),
    "all": ("train.recompute.policy=all",),
}


def train_with(recipe: Recipe, world) -> tuple[str, list[object]]:
    """Train three steps; return what is recomputed, and the gradient norms, final weights and random state."""
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.attention)
    torch.manual_seed(1)
    words = apply_recompute(model, recipe)
    engine = Engine(model, recipe, world, recipe.train.global_batch)
    norms = [train_once(engine, seed) for seed in range(3)]
    return words, [norms, weights(engine), torch.get_rng_state()]


slow = pytest.mark.slow


@pytest.mark.parametrize("drops", [pytest.param((), marks=slow), DROPS], ids=["plain", "with dropout"])
@pytest.mark.parametrize(
    ("config", "precision", "mode"),
    [
        ("zero0", "fp32", "blockwise"),
        pytest.param("zero0", "bf16", "universal", marks=slow),
        pytest.param("zero1", "bf16", "blockwise", marks=slow),
        pytest.param("zero2", "fp32", "universal", marks=slow),
        pytest.param("zero3", "fp32", "universal", marks=slow),
        pytest.param("zero3", "bf16", "blockwise", marks=slow),
        pytest.param("zero3_offload", "bf16", "universal", marks=slow),
    ],
)
def test_training_is_bit_equal(small_recipe, world, whole_zero3, config, precision, mode, drops) -> None:
    config = whole_zero3 if config == "zero3" else config
    settings = (f"deepspeed.config={config}", f"train.precision={precision}", f"attention.mode={mode}")
    fixed = (DEPTH, *drops, *settings)
    words, plain = train_with(small_recipe(*fixed), world)
    assert words == ""
    for method, policy in itertools.product(METHODS.values(), POLICIES.values()):
        words, outcome = train_with(small_recipe(*fixed, *method, *policy), world)
        assert equal(outcome, plain), (method, policy)
        assert words.startswith("recomputes ")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_stage_3_gives_weights_to_what_ends_in_a_layer(small_recipe, world, whole_zero3, method) -> None:
    """Without dropout a linear layer comes last. If recomputing ran to the end, its weight would be released early."""
    fixed = (DEPTH, f"deepspeed.config={whole_zero3}")
    _, plain = train_with(small_recipe(*fixed), world)
    _, outcome = train_with(small_recipe(*fixed, *METHODS[method], *POLICIES["all"]), world)
    assert equal(outcome, plain)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_with_partitioned_weights_train_bit_equal(tmp_path, whole_zero3) -> None:
    kinds = [(), *((*METHODS[m], *POLICIES[p]) for m, p in [("torch", "all"), ("torch", "attention")])]
    kinds += [(*METHODS["deepspeed"], *POLICIES["every"])]
    settings = (("fp32", "blockwise", ()), ("bf16", "universal", DROPS))
    jobs = [
        Job(whole_zero3, last=3, precision=precision, overrides=(DEPTH, *drops, f"attention.mode={mode}", *kind))
        for precision, mode, drops in settings
        for kind in kinds
    ]
    outcomes = launch_jobs(jobs, 2, tmp_path / "jobs")
    for first in range(0, len(outcomes), len(kinds)):
        assert outcomes[first : first + len(kinds)] == [outcomes[first]] * len(kinds)
