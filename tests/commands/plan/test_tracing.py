"""A trace against what the same pass really allocates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from karat_scale.attention import routes, variants
from karat_scale.commands.plan import memory
from karat_scale.commands.plan.memory import Footprint, Subject, attention_workspace, written_by_rows
from karat_scale.commands.plan.tracing import IMAGENET, Trace, count_samples, fake_copy, trace_step
from karat_scale.foundation.errors import DataError
from karat_scale.models import create_model
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe
from tests.small_engines import SWIN

Load = Callable[..., Recipe]
SIZE = 16


@pytest.fixture
def small_recipe(small_recipe: Load) -> Load:
    """Return a function that loads a small recipe with one block, which is enough here."""
    return lambda *overrides: small_recipe("model.depth=1", *overrides)


def trace_of(recipe: Recipe, batch: int, dtype: torch.dtype | None = None, autocast: bool = False) -> Trace:
    model = create_model(recipe.model, recipe.attention)
    return trace_step(model, fake_copy(model, dtype), batch, SIZE, autocast, None, True)


def really_allocated(recipe: Recipe, batch: int) -> tuple[int, int]:
    """Return the bytes in use after the forward pass and the loss, and at the peak, by torch's profiler."""
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


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "streaming"])
def test_a_trace_is_what_the_pass_allocates(small_recipe: Load, implementation: str) -> None:
    recipe = small_recipe(f"attention.implementation={implementation}")
    traces = {batch: trace_of(recipe, batch) for batch in (2, 4)}
    footprint = Footprint.through(traces)
    forward, peak = really_allocated(recipe, 8)
    assert sum(footprint.saved_by_part(8, footprint.forward - 1).values()) == pytest.approx(forward, rel=0.01)
    assert (footprint.live(8) + footprint.gradients_made).max() == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
def test_a_trace_of_an_evaluation_is_what_it_allocates(small_recipe: Load) -> None:
    recipe = small_recipe("attention.implementation=reference", "train.recompute.policy=all")
    footprint = Subject(recipe, on_gpu=False).evaluation
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


CONTENT = ("attention.form=content", "attention.implementation=streaming")
ROWS = [
    pytest.param(CONTENT, id="streaming"),
    pytest.param((*SWIN, "attention.form=content"), id="swin", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("keys", ROWS)
def test_rows_are_planned_however_many_tiles_a_batch_has(small_recipe, keys, monkeypatch) -> None:
    monkeypatch.setattr(variants, "workspace_budget", lambda _: 1)  # a tile for each item
    subject = Subject(small_recipe(*keys), on_gpu=True)
    for footprint in (subject.footprint, subject.evaluation):
        assert 0 < footprint.live(2).max() < footprint.live(4).max()


def test_a_gpu_streams_heads_that_are_wider_than_its_kernels_take(small_recipe: Load) -> None:
    wide, narrow = (small_recipe("model.num_heads=1", f"model.embed_dim={width}") for width in (256, 128))
    assert attention_workspace(narrow, 8, on_gpu=True) == 0 < attention_workspace(wide, 8, on_gpu=True)
    assert written_by_rows(wide.changed(attention__form="content"), on_gpu=True) > 0


def test_tiles_of_rows_hold_what_is_planned(small_recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(*CONTENT, "model.depth=2", "model.embed_dim=8", "model.patch_size=2")
    for module in (variants, routes, memory):  # a tile holds two of the eight images
        monkeypatch.setattr(module, "workspace_budget", lambda _: 2 * variants.HELD * 2 * 65**2)
    footprint = Subject(recipe, on_gpu=False).footprint
    planned = (footprint.live(8) + footprint.gradients_made).max() + attention_workspace(recipe, 8, on_gpu=False)
    # The peak of the tiles and that of all else need not coincide.
    assert 1 <= planned / really_allocated(recipe, 8)[1] <= 1.2


@pytest.mark.parametrize("keys", [(), ("attention.form=content",), ("attention.kind=sigmoid",)])
def test_flex_on_a_cpu_holds_all_scores(small_recipe: Load, keys: tuple[str, ...]) -> None:
    recipe = small_recipe("attention.implementation=flex", "model.embed_dim=16", "model.patch_size=1", *keys)
    footprint = Subject(recipe, on_gpu=False).footprint
    planned = (footprint.live(8) + footprint.gradients_made).max() + attention_workspace(recipe, 8, on_gpu=False)
    assert 1 <= planned / really_allocated(recipe, 8)[1] <= 1.2


@pytest.mark.slow
@pytest.mark.parametrize("keys", ROWS)
def test_tiles_of_rows_write_what_is_planned(small_recipe: Load, keys: tuple[str, ...]) -> None:
    recipe = small_recipe(*keys)
    model = create_model(recipe.model, recipe.attention)
    size = recipe.model.image_size
    # Each of these traces has one tile.
    traces = {batch: trace_step(model, fake_copy(model), batch, size, False, None, True) for batch in (2, 4)}
    planned, traced = Subject(recipe, on_gpu=False).footprint, Footprint.through(traces)
    tiles = (traced.written(4) - traced.written(2) - planned.written(4) + planned.written(2)) / 2
    assert written_by_rows(recipe, on_gpu=False) == pytest.approx(tiles, rel=0.15)


def test_passes_that_differ_have_no_line(small_recipe: Load) -> None:
    traces = {2: trace_of(small_recipe(), 2), 4: trace_of(small_recipe("attention.implementation=reference"), 4)}
    with pytest.raises(ValueError, match="another batch size"):
        Footprint.through(traces)


def test_no_decoder_is_made_and_no_shard_hashed(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_recipe(recipe_file, ["data.verify=hash", "data.decoder=native"]).data
    for place in ("karat_scale.data.backends.images.make_decoder", "karat_scale.data.shards.shard_format.check_file"):
        monkeypatch.setattr(place, lambda *_, place=place: pytest.fail(f"{place} was called"))
    assert count_samples(data)[0] == 64


STREAM = ("data.order=stream", "data.stream=pipe:cat a.tar", "data.stream_samples=48")


def test_data_that_are_here_and_damaged_are_not_imagenet(recipe_file, image_folder, tmp_path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    for keys, message in {
        ("data.train_split=trian",): "has no split 'trian'",
        (f"data.path={tmp_path}",): "is damaged or of another version",
        ("data.backend=folder", f"data.path={image_folder}", "data.train_split=trian"): "trian",
    }.items():
        with pytest.raises(DataError, match=message):
            count_samples(load_recipe(recipe_file, keys).data)


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ((), 64),
        (("data.backend=synthetic", "data.path=", "data.synthetic_samples=48"), 48),
        (("data.backend=folder", "data.path={folder}"), 64),
        (STREAM, 48),
        (("data.path=elsewhere",), IMAGENET),
    ],
)
def test_images_are_counted_where_they_are(recipe_file, image_folder, keys, count) -> None:
    recipe = load_recipe(recipe_file, [key.format(folder=image_folder) for key in keys])
    found, whose = count_samples(recipe.data)
    assert (found, "of the recipe's data" in whose) == (count, count != IMAGENET)
