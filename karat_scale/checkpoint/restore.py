"""Choose the checkpoint that a run resumes from, read its state by parameter name, and put it into an engine.

All ranks choose the same intact checkpoint. The pointers `latest` and `best` name what the state says, even after a
kill, a full disk or damage. The world size and ZeRO stage of the engine may differ from those that wrote it.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karat_scale.checkpoint import records
from karat_scale.checkpoint.store import (
    CHECKPOINT_NAME,
    STATE,
    CheckpointStore,
    NearStore,
    branch_point,
    checkpoint_name,
    holding,
    not_readable,
    parse_manifest,
    step_of,
)
from karat_scale.checkpoint.tensor_storage import describe
from karat_scale.engine import deepspeed_internals as internals
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.engine.shards import Fragment, Layout, Pieces
from karat_scale.foundation.errors import OtherModelError, RunDirectoryError
from karat_scale.foundation.files import file_sha256, flush_to_disk
from karat_scale.foundation.tables import OPTIMIZERS
from karat_scale.models.transfer import teacher_of


@dataclass
class SavedState:
    """Masters, optimizer states and averages, read as they are needed from memory-mapped files."""

    shapes: dict[str, tuple[int, ...]]
    """The shapes of all parameters, frozen ones too."""
    masters: Pieces = field(default_factory=Pieces)
    elementwise: dict[str, Pieces] = field(default_factory=dict)
    """Optimizer states of the parameter's size, such as exp_avg and exp_avg_sq."""
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    """Optimizer states that are one number, such as step: by key, then by parameter name."""
    ema: Pieces | None = None
    frozen: frozenset[str] = frozenset()
    """The frozen parameters: in `masters` and `ema` like the others, but without optimizer states."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    """DeepSpeed's own counts of steps and samples."""
    loss_scaler: Any = None
    """DeepSpeed's loss scaler, the same on all ranks; it has a meaning only in fp16."""


def sidecar_name(rank: int) -> str:
    """Return the name of the file with what DeepSpeed's files lack: a rank's random generators, layout and averages."""
    return f"rank-{rank:05d}.pt"


def saved_layout(sidecar: records.Sidecar) -> Layout:
    """The layout in a rank's sidecar."""
    return [[Fragment(*fragment) for fragment in fragments] for fragments in sidecar.layout or []]


def falsehood(checkpoint: Path) -> str | None:
    """Return a contradiction in a checkpoint's files, in a few words; None if they are consistent.

    The hashes are right: the files were written like this. All files are opened, and no tensor is read. Raises OSError
    like `damage_of`.
    """
    try:
        saved = records.read_state_record(checkpoint)
        if CHECKPOINT_NAME.fullmatch(checkpoint.name) and checkpoint.name != checkpoint_name(saved.step):
            return f"{STATE}: its step is {saved.step}"
        if saved.samples % max(saved.step, 1) or (saved.samples > 0) != (saved.step > 0):
            return f"{STATE}: {saved.samples} samples in {saved.step} steps"
        ranks = sorted(path.name for path in checkpoint.glob("rank-*.pt"))
        if len(ranks) != saved.world_size or ranks != [sidecar_name(rank) for rank in range(len(ranks))]:
            return f"{STATE}: its world size is {saved.world_size}, and there are {len(ranks)} files rank-*.pt"
        for rank in ranks:
            records.read_record(checkpoint / rank, records.Sidecar)
        state = read_state(checkpoint, saved.model_dump())
        _check_whole(state, saved.has_ema)
    except RunDirectoryError as error:
        return str(error)
    except OSError as error:
        return str(not_readable(error))
    return None


def read_state(checkpoint: Path, saved: Mapping[str, Any], ranks: Iterable[int] | None = None) -> SavedState:
    """Open a checkpoint.

    Args:
        checkpoint: the checkpoint's directory, verified.
        saved: the content of `state.json`.
        ranks: the ranks whose files to open; by default all that have their own part.

    Raises:
        RunDirectoryError: a file does not have the content it must have.
    """
    stage = saved["zero_stage"]
    model_file = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    model = records.read_record(checkpoint / model_file, records.ModelFile)
    first = records.read_record(checkpoint / sidecar_name(0), records.Sidecar)
    if first.shapes is None or first.layout is None:
        raise RunDirectoryError(f"{sidecar_name(0)}: no shapes or no layout")
    frozen = first.frozen or {}
    state = SavedState({**first.shapes, **{name: tuple(value.shape) for name, value in frozen.items()}})
    state.frozen = frozenset(frozen)
    state.buffers = {name: value for name, value in model.module.items() if name not in state.shapes}
    state.counters = {key: getattr(model, key) for key in ("global_steps", "global_samples", "skipped_steps")}
    here = {name: tuple(value.shape) for name, value in model.module.items()}
    if stage == 3:  # the module's own tensors are empty
        here.update({name: tuple(shape) for group in model.param_shapes or [] for name, shape in group.items()})
        here.update({name: shape for name, shape in state.shapes.items() if name in frozen})
    for name, shape in state.shapes.items():
        if here.get(name) != tuple(shape):
            raise RunDirectoryError(f"{model_file}: {name} is not of the shape that {sidecar_name(0)} says")
    if stage == 0:  # every rank had the whole of it
        layout = saved_layout(first)
        if not all(len(fragments) == 1 and fragments[0].name in first.shapes for fragments in layout):
            raise RunDirectoryError(f"{sidecar_name(0)}: a layout that is not of stage 0")
        if model.optimizer is None:
            raise RunDirectoryError(f"{model_file}: no optimizer")
        masters = [model.module[fragments[0].name] for fragments in layout]
        _add_rank(state, 0, first, masters, model.optimizer)
        ranks = ()
    for rank in range(saved["world_size"]) if ranks is None else ranks:
        sidecar = records.read_record(checkpoint / sidecar_name(rank), records.Sidecar)
        # DeepSpeed puts "bf16_" before the name in bf16.
        paths = list(checkpoint.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(paths) != 1:
            raise RunDirectoryError(f"{len(paths)} files of rank {rank}'s part of the optimizer")
        partition = records.read_record(paths[0], records.PartitionFile).optimizer_state_dict
        if partition.zero_stage not in (None, stage):
            said = int(partition.zero_stage)
            raise RunDirectoryError(f"{paths[0].name}: is of stage {said}, and {STATE} says {stage}")
        state.loss_scaler = partition.loss_scaler
        _add_rank(state, rank, sidecar, partition.masters, partition.states)
    for name, value in frozen.items():
        for pieces in (state.masters, state.ema):
            if pieces is not None:
                pieces.add([Fragment.whole(name, value)], value)
    return state


def _add_rank(
    state: SavedState, rank: int, sidecar: records.Sidecar, masters: list[torch.Tensor], states: records.OptimizerStates
) -> None:
    layout, averages = saved_layout(sidecar), sidecar.ema
    if not len(layout) == len(masters) == (len(masters) if averages is None else len(averages)):
        raise RunDirectoryError(f"{sidecar_name(rank)}: layout, averages and weights are not of as many tensors")
    for number, (fragments, master) in enumerate(zip(layout, masters, strict=True)):
        end = 0
        for name, param_start, master_start, length in sorted(fragments, key=lambda fragment: fragment.master_start):
            if master_start < end:
                raise RunDirectoryError(f"{sidecar_name(rank)}: a layout in which {name} lies on another parameter")
            end = master_start + length
            size = math.prod(state.shapes.get(name, (0,)))
            if param_start + length > size or master_start + length > master.numel():
                raise RunDirectoryError(f"{sidecar_name(rank)}: a layout with more of {name} than there is")
        average = None if averages is None else averages[number]
        for other in (average, *(x for x in states.state.get(number, {}).values() if isinstance(x, torch.Tensor))):
            # ZeRO 1 and 2 pad the last rank's part: DeepSpeed cuts the padding off the weights, not off the states.
            if other is not None and other.numel() < end:
                raise RunDirectoryError(f"{sidecar_name(rank)}: averages or optimizer states shorter than the weights")
        state.masters.add(fragments, master)
        for key, value in states.state.get(number, {}).items():
            if isinstance(value, torch.Tensor):
                state.elementwise.setdefault(key, Pieces()).add(fragments, value)
            else:
                # A part that is all padding has its value under no name.
                state.scalars.setdefault(key, {}).update({f.name: value for f in fragments} or {"": value})
        if average is not None:
            state.ema = state.ema or Pieces()
            state.ema.add(fragments, average)


def _check_whole(state: SavedState, has_ema: bool) -> None:
    if has_ema != (state.ema is not None):
        raise RunDirectoryError(
            f"{STATE} has has_ema = {str(has_ema).lower()}, but averages are {'missing' if has_ema else 'there'}"
        )
    for name, shape in state.shapes.items():
        size = math.prod(shape)
        if not all(pieces.covers(name, size) for pieces in (state.masters, state.ema) if pieces is not None):
            raise RunDirectoryError(f"parts of {name} are missing")
        if not all(pieces.covers(name, size) for pieces in state.elementwise.values() if name in pieces):
            raise RunDirectoryError(f"parts of {name}'s optimizer states are missing")


def restore(engine: Engine, ema: Ema | None, saved: SavedState, world: World) -> None:
    """Give an engine the weights, optimizer states and averages of a checkpoint. Collective from stage 1 on.

    An average that the checkpoint does not have begins at the weights.

    Raises:
        RunDirectoryError: the checkpoint is of another model or optimizer.
    """
    with world.together():  # what follows is collective: no rank may wait there for one that refuses its files
        states = _fill(engine, ema, saved)
    internals.load_optimizer_states(engine.deepspeed, states)
    internals.load_loss_scaler(engine.deepspeed, saved.loss_scaler)
    internals.refresh_module(engine.deepspeed)
    internals.set_frozen(engine.deepspeed, engine.frozen)
    copy_buffers(engine.module, saved.buffers)
    for counter, value in saved.counters.items():
        setattr(engine.deepspeed, counter, value)


def _fill(engine: Engine, ema: Ema | None, saved: SavedState) -> list[dict[str, Any]]:
    """Fill this rank's own tensors; returns the optimizer's states of each."""
    check_shapes(engine.all_shapes, saved.shapes)
    check_buffers(engine.module, saved.buffers)
    for name in sorted(saved.frozen ^ engine.frozen.keys()):
        where = "in it but not here" if name in saved.frozen else "here but not in it"
        raise RunDirectoryError(
            f"{name} is frozen {where} (train.freeze); use its train.freeze, or init_from instead of resume.from"
        )
    if saved.elementwise and saved.elementwise.keys() != engine.optimizer_states:
        known = {name: {*row.states, *(row.matrix_states or ())} for name, row in OPTIMIZERS.items()}
        kept = [name for name, theirs in known.items() if saved.elementwise.keys() == theirs]
        fix = f"set optim.name={kept[0]} or start another run" if kept else "start another run"
        raise RunDirectoryError(f"it holds the optimizer states {', '.join(sorted(saved.elementwise))}; {fix}")
    layout, masters = internals.shard_layout(engine.deepspeed), internals.master_weights(engine.deepspeed)
    states = []
    try:
        for fragments, master in zip(layout, masters, strict=True):
            saved.masters.fill(fragments, master.data)
            states.append(_optimizer_state(fragments, master, saved))
        for name, frozen in engine.frozen.items():
            saved.masters.fill([Fragment.whole(name, frozen)], frozen)
        if ema is not None:
            for fragments, shard in zip(layout, ema.shards, strict=True):
                (saved.ema or saved.masters).fill(fragments, shard)
    except KeyError as error:
        raise RunDirectoryError(f"it holds another model: {error.args[0]}") from error
    return states


def check_shapes(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose parameters are not this model's.

    Raises:
        OtherModelError: a parameter differs.
    """
    for name in [*here, *there]:
        if here.get(name) != (tuple(there[name]) if name in there else None):
            sizes = [f"[{', '.join(map(str, s[name]))}]" if name in s else "not" for s in (there, here)]
            fix = "use the model and the attention of its recipe"
            raise OtherModelError(f"it holds another model: {name} is {sizes[0]} there and {sizes[1]} here; {fix}")


_MODES = ".operator.modes"


def check_buffers(model: nn.Module, there: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose buffers are not of this model's shapes. It may have others, or none.

    Raises:
        RunDirectoryError: a buffer differs, or the modes of `form=smooth`, which an early version left out, are
            missing.
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
    """Refuse a checkpoint of a student whose teacher is not this model's; a model without a teacher is not checked.

    Raises:
        RunDirectoryError: the teachers differ; the message says which is where.
    """
    teacher, theirs = teacher_of(model), saved.get("teacher")
    if teacher is not None and theirs != teacher.digest:
        there = f"the teacher with digest {theirs[:12]}" if theirs else "no teacher"
        raise RunDirectoryError(
            f"it was trained with {there}, and the run's teacher.safetensors has digest {teacher.digest[:12]}; "
            "put the right file there"
        )


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


def repair_latest(store: CheckpointStore, name: str, reporter: Reporter) -> None:
    """Let `latest` name the checkpoint that a run resumes from; rank 0 calls it."""
    pointed = store.pointed("latest")
    if pointed == name:
        return
    was = f"it named {pointed}, which is damaged" if pointed else "it named no checkpoint"
    try:
        store.point("latest", name)
    except OSError as error:
        reporter.warn(f"{store.root / 'latest'} cannot be repaired: {describe(error)}; remove it")
    else:
        reporter.warn(f"latest names {name} again: {was}")


def repair_best(store: CheckpointStore, state: RunState, reporter: Reporter) -> dict[str, Any]:
    """Let `best` name the checkpoint that `state` says is the best; rank 0 calls it when a run resumes.

    Returns:
        The fields of `state` to set if its best checkpoint does not exist any more: those of the checkpoint that `best`
        names, or None for each, so that the next evaluation is the best.
    """
    if state.best_step is None:
        return {}
    name = checkpoint_name(state.best_step)
    try:
        pointed = store.pointed("best")
        if pointed == name or (pointed is not None and pointed > checkpoint_name(state.step)):
            return {}  # a later one is evaluated again when training comes to it
        if name in store.names() and store.damage(name, reporter.verify) is None:
            store.point("best", name)
            reporter.warn(f"best now names {name}: the run ended before this was written")
            return {}
        kept = _scores(store, pointed, type(state), reporter) if pointed is not None else None
    except (OSError, ValueError) as error:
        reporter.warn(f"best cannot be repaired: {error}")
        return {}
    if kept is not None:
        reporter.warn(f"the best checkpoint, {name}, is missing; the best one is {pointed}")
        return kept
    reporter.warn(f"the best checkpoint, {name}, is missing; the next evaluation is the best")
    return state.without_best()


def _scores(store: CheckpointStore, name: str, state_type: type[RunState], reporter: Reporter) -> dict[str, Any] | None:
    """Return the fields of a state whose best checkpoint is this one; None if it is damaged or was not evaluated."""
    if store.damage(name, reporter.verify) is not None:
        return None
    saved = state_type.from_json(store.state(name))
    if saved.evaluated_step != saved.step:
        return None
    scores = {f"best_{score}": getattr(saved, f"last_{score}") for score in saved.scores}
    return {**scores, "best_step": saved.step}


def bring_near(
    store: CheckpointStore, near: NearStore, world: World, reporter: Reporter
) -> tuple[str | None, list[str]]:
    """Copy the newest checkpoint that the nodes have together to the run's directory, if it is newer. Collective.

    Returns its name, if there is one, and lines on those that are damaged.

    Raises:
        OSError: a node's cannot be listed, or it cannot be copied; on all ranks.
    """
    with world.together():
        offer = near.offers() if world.local_rank == 0 else {}
    offers = world.gather(offer)
    names = {name for offer in offers for name in offer}
    newest = world.on_main(lambda: store.newest_intact(reporter.verify) if names else "")
    problems: list[str] = []
    for name in sorted((name for name in names if name > newest), reverse=True):
        having = [(rank, *offer[name]) for rank, offer in enumerate(offers) if name in offer]
        manifest = having[0][1]
        # Each file, from the first rank that has it.
        places = {file: rank for rank, _, files in reversed(having) for file in files}
        if any(text != manifest for _, text, _ in having) or places.keys() != parse_manifest(manifest).keys():
            continue  # of a save that was cut off, or a node is another one
        mine = [file for file, rank in places.items() if rank == world.rank]
        if (problem := _bring(store, near, name, manifest, mine, world, reporter)) is None:
            return name, problems
        problems.append(f"{name} in {near.root}: {problem}; trying the one before")
    return None, problems


def _bring(
    store: CheckpointStore,
    near: NearStore,
    name: str,
    manifest: str,
    mine: list[str],
    world: World,
    reporter: Reporter,
) -> str | None:
    """Copy this rank's files of a checkpoint, and let rank 0 name it. Returns what prevents it, on all ranks alike."""
    written, problem = parse_manifest(manifest), None
    unfinished = world.on_main(lambda: store.begin(step_of(name)))
    with world.together():
        for file in mine:
            shutil.copyfile(near.root / name / file, unfinished / file)
            flush_to_disk(unfinished / file)
            if file_sha256(unfinished / file, lambda _: reporter.move("starting")) != written[file].sha256:
                problem = f"{file} has changed since it was written"
    met = next((one for one in world.gather(problem) if one is not None), None)

    def adopt() -> str | None:
        problem = met or store.adopt(unfinished, manifest)
        if problem is None:
            store.point("latest", name)
        store.discard_unfinished()
        return problem

    return world.on_main(adopt)


Check = Callable[[Path, dict[str, Any]], object]
"""A function that checks the state in a checkpoint's directory; it raises RunDirectoryError to refuse it."""


def choose_checkpoint(
    store: CheckpointStore, state_of: str, reporter: Reporter, check: Check = lambda path, state: None
) -> tuple[Path, str] | None:
    """Return the newest intact checkpoint of a run, or the one in `state_of`, as store's root and name.

    Args:
        state_of: a run's directory or a checkpoint in one, for a run that branches from it; empty for `store`'s own.

    Returns:
        None if there is none yet.

    Raises:
        RunDirectoryError: no checkpoint is intact.
    """
    if not state_of:
        fix = "choose another run.dir to start from the beginning, or restore a checkpoint from a copy"
        return _newest_intact(store, reporter, check, f"run.dir = {store.root.parent}", fix)
    root, name = branch_point(state_of)
    store, key, fix = CheckpointStore(root, falsehood), f"resume.from = {state_of}", "name another run or checkpoint"
    if name is None:
        found = _newest_intact(store, reporter, check, key, fix)
        if found is None:
            raise RunDirectoryError(f"{key}: this run has no checkpoints yet; {fix}")
        return found
    if damage := _damage(store, name, reporter, check):
        raise RunDirectoryError(f"{key}: {damage}; name a complete checkpoint or a run's directory")
    return root, name


def _newest_intact(
    store: CheckpointStore, reporter: Reporter, check: Check, key: str, fix: str
) -> tuple[Path, str] | None:
    names = store.names()
    latest = store.pointed("latest")
    damage = None
    for name in sorted(names, key=lambda n: n != latest):
        damage = _damage(store, name, reporter, check)
        if damage is None:
            return store.root, name
        reporter.warn(f"checkpoint {name} cannot be used: {damage}; trying another one, if there is one")
    if names:
        raise RunDirectoryError(f"{key} has no checkpoint that can be used ({damage}); {fix}")
    return None


def _damage(store: CheckpointStore, name: str, reporter: Reporter, check: Check) -> str | None:
    with holding(store.root / name):
        damage = None if name == store.verified else store.damage(name, reporter.verify)
        if damage is None:
            try:
                check(store.root / name, store.state(name))
            except RunDirectoryError as error:
                return str(error)
    return damage
