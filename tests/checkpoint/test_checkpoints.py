"""A saved state is loaded to the bits, at the same stage and at another."""

import json
from contextlib import nullcontext

import pytest
import torch

from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.checkpoint.weights import load_weights
from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.training.tasks.classification.task import TrainState
from tests.small_engines import CONFIGS, VARIANTS, equal, train_once, train_steps, weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_loaded_state_trains_on_to_the_same_bits(small_recipe, make_checkpoints, tmp_path, config, precision) -> None:
    recipe = small_recipe(f"deepspeed.config={config}", f"train.precision={precision}")
    first = make_checkpoints(recipe, tmp_path / "c")
    train_steps(first, 1, 2)
    torch.manual_seed(7)
    assert first.save(TrainState(step=2, samples=16, best_top1=5.0))
    drawn = torch.rand(3)
    second = make_checkpoints(recipe, tmp_path / "c")
    state = second.load()
    assert state is not None
    assert (state.step, state.samples, state.best_top1, state.restarts) == (2, 16, 5.0, 1)
    assert torch.equal(torch.rand(3), drawn)
    assert all(map(torch.equal, first.ema.shards, second.ema.shards))
    for checkpoints in (first, second):
        train_steps(checkpoints, 3, 4)
    assert all(map(torch.equal, weights(first.engine), weights(second.engine)))
    masters = [master_weights(checkpoints.engine.deepspeed) for checkpoints in (first, second)]
    assert all(map(torch.equal, *masters))
    assert all(map(torch.equal, first.ema.shards, second.ema.shards))
    files = []
    for checkpoints in (first, second):  # all that a checkpoint holds is the same too
        torch.manual_seed(7)
        checkpoints.save(TrainState(step=4, samples=32))
        saved = sorted((tmp_path / "c" / "step-00000004").glob("*.pt"))
        files.append({path.name: load_tensors(path) for path in saved})
    assert equal(*files)

    whole, record = create_model(recipe.model, recipe.attention), first.store.state("step-00000004")
    for ema, averaged in ((False, nullcontext()), (True, first.ema.in_place_of_weights())):
        load_weights(whole, tmp_path / "c" / "step-00000004", record, ema)
        with averaged:
            pairs = zip(whole.parameters(), weights(first.engine), strict=True)
            assert all(torch.equal(mine.to(theirs.dtype), theirs) for mine, theirs in pairs)


@pytest.mark.slow  # compiles for minutes where it is not in the cache
def test_deepspeeds_cpu_adam_resumes_and_hands_over_to_torchs(small_recipe, make_checkpoints, tmp_path) -> None:
    recipe = small_recipe("deepspeed.config=zero3_offload", "deepspeed.cpu_adam=deepspeed")
    first, second = (make_checkpoints(recipe, tmp_path / "c") for _ in range(2))
    train_steps(first, 1, 2)
    first.save(TrainState(step=2, samples=16))
    torchs = make_checkpoints(small_recipe("deepspeed.config=zero1"), tmp_path / "c")
    for other in (second, torchs):
        other.load()
    norms = [train_once(checkpoints.engine, 3) for checkpoints in (first, second, torchs)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    for other in (second, torchs):
        for ours, theirs in zip(weights(other.engine), weights(first.engine), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_checkpoint_from_before_the_first_step_resumes(small_recipe, make_checkpoints, tmp_path, config) -> None:
    recipe = small_recipe(f"deepspeed.config={config}")
    first, second = (make_checkpoints(recipe, tmp_path / "c") for _ in range(2))
    first.save(TrainState())
    second.load()
    for checkpoints in (first, second):
        train_steps(checkpoints, 1)
    assert all(map(torch.equal, weights(first.engine), weights(second.engine)))


SAMPLE = {
    ("zero0", "zero3"),
    ("zero3", "zero1"),
    ("zero1", "zero2_offload"),
    ("zero2", "zero0"),
    ("zero3_offload", "zero2"),
    ("zero2", "zero3_offload_params"),
}
PAIRS = [
    pytest.param(a, b, marks=() if (a, b) in SAMPLE else pytest.mark.slow) for a in CONFIGS for b in CONFIGS if a != b
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_another_stage_resumes_from_the_same_state(small_recipe, make_checkpoints, tmp_path, before, after) -> None:
    first = make_checkpoints(small_recipe(f"deepspeed.config={before}"), tmp_path / "c")
    train_steps(first, 1, 2, 3)
    first.save(TrainState(step=3, samples=24))
    second = make_checkpoints(small_recipe(f"deepspeed.config={after}"), tmp_path / "c")
    second.load()
    assert all(map(torch.equal, weights(first.engine), weights(second.engine)))
    with first.ema.in_place_of_weights(), second.ema.in_place_of_weights():
        assert all(map(torch.equal, weights(first.engine), weights(second.engine)))
    for step in range(4, 8):
        norms = [train_once(checkpoints.engine, step) for checkpoints in (first, second)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    # Each group has its own weight decay and each parameter its own step, so the weights stay together too.
    for ours, theirs in zip(weights(second.engine), weights(first.engine), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_attention_trains_and_resumes_with_partitioned_weights(
    small_recipe, make_checkpoints, whole_zero3, tmp_path, variant
) -> None:
    first, same, plain = (
        make_checkpoints(small_recipe(f"deepspeed.config={config}", *VARIANTS[variant]), tmp_path / "c")
        for config in (whole_zero3, whole_zero3, "zero0")
    )
    train_steps(first, 1, 2)
    first.save(TrainState(step=2, samples=16))
    same.load()
    plain.load()
    for step in (3, 4):
        norms = [train_once(checkpoints.engine, step) for checkpoints in (first, same, plain)]
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    assert all(map(torch.equal, weights(first.engine), weights(same.engine)))
    for ours, theirs in zip(weights(first.engine), weights(plain.engine), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_sub_groups_and_alignment_are_another_layout_and_no_obstacle(
    small_recipe, make_checkpoints, tmp_path
) -> None:
    own = {"aligned": {"stage": 2, "parameter_alignment": True}, "grouped": {"stage": 3, "sub_group_size": 5000}}
    for name, zero in own.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    first = make_checkpoints(small_recipe("deepspeed.config=zero3"), tmp_path / "c")
    train_steps(first, 1, 2)
    first.save(TrainState(step=2, samples=16))
    for number, name in enumerate(own, start=3):
        last = make_checkpoints(small_recipe(f"deepspeed.config={tmp_path / name}.json"), tmp_path / "c")
        last.load()
        assert all(map(torch.equal, weights(first.engine), weights(last.engine)))
        assert len(master_weights(last.engine.deepspeed)) == (2 if name == "aligned" else 5)
        last.save(TrainState(step=number, samples=8 * number))
    for checkpoints in (first, last):
        norm = train_once(checkpoints.engine, 3)
    assert norm is not None
    for ours, theirs in zip(weights(last.engine), weights(first.engine), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_that_had_no_average_begins_one_at_its_weights(small_recipe, make_checkpoints, tmp_path) -> None:
    first = make_checkpoints(small_recipe("deepspeed.config=zero2", "train.ema_decay=0"), tmp_path / "c")
    train_once(first.engine, 1)
    first.save(TrainState(step=1, samples=8))
    second = make_checkpoints(small_recipe("deepspeed.config=zero2"), tmp_path / "c")
    second.load()
    assert all(map(torch.equal, second.ema.shards, master_weights(first.engine.deepspeed)))


def test_a_checkpoint_of_another_format_is_refused(small_recipe, make_checkpoints, tmp_path) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    directory = checkpoints.store.begin(1)
    state = {"format": 1, "zero_stage": 0, "world_size": 1, "step": 1, "samples": 8}
    checkpoints.store.commit(directory, state, {})
    with pytest.raises(RunDirectoryError, match="has format 1, this version reads format 2"):
        checkpoints.load()


@pytest.mark.parametrize(
    ("override", "said"),
    [("model.embed_dim=48", "holds another model"), ("train.global_batch=16", r"use train\.global_batch=8")],
)
def test_a_checkpoint_of_another_run_is_one_line(small_recipe, make_checkpoints, tmp_path, override, said) -> None:
    make_checkpoints(small_recipe(), tmp_path / "c").save(TrainState(step=1, samples=8))
    other = make_checkpoints(small_recipe(override), tmp_path / "c")
    with pytest.raises(RunDirectoryError, match=said):
        other.load()
