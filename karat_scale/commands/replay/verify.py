"""`karat verify`: trains between two checkpoints of a run again, and compares data, losses and weights with the run's.

On as many ranks, and a processor and versions as the run had, all must be the same bits. Elsewhere rounding differs, so
losses and weights may differ within a tolerance: LOSSES of a loss, and WEIGHTS of the way that the weights moved.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from karat_scale.checkpoint.restore import SavedState, read_state
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.commands.replay.command import refuse_other_files, scratch_recipe, train_on, trained_again
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World, device_name
from karat_scale.engine.reporting.progress import MetricsLog, read_events
from karat_scale.engine.shards import Pieces
from karat_scale.foundation.console import plural, printable, write_json
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import file_sha256
from karat_scale.foundation.machine import library_versions, processor_name
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.task import TrainState

LOSSES, WEIGHTS = 0.01, 0.05


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
            ranks = plural(saved["world_size"], "rank")
            raise UserError(
                f"{last} was written by {ranks}, and here {plural(world.size, 'rank')} would train; use as many"
            )
        refuse_other_files(directory, recipe, 0 if first else 1)
        with scratch_recipe(directory, recipe, first, world) as again:
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
    kept, again = (_lines(log, began, saved["step"]) for log in (directory.metrics_file, scratch / "metrics.jsonl"))
    return [data, _compare_losses(kept, again), *_compare_weights(*states)]


class _Line(NamedTuple):
    loss: Any
    digest: Any


def _lines(log: Path, begin: int, end: int) -> dict[tuple[int, int], _Line]:
    """What a log has of the steps after `begin` up to `end`, by the steps that a line is the mean of."""
    found: dict[tuple[int, int], _Line] = {}
    before = begin
    for event in read_events(log):
        step = event.get("step")
        if not isinstance(step, int):
            continue
        if event.get("event") in ("resume", "start"):
            found = {steps: line for steps, line in found.items() if steps[1] <= step}
            before = step
        elif event.get("event") == "train":
            found[before, step] = _Line(event.get("loss"), event.get("data_digest"))
            before = step
    return {steps: line for steps, line in found.items() if begin <= steps[0] and steps[1] <= end}


def _compare_losses(kept: Mapping[Any, _Line], again: Mapping[Any, _Line]) -> Comparison:
    both = sorted(kept.keys() & again.keys())
    if not both:
        return Comparison("losses", True, True, "the log has no line of these steps alone")
    others = [steps for steps in both if kept[steps] != again[steps]]
    if not others:
        return Comparison("losses", True, True, f"the same bits in {plural(len(both), 'line')} of the log")
    far = max(_apart(kept[steps].loss, again[steps].loss) for steps in both)
    (begin, end), was, now = others[0], kept[others[0]], again[others[0]]
    text = f"{len(others)} of {plural(len(both), 'line')} differ, by at most {far:.2g} of the loss; the first is of "
    text += f"steps {begin + 1} to {end}: {was.loss} in the run and {now.loss} now"
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
        yield _compare_pieces(f"optimizer, {key}", kept.shapes, None, pieces, there)


def _compare_pieces(
    what: str, shapes: Mapping[str, Iterable[int]], before: Pieces | None, kept: Pieces, again: Pieces
) -> Comparison:
    """Compare tensors by name. Without `before`, only bits count: what the optimizer keeps shows in the weights."""
    others, far, way = [], 0.0, 0.0
    for name, shape in shapes.items():
        if name not in kept and name not in again:
            continue
        was, now, old = (_whole(name, shape, pieces) for pieces in (kept, again, before or kept))
        way += float((was - old).double().square().sum())
        if not torch.equal(was, now):
            others.append(name)
            far += float((was - now).double().square().sum())
    if not others:
        return Comparison(what, True, True, "the same bits")
    count = plural(len(others), "tensor")
    if before is None:
        return Comparison(what, False, True, f"{count} differ, the first is {others[0]}")
    share = (far / way) ** 0.5 if way else float("inf")
    text = f"{count} differ, by {share:.2g} of the way that they moved; the first is {others[0]}"
    return Comparison(what, False, share <= WEIGHTS, text)


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


def _notes(directory: RunDirectory, saved: Mapping[str, Any], others: Iterable[str]) -> Iterator[str]:
    if saved.get("recipe_sha256") != file_sha256(directory.recipe_file):
        yield "recipe.yaml is not the one that the checkpoint was trained with"
    for other in others:
        yield f"{other}; so losses may differ by {LOSSES:.0%} and weights by {WEIGHTS:.0%} of the way that they moved"
