"""`karat verify`: trains between two checkpoints of a run again, and compares data, losses and weights with the run's.

On as many ranks, and a processor and versions as the run had, all must be the same bits. Elsewhere rounding differs, so
losses and weights may differ within a tolerance: LOSSES of a loss, and WEIGHTS of the way that the weights moved. What
the optimizer keeps, and a network beside its weights, follows them: it may differ by STATES of its size or way.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from karat_scale.checkpoint.restore import SavedState, read_state
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.commands.replay.command import (
    refuse_other_files,
    refuse_unshared,
    scratch_recipe,
    train_on,
    trained_again,
)
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World, device_name
from karat_scale.engine.reporting.progress import MetricsLog, read_events
from karat_scale.engine.shards import Fragment, Pieces
from karat_scale.foundation.console import plural, printable, write_json
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import file_sha256
from karat_scale.foundation.machine import library_versions, processor_name
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.task import TrainState

LOSSES, WEIGHTS, STATES = 0.01, 0.05, 0.5


def verify(run_dir: str, begin: int | None, end: int | None, json_file: str | None) -> int:
    """Train from one checkpoint to another again, and print what differs; returns the exit code, 1 if something does.

    Args:
        begin: the step of the first checkpoint; the one before the second when None. 0: from the start.
        end: the step of the second checkpoint; the newest when None.

    Raises:
        UserError: no such run or checkpoints, or data that do not fit.
    """
    opened = OpenRun.at(run_dir, Recipe)
    directory, recipe = opened.directory, opened.recipe
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        with world.together():
            names = _segment(directory.store, begin, end) if world.is_main else ("", "")
        first, last = world.broadcast(names)
        saved = directory.store.state(last)
        if saved["world_size"] != world.size:
            ranks = saved["world_size"]
            raise UserError(
                f"{last} was written by {plural(ranks, 'rank')}, and here {plural(world.size, 'rank')} would train; "
                f"use karat launch --ranks {ranks} verify, or a job of as many"
            )
        refuse_other_files(directory, recipe, 0 if first else 1)
        with scratch_recipe(directory, recipe, first, world) as again:
            refuse_unshared(Path(again.run.dir), world)
            found = _train(again, directory, first, saved, world)
    if not world.is_main:
        return 0
    others = _other_machine(directory.summary() or {}, recipe, world)
    for note in _notes(directory, saved, others):
        print(printable(f"note: {note}"))
    print(f"{directory.path}, from {first or 'the start'} to {last}, on {plural(world.size, 'rank')}")
    for comparison in found:
        print(printable(f"{comparison.what}: {comparison.text}"))
    is_good = all(one.is_same or (bool(others) and one.is_close) for one in found)
    bits = "the same bits" if all(one.is_same for one in found) else "the same within the tolerance"
    print(f"verified: {bits}" if is_good else "NOT verified: the run was trained in another way")
    write_json(
        json_file,
        {"run": run_dir, "from": first or None, "to": last, "verified": is_good, "other_machine": others}
        | {one.what: {name: value for name, value in asdict(one).items() if name != "what"} for one in found},
    )
    return 0 if is_good else 1


@dataclass(frozen=True)
class Comparison:
    """Of what the run has with what was trained again. `is_close`: within the tolerance."""

    what: str
    is_same: bool
    is_close: bool
    text: str


def _segment(store: CheckpointStore, begin: int | None, end: int | None) -> tuple[str, str]:
    """Return the names of the two checkpoints, which are intact; the first is empty for the start of the run.

    Raises:
        RunDirectoryError: one is missing or damaged.
    """
    names = store.names()
    if not names:
        raise store.nothing_saved()
    last = store.find_intact(names[0] if end is None else checkpoint_name(end))
    first = next((name for name in names if name < last), "") if begin is None else checkpoint_name(begin)
    if begin == 0:
        first = ""
    if first >= last:
        raise UserError(f"--from {begin} should be before {last}")
    return (store.find_intact(first) if first else ""), last


def _train(
    recipe: Recipe, directory: RunDirectory, first: str, saved: Mapping[str, Any], world: World
) -> list[Comparison]:
    """Train to the step of `saved` in the scratch directory of `recipe`, and compare; the result counts on rank 0."""
    scratch = Path(recipe.run.dir)
    log = MetricsLog(scratch / "metrics.jsonl") if world.is_main else None
    with trained_again(recipe, saved["step"], world, log) as (task, trainer):
        began = trainer.state.step
        if not first and not trainer.checkpoints.save(trainer.state):
            raise trainer.checkpoints.store.not_saved(trainer.checkpoints.problem)
        train_on(trainer, trainer.feed(saved["step"]), saved["step"])
        trainer.look()
        state = trainer.state
        assert isinstance(state, TrainState)
        task.fold(state)
        if not trainer.checkpoints.save(state):
            raise trainer.checkpoints.store.not_saved(trainer.checkpoints.problem)
    if not world.is_main:
        return []
    theirs, ours = directory.store, CheckpointStore(scratch / "checkpoints")
    before = (theirs, first) if first else (ours, checkpoint_name(0))
    states = [
        read_state(store.root / name, store.state(name))
        for store, name in (before, (theirs, checkpoint_name(saved["step"])), (ours, checkpoint_name(saved["step"])))
    ]
    same = state.data_digest == saved["data_digest"]
    data = Comparison("data", same, same, "the same digest" if same else "another digest: not the same samples")
    kept, starts = _lines(directory.metrics_file, began, saved["step"])
    again, _ = _lines(scratch / "metrics.jsonl", began, saved["step"])
    # A start before may have had another recipe, which asked for other lines.
    missing = set() if _has_other_recipe(directory, saved) else (again.keys() ^ kept.keys()) - starts
    return [data, _compare_losses(kept, again, missing), *_compare_weights(*states)]


class _Line(NamedTuple):
    """The mean of the steps after `begin`."""

    begin: int
    loss: Any
    digest: Any


def _lines(log: Path, begin: int, end: int) -> tuple[dict[int, _Line], set[int]]:
    """What a log has of the steps after `begin` up to `end`, by the last step of a line; and where training started."""
    found: dict[int, _Line] = {}
    before, starts = begin, set()
    for event in read_events(log):
        step = event.get("step")
        if not isinstance(step, int):
            continue
        if event.get("event") in ("resume", "start"):
            found = {last: line for last, line in found.items() if last <= step}
            before = step
            starts.add(step)
        elif event.get("event") == "train":
            found[step] = _Line(before, event.get("loss"), event.get("data_digest"))
            before = step
    return {last: line for last, line in found.items() if begin < last <= end}, starts


def _compare_losses(kept: Mapping[int, _Line], again: Mapping[int, _Line], missing: Set[int]) -> Comparison:
    if missing:
        return Comparison("losses", False, False, f"only one log has a line of step {min(missing)}")
    both = sorted(last for last, line in again.items() if last in kept and kept[last].begin == line.begin)
    if not both:
        return Comparison("losses", True, True, "the log has no line of these steps alone")
    others = [last for last in both if kept[last] != again[last]]
    if not others:
        return Comparison("losses", True, True, f"the same bits in {plural(len(both), 'line')} of the log")
    far = max(_apart(kept[last].loss, again[last].loss) for last in both)
    was, now = kept[others[0]], again[others[0]]
    text = f"{len(others)} of {plural(len(both), 'line')} differ, by at most {far:.2g} of the loss; the first is of "
    text += f"steps {was.begin + 1} to {others[0]}: {was.loss} in the run and {now.loss} now"
    return Comparison("losses", False, far <= LOSSES, text)


def _apart(one: Any, other: Any) -> float:
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return 0.0 if one == other else float("inf")
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def _compare_weights(before: SavedState, kept: SavedState, again: SavedState) -> Iterator[Comparison]:
    fits = before.shapes == kept.shapes  # it may be of a smaller image size
    yield _compare_pieces("weights", kept.shapes, before.masters if fits else None, kept.masters, again.masters)
    if kept.ema is not None:
        averages = before.ema or before.masters if fits else None
        yield _compare_pieces("averages", kept.shapes, averages, kept.ema, again.ema or Pieces())
    for key, pieces in kept.elementwise.items():
        there = again.elementwise.get(key, Pieces())
        yield _compare_pieces(f"optimizer, {key}", kept.shapes, None, pieces, there, STATES)
    if shapes := {name: tuple(value.shape) for name, value in kept.buffers.items() if value.is_floating_point()}:
        was, now, old = (_pieces(state.buffers) for state in (kept, again, before))
        yield _compare_pieces("buffers", shapes, old if fits else None, was, now, STATES)
    other = [name for name, count in _counts(kept).items() if _counts(again).get(name) != count]
    yield Comparison("counts", not other, not other, f"{', '.join(other)} differ" if other else "the same")


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Pieces:
    pieces = Pieces()
    for name, tensor in tensors.items():
        pieces.add([Fragment(name, 0, 0, tensor.numel())], tensor)
    return pieces


def _counts(state: SavedState) -> dict[str, Any]:
    """What must be the same on any machine, by name."""
    scalars = {f"{key} of {name}": value for key, values in state.scalars.items() for name, value in values.items()}
    buffers = {name: value.tolist() for name, value in state.buffers.items() if not value.is_floating_point()}
    return {**state.counters, **scalars, **buffers}


def _compare_pieces(
    what: str,
    shapes: Mapping[str, Iterable[int]],
    before: Pieces | None,
    kept: Pieces,
    again: Pieces,
    tolerance: float = WEIGHTS,
) -> Comparison:
    """Compare tensors by name; where rounding differs, by the way from `before`, or their size without it."""
    others, far, way = [], 0.0, 0.0
    for name, shape in shapes.items():
        if name not in kept and name not in again:
            continue
        was, now = (_whole(name, shape, pieces) for pieces in (kept, again))
        way += float((was - (_whole(name, shape, before) if before else 0)).double().square().sum())
        if not torch.equal(was, now):
            others.append(name)
            far += float((was - now).double().square().sum())
    if not others:
        return Comparison(what, True, True, "the same bits")
    count = plural(len(others), "tensor")
    share = (far / way) ** 0.5 if way else float("inf")
    scale = "the way that they moved" if before else "their size"
    text = f"{count} differ, by {share:.2g} of {scale}; the first is {others[0]}"
    return Comparison(what, False, share <= tolerance, text)


def _whole(name: str, shape: Iterable[int], pieces: Pieces) -> torch.Tensor:
    whole = torch.full((torch.Size(shape).numel(),), float("nan"))
    pieces.copy_into(name, whole)
    return whole


def _other_machine(summary: Mapping[str, Any], recipe: Recipe, world: World) -> list[str]:
    """Return why rounding may differ from that of the machine that trained last; empty if it may not."""
    has_softmax = any(one.kind == "softmax" or one.softmax_heads for one in recipe.attention.sections)
    if world.device.type != "cpu" and has_softmax:
        return ["softmax attention adds in no fixed order on a GPU"]
    here = {"device": device_name(world.device), "processor": processor_name(), "versions": library_versions()}
    if not summary:
        return ["the run has no summary.json, which names its machine"]
    return [f"{name} {summary.get(name)} there, {here[name]} here" for name in here if summary.get(name) != here[name]]


def _has_other_recipe(directory: RunDirectory, saved: Mapping[str, Any]) -> bool:
    return saved.get("recipe_sha256") != file_sha256(directory.recipe_file)


def _notes(directory: RunDirectory, saved: Mapping[str, Any], others: Iterable[str]) -> Iterator[str]:
    if _has_other_recipe(directory, saved):
        yield "recipe.yaml is not the one that the checkpoint was trained with"
    for other in others:
        yield f"{other}; so losses may differ by {LOSSES:.0%} and weights by {WEIGHTS:.0%} of the way that they moved"
