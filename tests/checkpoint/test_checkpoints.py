"""A state is loaded with the bits that were saved, at the same stage and at another."""

import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.checkpoint.restore import SavedState, _optimizer_state
from karat_scale.checkpoint.tensor_storage import load_tensors, planned_bytes
from karat_scale.checkpoint.weights import load_weights
from karat_scale.engine.deepspeed_internals import master_weights
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.models.layers import freeze
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import karat_environment
from tests.small_engines import (
    CELLS,
    CONFIGS,
    FEW_CELLS,
    VARIANTS,
    checkpoints_of,
    equal,
    train_once,
    train_steps,
    weights,
)
from tests.training.harm import POINTERS, point
from tests.warm import run_program


@pytest.mark.parametrize(("config", "precision"), CELLS)
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


@pytest.mark.parametrize("config", ["zero0", "zero2", "zero3_offload"])
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


FEW = {"softmax_bias", "content", "smooth", "content in a block"}  # each with parameters of its own


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in VARIANTS])
def test_variants_of_attention_resume_partitioned(small_recipe, make_checkpoints, whole_zero3, tmp_path, name):
    first, same, plain = (
        make_checkpoints(small_recipe(f"deepspeed.config={config}", *VARIANTS[name]), tmp_path / "c")
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


def test_other_sub_groups_and_alignment_are_no_obstacle(small_recipe, make_checkpoints, tmp_path):
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


def test_a_checkpoint_of_another_run_or_format_is_one_line(small_recipe, make_checkpoints, tmp_path) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    checkpoints.save(TrainState(step=1, samples=8))
    for override, said in (
        ("model.embed_dim=48", "holds another model"),
        ("train.global_batch=16", r"use train\.global_batch=8"),
    ):
        with pytest.raises(RunDirectoryError, match=said):
            make_checkpoints(small_recipe(override), tmp_path / "c").load()
    shutil.rmtree(tmp_path / "c" / "step-00000001")  # otherwise a run would fall back to it
    state = {"format": 1, "zero_stage": 0, "world_size": 1, "step": 2, "samples": 16}
    checkpoints.store.commit(checkpoints.store.begin(2), state, {})
    with pytest.raises(RunDirectoryError, match="has format 1, this version reads format 2"):
        checkpoints.load()


class ReadMeanwhile(TrainState):
    """A state that lets its run train on while it is read."""

    train_on: Callable[..., None]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        cls.train_on()
        return TrainState.from_json(data)


def test_a_run_that_trains_on_leaves_the_checkpoint_that_another_branches_from(
    small_recipe, make_checkpoints, tmp_path, monkeypatch
) -> None:
    trunk, branch = (make_checkpoints(small_recipe(), tmp_path / name) for name in ("trunk", "branch"))
    trunk.save(TrainState(step=1, samples=8))
    store, steps, alone = trunk.store, itertools.count(2), threading.Lock()

    def train_on(*_: int) -> None:
        with alone:
            for step in itertools.islice(steps, 2):
                store.commit(store.begin(step), {"step": step}, {})
            store.retain(2)

    monkeypatch.setattr(branch.reporter.display, "verify", train_on)
    ReadMeanwhile.train_on = train_on
    branch.state_type = ReadMeanwhile
    assert branch.load(str(store.root / "step-00000001")).step == 1
    assert "step-00000002" not in store.names()
    train_on()
    assert "step-00000001" not in store.names()


class Killed(BaseException):
    """An exception in place of a kill."""


def state(step: int, top1: float, best_step: int, best_top1: float) -> TrainState:
    scores = {"last_top1": top1, "last_top5": top1, "best_top1": best_top1, "best_top5": best_top1}
    return TrainState(step=step, samples=8 * step, evaluated_step=step, best_step=best_step, **scores)


@pytest.mark.parametrize("killed_at", ["best", "latest"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_kill_before_a_pointer_moves_loses_no_best(
    small_recipe, make_checkpoints, tmp_path, monkeypatch, killed_at, earlier
) -> None:
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    if earlier:
        first.save(state(1, 40.0, 1, 40.0), is_best=True)
    point = first.store.point

    def killed(pointer: str, name: str) -> None:
        if pointer == killed_at:
            raise Killed
        point(pointer, name)

    monkeypatch.setattr(first.store, "point", killed)
    with pytest.raises(Killed):
        first.save(state(2, 50.0, 2, 50.0), is_best=True)
    resumed = second.load()
    assert resumed.step == (1 if earlier else 2)  # what `latest` names, or the newest without `latest`
    best = second.store.pointed("best")
    assert best == ("step-00000001" if earlier and killed_at == "best" else "step-00000002")
    assert second.store.find_intact("best") == best


@pytest.mark.parametrize("is_one_kept", [True, False])
def test_a_best_that_is_gone_is_said_and_replaced(small_recipe, make_checkpoints, tmp_path, capsys, is_one_kept):
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    first.save(state(1, 40.0, 1, 40.0), is_best=is_one_kept)
    first.save(state(2, 50.0, 2, 50.0))
    first.save(state(3, 45.0, 2, 50.0))
    # A reader finds the best of a run that was killed before the pointer named it.
    assert first.store.pointed("best") == ("step-00000001" if is_one_kept else None)
    assert first.store.find_intact("best") == ("step-00000001" if is_one_kept else "step-00000002")
    shutil.rmtree(tmp_path / "c" / "step-00000002")
    resumed = second.load()
    assert resumed.step == 3
    assert "the best checkpoint, step-00000002, is missing; the " in capsys.readouterr().out
    kept = (1, 40.0, 40.0) if is_one_kept else (None, None, None)
    assert (resumed.best_step, resumed.best_top1, resumed.best_top5) == kept
    assert resumed.last_top1 == 45.0
    assert resumed.record({"top1": 50.0, "top5": 60.0})
    resumed.step = 4
    assert not resumed.record({"top1": 50.0, "top5": 70.0})  # of equal scores the first is the best
    assert (resumed.best_step, resumed.best_top5) == (3, 60.0)


@pytest.mark.parametrize("is_one_kept", [True, False])
def test_a_best_that_was_not_saved_does_not_stay_the_best(
    small_recipe, make_checkpoints, tmp_path, monkeypatch, is_one_kept
) -> None:
    checkpoints = make_checkpoints(small_recipe(), tmp_path / "c")
    if is_one_kept:
        checkpoints.save(state(1, 10.0, 1, 10.0), is_best=True)
    lost, begin = state(2, 50.0, 2, 50.0), checkpoints.store.begin

    def full(step: int) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.store, "begin", full)
    assert not checkpoints.save(lost, is_best=True)
    monkeypatch.setattr(checkpoints.store, "begin", begin)
    later = replace(lost, step=3, samples=24)
    checkpoints.forget_lost_best(later)
    assert (later.best_step, later.best_top1) == ((1, 10.0) if is_one_kept else (None, None))
    assert later.record({"top1": 30.0, "top5": 30.0})
    saved = replace(lost, step=4, samples=32, best_step=4)
    checkpoints.save(saved, is_best=True)
    checkpoints.forget_lost_best(saved)
    assert saved.best_step == 4


def test_a_rank_with_nothing_but_padding_has_the_steps_of_the_others() -> None:
    saved = SavedState({}, scalars={"step": {"": 3.0}})
    assert _optimizer_state([], torch.empty(0), saved) == {"step": 3.0}


def test_a_damaged_newest_checkpoint_costs_no_intact_one(small_recipe, make_checkpoints, tmp_path, capsys):
    recipe = small_recipe("checkpoint.keep_last=2", "checkpoint.keep_best=false")
    first, second = (make_checkpoints(recipe, tmp_path / "c") for _ in range(2))
    for step in (1, 2, 3):
        first.save(TrainState(step=step, samples=8 * step))
    (first.store.root / "step-00000003/state.json").write_text("{}")
    assert second.load().step == 2
    assert "latest names step-00000002 again: it named step-00000003, which is damaged" in capsys.readouterr().out
    assert second.store.pointed("latest") == "step-00000002"
    second.save(TrainState(step=4, samples=32))
    assert second.store.names() == ["step-00000004", "step-00000003", "step-00000002"]  # two of them are whole
    second.save(TrainState(step=5, samples=40))
    assert second.store.names() == ["step-00000005", "step-00000004"]


def test_a_latest_that_names_nothing_is_repaired(small_recipe, make_checkpoints, tmp_path, capsys):
    first, second = (make_checkpoints(small_recipe(), tmp_path / "c") for _ in range(2))
    first.save(state(1, 40.0, 1, 40.0), is_best=True)
    latest = tmp_path / "c" / "latest"
    for harm in (*POINTERS, "link"):
        if harm == "link":
            latest.unlink()
            latest.symlink_to("gone")
        else:
            point(latest, POINTERS[harm])
        assert second.load().step == 1
        assert "warning: latest names step-00000001 again" in capsys.readouterr().out, harm
        assert second.store.find_intact("latest") == "step-00000001"
    latest.unlink()
    latest.mkdir()
    assert second.load().step == 1
    assert f"warning: {latest} cannot be repaired: Is a directory" in capsys.readouterr().out


TUNED = ("optim.layer_decay=0.5", "train.freeze=[patch_embed.*, blocks.0.attn.operator.*]", "optim.weight_decay=0")


def build(recipe: Recipe, world: World, seed: int) -> tuple[Engine, Checkpoints]:
    torch.manual_seed(seed)
    model = create_model(recipe.model, recipe.attention)
    if recipe.train.freeze:
        freeze(model, recipe.train.freeze)
    engine = Engine(model, recipe, world, recipe.train.global_batch)
    return engine, checkpoints_of(engine, recipe, world, Path(recipe.run.dir) / "checkpoints")


def test_the_room_for_a_checkpoint_counts_frozen_weights(small_recipe, world, monkeypatch) -> None:
    engine, checkpoints = build(small_recipe("train.freeze=['blocks.*','patch_embed.*']"), world, seed=0)
    frozen = sum(x.numel() for x in engine.frozen.values())
    assert 4 * frozen > 16 * engine.parameters
    checkpoints.store.open()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * frozen))
    with pytest.raises(RunDirectoryError, match="there is no room for a checkpoint"):
        checkpoints.check_room()


@pytest.mark.parametrize(("config", "precision"), FEW_CELLS)
def test_frozen_weights_stay_and_come_back(small_recipe, world, config, precision) -> None:
    recipe = small_recipe(*TUNED, f"deepspeed.config={config}", f"train.precision={precision}")
    engine, checkpoints = build(recipe, world, seed=0)
    start = weights(engine)
    train_once(engine, seed=1)
    moved = {
        name: float((after - before).abs().max())
        for (name, _), before, after in zip(engine.module.named_parameters(), start, weights(engine), strict=True)
    }
    assert {name for name, by in moved.items() if by == 0} >= set(engine.frozen)
    assert set(engine.frozen) == {
        name for name in moved if name.startswith(("patch_embed.", "blocks.0.attn.operator."))
    }
    if precision == "fp32":  # AdamW's first step has the size of the rate
        assert moved["head.weight"] == pytest.approx(1e-2, rel=1e-2)
        assert moved["blocks.1.mlp.fc1.weight"] == pytest.approx(0.5e-2, rel=1e-2)
        assert moved["blocks.0.mlp.fc1.weight"] == pytest.approx(0.25e-2, rel=1e-2)
        assert moved["pos_embed"] == pytest.approx(0.125e-2, rel=1e-2)
    assert checkpoints.save(TrainState(step=1, samples=8))
    saved, kept = weights(engine), dict(engine.frozen)
    train_once(engine, seed=2)
    expected = weights(engine)

    other, others = build(recipe, world, seed=5)
    assert others.load() is not None
    assert all(torch.equal(a, b) for a, b in zip(weights(other), saved, strict=True))
    train_once(other, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), expected, strict=True))

    plain = create_model(recipe.model, recipe.attention)
    name = checkpoints.store.pointed("latest")
    load_weights(plain, checkpoints.store.root / name, checkpoints.store.state(name), ema=True)
    assert all(torch.equal(plain.get_parameter(key), value) for key, value in kept.items())


@pytest.mark.parametrize(("config", "precision"), FEW_CELLS)
def test_frozen_weights_are_in_the_planned_size(small_recipe, world, config, precision) -> None:
    own = (
        "train.freeze=[blocks.*]",
        "model.embed_dim=192",
        f"deepspeed.config={config}",
        f"train.precision={precision}",
    )
    recipe = small_recipe(*own)
    engine, checkpoints = build(recipe, world, seed=0)
    train_once(engine, seed=1)
    assert checkpoints.save(TrainState(step=1, samples=8))
    frozen = sum(value.numel() for value in engine.frozen.values())
    learning = sum(map(math.prod, engine.all_shapes.values())) - frozen
    planned = planned_bytes(recipe, engine.stage, learning, frozen)
    files = (checkpoints.store.root / checkpoints.store.names()[0]).iterdir()
    assert sum(file.stat().st_size for file in files) == pytest.approx(planned, rel=0.1)


def test_another_stage_takes_over_and_another_list_is_refused(small_recipe, world) -> None:
    engine, checkpoints = build(small_recipe(*TUNED, "deepspeed.config=zero3"), world, seed=0)
    train_once(engine, seed=1)
    checkpoints.save(TrainState(step=1, samples=8))
    other, others = build(small_recipe(*TUNED, "deepspeed.config=zero1"), world, seed=5)
    others.load()
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(engine), strict=True))
    _, unfrozen = build(small_recipe(), world, seed=0)
    with pytest.raises(RunDirectoryError, match=r"operator.* is frozen in it but not here \(train.freeze\)"):
        unfrozen.load()


@pytest.mark.parametrize("config", ["zero1", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_deepspeeds_own_script_converts_a_checkpoint(small_recipe, make_checkpoints, tmp_path, config) -> None:
    checkpoints = make_checkpoints(small_recipe(f"deepspeed.config={config}"), tmp_path / "c")
    train_steps(checkpoints, 1, 2)
    assert checkpoints.save(TrainState(step=2, samples=16))
    ends = ("--input_folder", str(tmp_path / "c" / "step-00000002"), "--output_folder", str(tmp_path / "universal"))
    script = "deepspeed.checkpoint.ds_to_universal"
    done = run_program(script, (*ends, "--inject_missing_state"), [karat_environment()], 300, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {file.parent.name: torch.load(file) for file in tmp_path.glob("universal/zero/*/fp32.pt")}
    found = {name: (of["param"] if config != "zero3" else of).flatten() for name, of in found.items()}
    names = [name for name, _ in checkpoints.engine.module.named_parameters()]
    assert equal(found, dict(zip(names, [one.flatten() for one in weights(checkpoints.engine)], strict=True)))
