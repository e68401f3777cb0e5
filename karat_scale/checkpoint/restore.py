"""A saved state into an engine, of any world size and ZeRO stage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from karat_scale.checkpoint.saved_state import SavedState
from karat_scale.engine.deepspeed_internals import (
    load_loss_scaler,
    load_optimizer_states,
    master_weights,
    refresh_module,
    set_frozen,
    shard_layout,
)
from karat_scale.engine.distributed import World
from karat_scale.engine.ema import Ema
from karat_scale.engine.engine import Engine
from karat_scale.engine.shards import Fragment
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.tables import OPTIMIZERS
from karat_scale.models.transfer import teacher_of


def restore(engine: Engine, ema: Ema | None, saved: SavedState, world: World) -> None:
    """Give an engine the weights, optimizer states and averages of a checkpoint. Collective from stage 1 on.

    An average that the checkpoint does not have begins at the weights.

    Raises:
        RunDirectoryError: the checkpoint is of another model or optimizer.
    """
    with world.together():  # what follows is collective: none may wait there for one that refuses its files
        states = _fill(engine, ema, saved)
    load_optimizer_states(engine.deepspeed, states)
    load_loss_scaler(engine.deepspeed, saved.loss_scaler)
    refresh_module(engine.deepspeed)
    set_frozen(engine.deepspeed, engine.frozen)
    copy_buffers(engine.module, saved.buffers)
    for counter, value in saved.counters.items():
        setattr(engine.deepspeed, counter, value)


def _fill(engine: Engine, ema: Ema | None, saved: SavedState) -> list[dict[str, Any]]:
    """Fill this rank's own tensors; returns the optimizer's states of each."""
    check_shapes({**engine.shapes, **{name: tuple(x.shape) for name, x in engine.frozen.items()}}, saved.shapes)
    check_buffers(engine.module, saved.buffers)
    _check_frozen(engine, saved)
    if saved.elementwise and saved.elementwise.keys() != engine.optimizer_states:
        kept = [name for name, row in OPTIMIZERS.items() if saved.elementwise.keys() == row.all_states]
        fix = f"set optim.name={kept[0]} or start another run" if kept else "start another run"
        raise RunDirectoryError(f"it holds the optimizer states {', '.join(sorted(saved.elementwise))}; {fix}")
    layout, masters = shard_layout(engine.deepspeed), master_weights(engine.deepspeed)
    states = []
    try:
        for fragments, master in zip(layout, masters, strict=True):
            saved.masters.fill(fragments, master.data)
            states.append(_optimizer_state(fragments, master, saved))
        for name, frozen in engine.frozen.items():
            saved.masters.fill([Fragment(name, 0, 0, frozen.numel())], frozen)
        if ema is not None:
            for fragments, shard in zip(layout, ema.shards, strict=True):
                (saved.ema or saved.masters).fill(fragments, shard)
    except KeyError as error:
        raise RunDirectoryError(f"it holds another model: {error.args[0]}") from error
    return states


def check_shapes(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not this model's.

    Raises:
        RunDirectoryError: names the first parameter that differs.
    """
    for name in [*here, *there]:
        if here.get(name) != (tuple(there[name]) if name in there else None):
            sizes = [f"[{', '.join(map(str, s[name]))}]" if name in s else "not" for s in (there, here)]
            raise RunDirectoryError(f"it holds another model: {name} is {sizes[0]} there and {sizes[1]} here")


_MODES = ".operator.modes"


def check_buffers(model: nn.Module, there: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose buffers are not of this model's shapes. It may have others, or none.

    Raises:
        RunDirectoryError: names the first buffer that differs, or the modes of `form=smooth` that an early version
            left out.
    """
    for name, _ in model.named_buffers():
        if name.endswith(_MODES) and name not in there:
            raise RunDirectoryError(f"it has no {name}, so it is of an early version of form=smooth; train it again")
    here = {name: tuple(buffer.shape) for name, buffer in model.named_buffers() if name in there}
    check_shapes(here, {name: tuple(there[name].shape) for name in here})


def copy_buffers(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Copy the buffers that a checkpoint has."""
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


def check_teacher(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a student whose teacher is not this model's; a model without one has none to compare.

    Raises:
        RunDirectoryError: says which teacher is where.
    """
    teacher, theirs = teacher_of(model), saved.get("teacher")
    if teacher is not None and theirs != teacher.digest:
        there = f"the teacher with digest {theirs[:12]}" if theirs else "no teacher"
        raise RunDirectoryError(
            f"it was trained with {there}, and the run's teacher.safetensors has digest {teacher.digest[:12]}; "
            "put the right file there"
        )


def _check_frozen(engine: Engine, saved: SavedState) -> None:
    for name in sorted(saved.frozen ^ engine.frozen.keys()):
        where = "there and not here" if name in saved.frozen else "here and not there"
        raise RunDirectoryError(f"{name} is frozen {where} (train.freeze); use its list, or init_from to begin with it")


def _optimizer_state(fragments: list[Fragment], master: torch.Tensor, saved: SavedState) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, pieces in saved.elementwise.items():
        if fragments and not any(fragment.name in pieces for fragment in fragments):
            continue  # an optimizer may have other states for some parameters
        state[key] = torch.empty_like(master, requires_grad=False)
        pieces.fill(fragments, state[key])
    for key, by_name in saved.scalars.items():
        # A shard that is all padding has no parameter to ask.
        values = {by_name[f.name] for f in fragments if f.name in by_name}
        if fragments and not values:
            continue
        values = values or set(by_name.values())
        if len(values) > 1:
            raise RunDirectoryError(
                f"its parameters differ in the optimizer's {key} ({', '.join(map(str, sorted(values)))}), which one "
                "shard cannot keep apart; resume with the world size and ZeRO stage that wrote it"
            )
        state[key] = values.pop()
    return state
