"""Which stage and micro batch a plan recommends, and what it counts."""

from collections.abc import Callable

import pytest

from karat_scale.commands.plan.memory import STAGES, Choice, Machine, Subject, best, choose, consider, micro_batches
from karat_scale.commands.plan.report import line
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe

Load = Callable[..., Recipe]
PLENTY = 10**12
SLOW = pytest.mark.slow
GRAPHS = ("train.compile=reduce-overhead", "train.global_batch=64")


def on_gpus(recipe: Recipe, gpus: int, memory: int) -> Choice:
    return choose(recipe, Machine(gpus, memory, True))


@pytest.mark.parametrize(
    ("keys", "gpus", "memory", "config", "micro_batch", "fits"),
    [
        pytest.param((), 2, PLENTY, "zero0", 4, True, marks=SLOW, id="the lowest stage takes the whole part"),
        pytest.param(("train.micro_batch=2",), 2, PLENTY, "zero0", 2, True, marks=SLOW, id="the recipe's own is kept"),
        pytest.param(GRAPHS, 2, 1000, None, 32, False, marks=SLOW, id="CUDA graphs do not accumulate"),
        pytest.param((), 2, 1000, None, None, False, marks=SLOW, id="nothing fits, so what needs least"),
        *(
            pytest.param((key, "deepspeed.config=zero2"), 2, PLENTY, config, None, True, marks=SLOW, id=key)
            for key, config in (("train.precision=fp16", "zero1"), ("optim.name=muon", "zero0"))  # others are refused
        ),
    ],
)
def test_the_choice(small_recipe, keys, gpus, memory, config, micro_batch, fits) -> None:
    recipe = small_recipe(*keys)
    choice = on_gpus(recipe, gpus, memory)
    assert choice.config == (config or choice.config)
    assert choice.micro_batch == (micro_batch or choice.micro_batch)
    assert choice.accumulation == recipe.train.global_batch // gpus // choice.micro_batch
    assert choice.fits == fits == (choice.needed <= memory)
    assert keys != GRAPHS or list(micro_batches(recipe, gpus)) == [32]


@pytest.mark.slow
def test_less_memory_takes_a_smaller_micro_batch_before_a_higher_stage(small_recipe: Load) -> None:
    recipe = small_recipe("train.global_batch=512")
    subject = Subject(recipe, on_gpu=True)
    needed = {m: consider(subject, Machine(2, 0, True), "zero0", m).needed for m in (256, 32)}
    choice = on_gpus(recipe, 2, (needed[256] + needed[32]) // 2)
    assert choice.config == "zero0"
    assert 32 <= choice.micro_batch < 256


@pytest.mark.slow
def test_where_no_micro_batch_fits_the_next_stage_is_taken(small_recipe: Load) -> None:
    recipe = small_recipe("model.embed_dim=512", "model.depth=4", "train.micro_batch=2", "train.precision=bf16")
    subject = Subject(recipe, on_gpu=True)
    needed = [best(subject, Machine(4, 0, True), config).needed for config in STAGES]
    assert needed[0] > needed[1] > needed[2]
    assert on_gpus(recipe, 4, needed[2]).config == "zero2"


def test_parts_add_up_and_shards_shrink_with_the_world(small_recipe: Load) -> None:
    subject = Subject(small_recipe("train.global_batch=64", "train.micro_batch=2"), on_gpu=False)
    alone, four = (consider(subject, Machine(world, PLENTY, False), "zero2", 2) for world in (1, 4))
    for choice in (alone, four):
        assert choice.needed == sum(choice.peak.parts.values()) + choice.margin
    assert four.peak.parts["optimizer"] == pytest.approx(alone.peak.parts["optimizer"] / 4, rel=1e-3)


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_gets_a_smaller_batch_and_training_stays(small_recipe: Load) -> None:
    recipe = small_recipe("train.eval_batch=1024")
    subject = Subject(recipe, on_gpu=True)
    whole = consider(subject, Machine(1, PLENTY, True), "zero0", 8)
    assert (whole.peak.moment, whole.eval_batch) == ("evaluate", 1024)
    choice = on_gpus(recipe, 1, whole.needed - 1)
    assert (choice.config, choice.micro_batch, choice.eval_batch, choice.fits) == ("zero0", 8, 512, True)
    assert "train.micro_batch=8 train.eval_batch=512 (1 a step)" in line(choice, recipe)
    assert "an evaluation with train.eval_batch = 1024 does not fit; 512 does" in line(choice, recipe)


@pytest.mark.slow
def test_triton_is_planned_without_a_gpu(small_recipe: Load) -> None:
    by_implementation = {
        name: Subject(small_recipe(f"attention.implementation={name}"), on_gpu=True).footprint
        for name in ("auto", "triton", "streaming")
    }
    assert (by_implementation["auto"].live(8) == by_implementation["triton"].live(8)).all()
    assert by_implementation["streaming"].live(8).max() != by_implementation["triton"].live(8).max()


def test_an_implementation_that_a_gpu_lacks_is_one_line(small_recipe: Load) -> None:
    with pytest.raises(RecipeError, match=r"attention.implementation = 'cpu'.*on a GPU"):
        _ = Subject(small_recipe("attention.implementation=cpu"), on_gpu=True).footprint


@pytest.mark.slow
def test_recomputation_is_tried_where_nothing_fits_without(small_recipe: Load) -> None:
    recipe = small_recipe("train.global_batch=2048", "train.micro_batch=1024")
    needed = on_gpus(recipe, 2, 1000).needed
    plain = consider(Subject(recipe, on_gpu=True), Machine(2, 0, True), "zero0", 1024).needed
    assert needed < plain
    choice = on_gpus(recipe, 2, needed + 10**6)
    assert (choice.recompute, choice.fits) == ("all", True)


@pytest.mark.slow
def test_moments_are_those_that_the_optimizer_keeps_of_what_learns(small_recipe: Load) -> None:
    def moments(*overrides: str) -> tuple[int, Subject]:
        subject = Subject(small_recipe(*overrides), on_gpu=True)
        return consider(subject, Machine(1, PLENTY, True), "zero0", 8).peak.parts["optimizer"], subject

    optimizer, subject = moments("optim.name=muon")
    assert 0 < sum(subject.sizes.matrices) < subject.sizes.total
    assert optimizer == 8 * subject.sizes.total - 4 * sum(subject.sizes.matrices)
    assert moments("train.freeze=[blocks.*]")[0] < moments()[0] / 2
