"""`karat replay` and `karat verify`: train a part of a run again, and look at what happens or compare it with the run.

A replay takes one step, bit for bit, and finds the first module and tensor that is not finite, in the forward pass and
in the backward pass. It shows the step's images.

A verification trains between two checkpoints, and compares data, losses and weights. With the run's number of ranks,
processor and versions, all bits must be the same. Elsewhere rounding differs, so losses and weights may differ within a
tolerance: by a share LOSSES of a loss, and by a share WEIGHTS of the distance that the weights moved. The optimizer's
states and a network's buffers follow the weights: they may differ by a share STATES of their size, or of the distance
they moved.
"""

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from karat_scale.checkpoint.restore import SavedState, read_state
from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name, step_of
from karat_scale.commands.look.command import ShownBatch, draw
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.shards.shard_format import check_data_path
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World, device_name
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter, SilentDisplay, read_events
from karat_scale.engine.shards import Fragment, Pieces
from karat_scale.foundation.console import plural, print_table, printable, progress, write_json
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.foundation.files import file_sha256, write_atomically
from karat_scale.foundation.machine import library_versions, processor_name, usable_cores
from karat_scale.foundation.tables import refuse_untrusted
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import dump_recipe
from karat_scale.training.outcome import checkpoints_before
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.conversion import FILE as MATCHED_FILE
from karat_scale.training.tasks.classification.distillation_teacher import FILE as DISTILL_FILE
from karat_scale.training.tasks.classification.distillation_teacher import TEACHER_FILE
from karat_scale.training.tasks.classification.task import ClassificationTask, TrainState
from karat_scale.training.trainer import Trainer

_NEVER = 10**9


@dataclass
class Findings:
    """The first tensor that is not finite in each pass, by the pass, and what the network saw and returned.

    seen, returned: images and logits of each micro batch.
    """

    found: dict[str, str] = field(default_factory=dict)
    seen: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    _before: dict[str, str] = field(default_factory=dict)

    def look(self, which: str, what: str, values: Tensor) -> None:
        """Look at what a pass has computed, unless something was found in that pass before.

        A finding ends with the tensor that the pass had computed just before, and its largest finite magnitude.
        """
        if which not in self.found:
            if finding := not_finite(what, values):
                self.found[which] = finding + self._before.get(which, "")
            finite = values.detach().float()
            finite = finite[torch.isfinite(finite)]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            self._before[which] = f"; before it: {what} within {largest:.3g}"


@contextmanager
def watched(network: nn.Module) -> Iterator[Findings]:
    """Watch the passes of a network inside the context. Each module's output is read, so a step is slower."""
    findings = Findings()

    def after(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not network.training:  # a look at the scores, after the step
            return
        parts = output if isinstance(output, tuple | list) else (output,)
        if module is network:
            findings.seen.append(inputs[0].detach().float().cpu())
            findings.returned.append(parts[0].detach().float().cpu())
        what = f"output of {name or 'the network'} ({type(module).__name__})"
        for tensor in parts:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                findings.look("forward", what, tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(findings.look, "backward", f"gradient of the {what}"))

    with ExitStack() as handles:
        for name, module in network.named_modules():
            handles.callback(module.register_forward_hook(partial(after, name)).remove)
        yield findings


def not_finite(what: str, values: Tensor) -> str:
    """Return how many of a tensor's values are not finite, as text; "" if all are finite."""
    bad = int((~torch.isfinite(values.detach())).sum())
    return f"{what}: {bad:,} of {values.numel():,} values" if bad else ""


@dataclass(frozen=True)
class Replayed:
    """A step as one rank took it.

    Attributes:
        findings: what was not finite in each pass.
        losses: the loss of each of its samples.
        weights: the first weight that was not finite before the step; None if all were finite.
        shown: the images with the largest losses, the largest first.
    """

    findings: dict[str, str]
    losses: list[float]
    weights: str | None
    shown: ShownBatch


def replay(run_dir: str, step: int, images: int, out: str | None, json_file: str | None) -> int:
    """Take a step again and print what was found; returns the exit code.

    Args:
        step: the step, counted from 1 as `karat train` logs it.
        images: the largest number of images to draw.

    Raises:
        UserError: no such run, no intact checkpoint before the step, or data that do not fit.
    """
    opened = OpenRun.at(run_dir, Recipe)
    directory, recipe = opened.directory, opened.recipe
    drawn = Path(out or f"{directory.path.resolve()}-replay-{step}.png")
    if not os.access(drawn.parent, os.W_OK):
        raise UserError(f"{drawn.parent} is not writable; choose another --out")
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        begin = world.on_main(lambda: _checkpoint(directory.store, step))
        refuse_other_files(directory, recipe, step if not begin else 0)
        as_found = recipe.changed(  # a compiled model has no modules to watch
            train__compile=False, train__on_nonfinite="skip", train__max_skipped_steps=_NEVER, log__every_steps=_NEVER
        )
        with scratch_recipe(directory, as_found, begin, world) as again:
            ranks, norm, accumulation = _take(again, step, world, images)
    if world.is_main:
        micro_batches = f"{world.size} x {accumulation} micro batches"
        print(f"{directory.path}, step {step:,}, from {begin or 'the start'}, {micro_batches}: ", end="")
        figures = _report(ranks, norm, "label_loss" if recipe.distill.from_ else "loss")
        write_json(json_file, {"run": run_dir, "step": step, "checkpoint": begin or None, **figures})
        _show(ranks, images, drawn)
    return 0


def refuse_other_files(directory: RunDirectory, recipe: Recipe, from_start: int) -> None:
    """Refuse data that have moved, and files that would be read in place of the run's own. Raises UserError."""
    try:
        check_data_path(recipe.data)
    except DataError as error:
        problem = str(error).partition(";")[0]
        raise DataError(f"{problem}; put the data, or a link to them, there") from None
    for source, name in ((recipe.attention.transfer_from, TEACHER_FILE), (recipe.distill.from_, DISTILL_FILE)):
        if source and not (directory.path / name).is_file():
            raise RunDirectoryError(f"{directory.path / name} is missing; put it back, the run has learned from it")
    for key, source in {"init_from": recipe.init_from, "resume.from": recipe.resume.from_}.items():
        if from_start and source:
            where = f"{directory.recipe_file}: {key} = {source}"
            refuse_untrusted(f"{where} is outside the run, and no checkpoint before step {from_start} is left in it")


def _checkpoint(store: CheckpointStore, step: int) -> str:
    """Return the newest intact checkpoint before a step; "" if training reaches it only from the start.

    Raises:
        RunDirectoryError: there are such checkpoints, and all are damaged.
    """
    names = [*checkpoints_before(store, step)]
    for name in names:
        try:
            return store.find_intact(name)
        except RunDirectoryError as error:
            said = str(error).removesuffix("; restore it from a copy, or choose another")
            print(printable(f"note: {said}"), file=sys.stderr)
    if names:
        raise RunDirectoryError(f"{store.root}: none before step {step} is intact; take a step after an intact one")
    return ""


def refuse_unshared(scratch: Path, world: World) -> None:
    """Raise UserError on all ranks if the temporary directory of rank 0 is not there on each node."""
    if world.any(not scratch.is_dir()):
        raise UserError(f"TMPDIR = {scratch.parent}: not seen by all nodes; set TMPDIR to a directory that they share")


@contextmanager
def scratch_recipe(directory: RunDirectory, recipe: Recipe, begin: str, world: World) -> Iterator[Recipe]:
    """Yield a run's recipe in a temporary directory that continues from a checkpoint, and writes nothing else."""
    path = Path(world.on_main(lambda: tempfile.mkdtemp(prefix="karat-replay-")))
    names = (TEACHER_FILE, DISTILL_FILE, MATCHED_FILE)
    kept = [file for name in names if (file := directory.path / name).is_file()]
    own = recipe.changed(
        run__dir=str(path),
        init_from=recipe.init_from if not begin else "",
        convert=recipe.convert if not begin else type(recipe.convert)(),  # it belongs to init_from
        resume__mode="auto",
        resume__from_=str(directory.store.root / begin) if begin else recipe.resume.from_,
        log__histogram_every_steps=None,
        log__trackers=(),
        log__profile_steps=None,
        checkpoint__snapshots=0,
        # The run may have had a larger machine. A stream's order depends on the workers.
        data__workers=recipe.data.workers if recipe.data.is_stream else min(recipe.data.workers, usable_cores()),
    )
    try:
        with world.together():
            if world.is_main:
                (path / "recipe.yaml").write_text(dump_recipe(own))  # the same run, so it keeps its teachers
                for file in kept:
                    shutil.copy(file, path / file.name)
        if kept:
            refuse_unshared(path, world)
        yield own
    finally:
        if world.is_main:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def trained_again(
    recipe: Recipe, step: int, world: World, log: MetricsLog | None = None
) -> Iterator[tuple[ClassificationTask, Trainer]]:
    """Yield task and trainer of a scratch recipe, resumed before the step to take. Raises UserError if not possible."""
    task: ClassificationTask | None = None
    reporter = Reporter(PlainDisplay() if world.is_main and log is None else SilentDisplay(), log, world.rank)
    fix = "use as many ranks as the run had (karat launch --ranks N ...), each with as much memory"
    try:
        with one_line_out_of_memory(lambda: fix):
            task = ClassificationTask(recipe, world, reporter).at(step - 1)
            trainer = Trainer(task, RunDirectory(recipe.run.dir))
            state = trainer.resume()
            if task.stream_differs:
                raise UserError(f"step {step}: {task.stream_differs}; take it again on as many ranks as the run had")
            if not state.step < step <= trainer.total_steps:
                raise UserError(f"step {step}: the run has steps 1 to {trainer.total_steps:,}")
            if task.size_at(state.step) != task.size_at(step - 1):
                raise UserError(f"step {step}: no checkpoint of its image size is left before it; take a later step")
            yield task, trainer
    finally:
        if task is not None:
            task.close()
        reporter.close()


def train_on(trainer: Trainer, batches: DeviceFeed[Any], step: int) -> None:
    """Train until `step` steps are finished."""
    steps = progress("training up to the step", step - trainer.state.step, "steps")
    with steps if trainer.world.is_main else nullcontext(lambda count: None) as advance:
        while trainer.state.step < step:
            trainer.step(trainer.micro_batches(batches))
            advance(1)


def _take(recipe: Recipe, step: int, world: World, count: int) -> tuple[list[Replayed], float, int]:
    """Take the step; returns what each rank found, the norm of the gradients, and the micro batches of a rank."""
    with trained_again(recipe, step, world) as (task, trainer):
        batches = trainer.feed(step)
        train_on(trainer, batches, step - 1)
        parameters = trainer.engine.module.named_parameters()  # those that ZeRO stage 3 keeps elsewhere are empty
        weights = next(filter(None, (not_finite(f"weight {name}", values) for name, values in parameters)), None)
        taken = list(trainer.micro_batches(batches))
        with watched(trainer.engine.module) as findings:
            norm = float(trainer.step(taken))
        losses: list[float] = []
        targets = [task.as_trained(batch)[1].float().cpu() for batch in taken]
        for soft, logits in zip(targets, findings.returned, strict=True):
            losses += (-(soft * torch.log_softmax(logits, -1)).sum(-1)).tolist()
        shown = ShownBatch.of(task, zip(taken, findings.seen, targets, strict=True)).chosen(_worst(losses, count))
        return world.gather(Replayed(findings.found, losses, weights, shown)), norm, trainer.plan.accumulation


def _worst(losses: list[float], count: int) -> list[int]:
    """Return the places of the largest losses; those that are not finite come first."""
    return sorted(range(len(losses)), key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf)[:count]


def _report(ranks: list[Replayed], norm: float, name: str) -> dict[str, Any]:
    """Print what was found; returns the same as plain data.

    name: the name of the loss in the run's log. A student also logs a loss from its teacher, which is not of single
    images.
    """
    losses = [loss for rank in ranks for loss in rank.losses]
    bad = sum(not math.isfinite(loss) for loss in losses)
    loss = math.nan if bad else math.fsum(losses) / len(losses)
    print(f"{name.replace('_', ' ')} {loss:.6g}, gradient norm {norm:.6g}")
    lines = [f"{bad} of {len(losses)} samples have a loss that is not finite"] if bad else []
    for number, rank in enumerate(ranks):
        where = f"rank {number}: " if len(ranks) > 1 else ""
        lines += [f"{where}before the step: {rank.weights}"] if rank.weights else []
        lines += [f"{where}{which} pass, first not finite: {text}" for which, text in rank.findings.items()]
    if not lines and not math.isfinite(norm):
        lines = ["all gradients are finite, but the sum of their squares overflows"]
    for line in lines or ["all outputs and gradients are finite"]:
        print(printable(line))
    return {
        name: None if bad else loss,
        "grad_norm": norm if math.isfinite(norm) else None,
        "samples": len(losses),
        "samples_not_finite": bad,
        "ranks": [{**rank.findings, "weights": rank.weights} for rank in ranks],
    }


def _show(ranks: list[Replayed], count: int, path: Path) -> None:
    """Draw and list the images of the largest losses over all ranks."""
    losses = [rank.losses[i] for rank in ranks for i in _worst(rank.losses, len(rank.shown.places))]
    images, targets = (np.concatenate([getattr(rank.shown, name) for rank in ranks]) for name in ("images", "targets"))
    places = [place for rank in ranks for place in rank.shown.places]
    order = _worst(losses, count)
    shown = replace(ranks[0].shown, images=images, targets=targets, places=places).chosen(order)
    rows = [[f"{losses[i]:.4g}", shown.label(row), shown.places[row]] for row, i in enumerate(order)]
    print_table("images of the largest losses", ["loss", "target", "from"], rows, (1, 2))
    write_atomically(path, draw(shown))
    print(f"\n{path}")


LOSSES, WEIGHTS, STATES = 0.01, 0.05, 0.5


def verify(run_dir: str, begin: int | None, end: int | None, json_file: str | None) -> int:
    """Train from one checkpoint to another again, and print what differs; returns the exit code, 1 if something does.

    Args:
        begin: the step of the first checkpoint; 0 is the start, and None the checkpoint before the second.
        end: the step of the second checkpoint; the newest when None.

    Raises:
        UserError: no such run or checkpoints, or data that do not fit.
    """
    opened = OpenRun.at(run_dir, Recipe)
    directory, recipe = opened.directory, opened.recipe
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        first, last = world.on_main(lambda: _segment(directory.store, begin, end))
        saved = directory.store.state(last)
        if saved["world_size"] != world.size:
            ranks = saved["world_size"]
            raise UserError(
                f"{last} was written by {plural(ranks, 'rank')}, and here {plural(world.size, 'rank')} would train; "
                f"use karat launch --ranks {ranks} verify {run_dir}, or a job of as many"
            )
        refuse_other_files(directory, recipe, 0 if first else 1)
        with scratch_recipe(directory, recipe, first, world) as again:
            refuse_unshared(Path(again.run.dir), world)
            found = _train(again, directory, first, saved, world)
    if not world.is_main:
        return 0
    others = _other_machine(directory.summary() or {}, recipe, world)
    if _has_other_recipe(directory, saved):
        print("note: recipe.yaml is not the one that the checkpoint was trained with")
    tolerance = f"losses may differ by {LOSSES:.0%} and weights by {WEIGHTS:.0%} of the way that they moved"
    for other in others:
        print(printable(f"note: {other}; so {tolerance}"))
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
    """A comparison of the run with what was trained again. `is_close`: whether it is within the tolerance."""

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
    for option, step in (("--from", begin), ("--to", end)):
        if step and checkpoint_name(step) not in names:
            there = ", ".join(str(step_of(name)) for name in reversed(names))
            raise UserError(f"{option} {step}: no checkpoint has this step; choose {there}")
    last = store.find_intact(names[0] if end is None else checkpoint_name(end))
    if begin is None:
        first = next((name for name in names if name < last), "")
    else:
        first = checkpoint_name(begin) if begin else ""
    if first >= last:
        raise UserError(f"--from {begin} should be before {last}; name an earlier step, or 0 for the start")
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
    before = (theirs, first) if first else (ours, checkpoint_name(began))
    states = [
        read_state(store.root / name, store.state(name))
        for store, name in (before, (theirs, checkpoint_name(saved["step"])), (ours, checkpoint_name(saved["step"])))
    ]
    same = state.data_digest == saved["data_digest"]
    data = Comparison("data", same, same, "the same digest" if same else "another digest: not the same samples")
    kept, starts = _lines(directory.metrics_file, began, saved["step"])
    again, _ = _lines(scratch / "metrics.jsonl", began, saved["step"])
    # An earlier start may have had another recipe, which asked for other lines.
    missing = set() if _has_other_recipe(directory, saved) else (again.keys() ^ kept.keys()) - starts
    return [data, _compare_losses(kept, again, missing), *_compare_weights(*states)]


class _Line(NamedTuple):
    """A line of the log: the mean of the steps after `begin`."""

    begin: int
    loss: Any
    digest: Any


def _lines(log: Path, begin: int, end: int) -> tuple[dict[int, _Line], set[int]]:
    """Return a log's lines on the steps after `begin` up to `end`, by their last step; and where training started."""
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
        step = min(missing)
        text = f"a line of step {step}, which was not written again" if step in kept else f"no line of step {step}"
        return Comparison("losses", False, False, f"metrics.jsonl has {text}")
    both = sorted(last for last, line in again.items() if last in kept and kept[last].begin == line.begin)
    if not both:
        return Comparison("losses", True, True, "not compared: the log has no line of just these steps")
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
    masters = before.masters if fits else None
    yield _compare_pieces("weights", kept.shapes, masters, kept.masters, again.masters, WEIGHTS)
    if kept.ema is not None:
        averages = before.ema or before.masters if fits else None
        yield _compare_pieces("averages", kept.shapes, averages, kept.ema, again.ema or Pieces(), WEIGHTS)
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
        pieces.add([Fragment.whole(name, tensor)], tensor)
    return pieces


def _counts(state: SavedState) -> dict[str, Any]:
    """Return the values that must be the same on any machine, by name."""
    scalars = {f"{key} of {name}": value for key, values in state.scalars.items() for name, value in values.items()}
    buffers = {name: value.tolist() for name, value in state.buffers.items() if not value.is_floating_point()}
    return {**state.counters, **scalars, **buffers}


def _compare_pieces(
    what: str, shapes: Mapping[str, Iterable[int]], before: Pieces | None, kept: Pieces, again: Pieces, tolerance: float
) -> Comparison:
    """Compare tensors by name; a difference is relative to the way from `before`, or without it to their size."""
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
    sections, name, side = recipe.attention.sections, recipe.model.name, recipe.model.image_size
    unordered = {
        "softmax attention": any(one.kind == "softmax" or one.softmax_heads for one in sections),
        "attention.simplex": any(one.simplex for one in sections),
        f"{name} at {side} px": name.startswith("mobilevit") and side % 64 > 0,  # it resizes maps of an odd side
    }
    if world.device.type != "cpu" and any(unordered.values()):
        return [f"{what} adds in no fixed order on a GPU" for what, is_so in unordered.items() if is_so]
    here = {"device": device_name(world.device), "processor": processor_name(), "versions": library_versions()}
    if not summary:
        return ["the run has no summary.json, which names its machine"]
    return [f"{name} {summary.get(name)} there, {here[name]} here" for name in here if summary.get(name) != here[name]]


def _has_other_recipe(directory: RunDirectory, saved: Mapping[str, Any]) -> bool:
    return saved.get("recipe_sha256") != file_sha256(directory.recipe_file)
