"""A trace against what the same pass really allocates."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from karat_scale.estimate.footprint import Footprint
from karat_scale.estimate.subject import Subject
from karat_scale.estimate.tracing import Trace, fake_copy, trace_step
from karat_scale.models import create_model
from karat_scale.recipe import Recipe

Load = Callable[..., Recipe]
SIZE = 16


def trace_of(recipe: Recipe, batch: int, dtype: torch.dtype | None = None, autocast: bool = False) -> Trace:
    model = create_model(recipe.model, recipe.attention)
    return trace_step(model, fake_copy(model, dtype), batch, SIZE, autocast)


def really_allocated(recipe: Recipe, batch: int) -> tuple[int, int]:
    """Bytes alive after the forward pass and the loss, and at the worst moment, by torch's profiler."""
    model = create_model(recipe.model, recipe.attention)
    images, targets = torch.randn(batch, 3, SIZE, SIZE), torch.rand(batch, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = torch.sum(-targets * torch.log_softmax(model(images), dim=-1), dim=-1).mean()
        with torch.profiler.record_function("backward begins"):
            pass
        loss.backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    (border,) = [event.start_ns() for event in events if event.name() == "backward begins"]
    live = forward = peak = 0
    for time, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
        forward = live if time < border else forward
    return forward, peak


@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_a_trace_is_what_the_pass_allocates(small_recipe: Load, implementation: str) -> None:
    recipe = small_recipe(f"attention.implementation={implementation}")
    traces = {batch: trace_of(recipe, batch) for batch in (2, 4)}
    footprint = Footprint.through(traces)
    forward, peak = really_allocated(recipe, 8)
    assert sum(footprint.saved_by_part(8, footprint.forward - 1).values()) == pytest.approx(forward, rel=0.01)
    assert (footprint.live(8) + footprint.gradients_made).max() == pytest.approx(peak, rel=0.02)


def test_a_trace_of_an_evaluation_is_what_it_allocates(small_recipe: Load) -> None:
    recipe = small_recipe("attention.implementation=reference", "train.recompute.policy=all")
    footprint = Subject(recipe, on_gpu=False).evaluation()
    model, images = create_model(recipe.model, recipe.attention).eval(), torch.randn(8, 3, SIZE, SIZE)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(images)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    assert footprint.live(8).max() == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    "bf16", ["no", *(pytest.param(name, marks=pytest.mark.slow) for name in ("autocast", "model"))]
)
def test_the_line_through_two_traces_holds_for_another_batch(small_recipe: Load, bf16: str) -> None:
    recipe = small_recipe()
    dtype, autocast = (torch.bfloat16 if bf16 == "model" else None), bf16 == "autocast"
    line = Footprint.through({batch: trace_of(recipe, batch, dtype, autocast) for batch in (2, 4)})
    other = Footprint.through({batch: trace_of(recipe, batch, dtype, autocast) for batch in (6, 12)})
    assert line.live(6) == pytest.approx(other.live(6))
    parameters = sum(p.numel() for p in create_model(recipe.model, recipe.attention).parameters())
    assert line.gradients_made[-1] == (2 if bf16 == "model" else 4) * parameters


def test_passes_that_differ_have_no_line(small_recipe: Load) -> None:
    traces = {2: trace_of(small_recipe(), 2), 4: trace_of(small_recipe("attention.implementation=reference"), 4)}
    with pytest.raises(ValueError, match="another batch size"):
        Footprint.through(traces)
