"""Which stage and micro batch a plan recommends, and what it counts."""

from collections.abc import Callable, Sequence

import pytest

from karat_scale.commands.plan.choose import STAGES, Choice, Machine, best, choose, consider, micro_batches
from karat_scale.commands.plan.memory import Subject
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
        pytest.param(("train.micro_batch=2",), 2, PLENTY, "zero0", 2, True, id="the recipe's own is kept"),
        pytest.param(GRAPHS, 2, 1000, None, 32, False, marks=SLOW, id="CUDA graphs do not accumulate"),
        pytest.param((), 2, 1000, None, None, False, marks=SLOW, id="nothing fits, so what needs least"),
        *(
            pytest.param((key, "deepspeed.config=zero2"), 2, PLENTY, config, None, True, marks=SLOW, id=key)
            for key, config in (("train.precision=fp16", "zero1"), ("optim.name=muon", "zero0"))  # others are refused
        ),
    ],
)
def test_the_choice(
    small_recipe: Load,
    keys: tuple[str, ...],
    gpus: int,
    memory: int,
    config: str | None,
    micro_batch: int | None,
    fits: bool,
) -> None:
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


def test_a_global_batch_that_does_not_divide_is_refused(small_recipe: Load) -> None:
    with pytest.raises(RecipeError, match="does not divide over 3 ranks"):
        on_gpus(small_recipe(), 3, PLENTY)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_fp16_is_counted_as_bf16_weights_where_deepspeed_treats_them_alike(small_recipe: Load, config: str) -> None:
    half, brain = (
        consider(Subject(small_recipe(f"train.precision={p}"), True), Machine(2, PLENTY, True), config, 4).peak
        for p in ("fp16", "bf16_weights")
    )
    assert half == brain


@pytest.mark.slow
def test_stage_1_widens_the_gradients_of_fp16(small_recipe: Load) -> None:
    recipe = small_recipe("train.precision=fp16", "model.embed_dim=512", "train.global_batch=2")
    subject = Subject(recipe, True)
    worst = consider(subject, Machine(1, PLENTY, True), "zero1", 2).peak
    weights, bucket = 4 * subject.sizes.total, 4 * 5_000_000
    assert worst.moment == "reduce"
    assert worst.parts["parameters"] == weights // 2
    flat_and_cast = 1.5 * min(weights, bucket)
    assert worst.parts["gradients"] + worst.parts["workspace"] == pytest.approx(2 * weights + flat_and_cast, rel=0.01)


@pytest.mark.slow
def test_muon_keeps_one_moment_of_a_matrix(small_recipe: Load) -> None:
    subject = Subject(small_recipe("optim.name=muon"), True)
    matrices = sum(subject.sizes.matrices)
    assert 0 < matrices < subject.sizes.total
    optimizer = consider(subject, Machine(1, PLENTY, True), "zero0", 8).peak.parts["optimizer"]
    assert optimizer == 8 * subject.sizes.total - 4 * matrices


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
def test_what_rests_between_steps_is_beside_an_evaluation(small_recipe: Load) -> None:
    def gradients(precision: str, configs: Sequence[str]) -> list[int]:
        subject = Subject(small_recipe("train.eval_batch=4096", f"train.precision={precision}"), on_gpu=True)
        moments = [consider(subject, Machine(4, PLENTY, True), config, 2).peak for config in configs]
        assert {moment.moment for moment in moments} == {"evaluate"}
        return [moment.parts["gradients"] for moment in moments]

    weights = 4 * Subject(small_recipe(), on_gpu=True).sizes.total
    assert gradients("bf16", STAGES) == [0, 0, 0, -(-weights // 4)]
    assert gradients("bf16_weights", STAGES[1:]) == [weights, 0, -(-weights // 4)]


@pytest.mark.slow
def test_bf16_keeps_fp32_weights_at_every_stage_and_bf16_weights_has_masters(small_recipe: Load) -> None:
    mixed, low = (Subject(small_recipe(f"train.precision={p}"), on_gpu=True) for p in ("bf16", "bf16_weights"))
    weights = 4 * mixed.sizes.total
    for config in STAGES:
        assert consider(mixed, Machine(1, PLENTY, True), config, 8).peak.parts["parameters"] == weights
    for config in STAGES[1:]:
        parts = consider(low, Machine(1, PLENTY, True), config, 8).peak.parts
        assert (parts["parameters"], parts["masters"]) == (weights // 2, weights)


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
def test_frozen_weights_have_neither_gradients_nor_moments(small_recipe: Load) -> None:
    def optimizer(*overrides: str) -> int:
        subject = Subject(small_recipe(*overrides), on_gpu=True)
        return consider(subject, Machine(1, PLENTY, True), "zero1", 2).peak.parts["optimizer"]

    assert optimizer("train.freeze=[blocks.*]") < optimizer() / 2
