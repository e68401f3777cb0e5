"""`karat replay`: takes one step of a run again, bit for bit, and says what in it is not finite, with its images.

It finds the first module and tensor that is not finite: in the forward pass, then in the backward pass.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.commands.look.command import ShownBatch, draw
from karat_scale.data.batch import Batch
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter, SilentDisplay
from karat_scale.foundation.console import print_table, printable, progress, write_json
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import write_atomically
from karat_scale.foundation.tables import refuse_untrusted
from karat_scale.recipe import Recipe
from karat_scale.training.outcome import checkpoints_before
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.tasks.classification.conversion import FILE as MATCHED_FILE
from karat_scale.training.tasks.classification.distillation_teacher import FILE as DISTILL_FILE
from karat_scale.training.tasks.classification.distillation_teacher import TEACHER_FILE
from karat_scale.training.tasks.classification.task import ClassificationTask
from karat_scale.training.trainer import Trainer

_NEVER = 10**9
_PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Finding:
    """A tensor with values that are not finite.

    Attributes:
        what: which tensor, such as "output of blocks.0.attn (KaratAttention)".
        bad, total: values that are not finite, and all.
        before: what the pass had computed just before it, with the largest finite magnitude in it.
    """

    what: str
    bad: int
    total: int
    before: str = ""

    def __str__(self) -> str:
        after = f"; before it: {self.before}" if self.before else ""
        return f"{self.what}: {self.bad:,} of {self.total:,} values{after}"


@dataclass
class Findings:
    """The first tensor that is not finite in each pass, and what the network saw and returned."""

    forward: Finding | None = None
    backward: Finding | None = None
    seen: list[Tensor] = field(default_factory=list)
    """The images of each micro batch."""
    returned: list[Tensor] = field(default_factory=list)
    """The logits of each micro batch."""
    _before: dict[str, str] = field(default_factory=lambda: dict.fromkeys(_PASSES, ""))

    def look(self, which: str, what: str, values: Tensor) -> None:
        """Look at what a pass has computed, unless it has found something before."""
        if getattr(self, which) is None:
            setattr(self, which, _finding(what, values, self._before[which]))
            finite = values.detach().float()
            finite = finite[torch.isfinite(finite)]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            self._before[which] = f"{what} within {largest:.3g}"


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


def not_finite(parameters: Iterator[tuple[str, Tensor]]) -> Finding | None:
    """Return the first parameter with values that are not finite; those that ZeRO stage 3 keeps elsewhere are empty."""
    return next((found for name, values in parameters if (found := _finding(f"weight {name}", values, ""))), None)


def _finding(what: str, values: Tensor, before: str) -> Finding | None:
    bad = int((~torch.isfinite(values.detach())).sum())
    return Finding(what, bad, values.numel(), before) if bad else None


@dataclass(frozen=True)
class Replayed:
    """A step as one rank took it.

    Attributes:
        losses: of each of its samples.
        weights: what was not finite before the step; None if all were.
        shown: the images with the largest losses, of which the first one has the largest.
    """

    findings: dict[str, str]
    losses: list[float]
    weights: str | None
    shown: ShownBatch


def replay(run_dir: str, step: int, images: int, out: str | None, json_file: str | None) -> int:
    """Take a step again and print what was found; returns the exit code.

    Args:
        step: counted from 1, as `karat train` logs it.
        images: at most this many are drawn.

    Raises:
        UserError: no such run, no intact checkpoint before the step, or data that do not fit.
    """
    opened = OpenRun.at(run_dir, Recipe)
    directory, recipe = opened.directory, opened.recipe
    with distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world:
        with world.together():
            begin = _checkpoint(directory.store, step) if world.is_main else ""
        begin = world.broadcast(begin)
        refuse_other_files(directory, recipe, step if not begin else 0)
        as_found = recipe.changed(  # a compiled model has no modules to watch
            train__compile=False, train__on_nonfinite="skip", train__max_skipped_steps=_NEVER, log__every_steps=_NEVER
        )
        with scratch_recipe(directory, as_found, begin, world) as again:
            taken = _take(again, step, world, images)
    if world.is_main:
        ranks = f"{len(taken.ranks)} x {taken.accumulation} micro batches"
        title = f"{directory.path}, step {step:,}, from {begin or 'the start'}, {ranks}"
        figures = _report(title, taken, "label_loss" if recipe.distill.from_ else "loss")
        write_json(json_file, {"run": run_dir, "step": step, "checkpoint": begin or None, **figures})
        _show(taken.ranks, images, Path(out or f"{directory.path}-replay-{step}.png"))
    return 0


def refuse_other_files(directory: RunDirectory, recipe: Recipe, from_start: int) -> None:
    """Refuse what would be read in place of the run's own files, which names files anywhere. Raises UserError."""
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
        RunDirectoryError: there are some, and all are damaged.
    """
    damage: list[RunDirectoryError] = []
    for name in checkpoints_before(store, step):
        try:
            return store.find_intact(name)
        except RunDirectoryError as error:
            damage.append(error)
            print(printable(f"note: {str(error).removesuffix('; choose another')}"), file=sys.stderr)
    if damage:
        raise damage[0]
    return ""


def refuse_unshared(scratch: Path, world: World) -> None:
    """Raise UserError on all ranks if the temporary directory of rank 0 is not there on each node."""
    if world.any(not scratch.is_dir()):
        raise UserError(f"TMPDIR = {scratch.parent}: not seen by all nodes; set TMPDIR to a directory that they share")


@contextmanager
def scratch_recipe(directory: RunDirectory, recipe: Recipe, begin: str, world: World) -> Iterator[Recipe]:
    """Yield a run's recipe in a temporary directory that continues from a checkpoint, and writes nothing else."""
    path = Path(world.broadcast(tempfile.mkdtemp(prefix="karat-replay-") if world.is_main else ""))
    names = (TEACHER_FILE, DISTILL_FILE, MATCHED_FILE)
    kept = [file for name in names if (file := directory.path / name).is_file()]
    try:
        with world.together():
            if world.is_main:
                for file in (directory.recipe_file, *kept):
                    shutil.copy(file, path / file.name)
        if kept:
            refuse_unshared(path, world)
        yield recipe.changed(
            run__dir=str(path),
            init_from=recipe.init_from if not begin else "",
            resume__from_=str(directory.store.root / begin) if begin else recipe.resume.from_,
            log__histogram_every_steps=None,
            log__trackers=(),
            log__profile_steps=None,
            checkpoint__snapshots=0,
        )
    finally:
        if world.is_main:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def trained_again(
    recipe: Recipe, step: int, world: World, log: MetricsLog | None = None
) -> Iterator[tuple[ClassificationTask, Trainer]]:
    """Yield task and trainer of a scratch recipe, resumed before a step to take. Raises UserError if that cannot be."""
    task: ClassificationTask | None = None
    reporter = Reporter(PlainDisplay() if world.is_main and log is None else SilentDisplay(), log, world.rank)
    try:
        task = ClassificationTask(recipe, world, reporter).at(step - 1)
        trainer = Trainer(task, RunDirectory(recipe.run.dir))
        state = trainer.resume()
        if task.stream_differs:
            raise UserError(f"step {step}: {task.stream_differs}; take it again on as many ranks as the run had")
        if not state.step < step <= trainer.total_steps:
            raise UserError(f"step {step}: the run has steps 1 to {trainer.total_steps:,}")
        if task.size_at(state.step) != task.size_at(step - 1):
            raise UserError(f"step {step}: no checkpoint with the same image size before it is left")
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


def _take(recipe: Recipe, step: int, world: World, count: int) -> "_Step":
    with trained_again(recipe, step, world) as (task, trainer):
        batches = trainer.feed(step)
        train_on(trainer, batches, step - 1)
        weights = not_finite(trainer.engine.module.named_parameters())
        taken = list(trainer.micro_batches(batches))
        with watched(trainer.engine.module) as findings:
            norm = trainer.step(taken)
        mine = _replayed(task, taken, findings, str(weights) if weights else None, count)
        return _Step(world.gather(mine), float(norm), trainer.plan.accumulation)


@dataclass(frozen=True)
class _Step:
    """What all ranks found, the norm of the gradients, and the micro batches of each rank."""

    ranks: list[Replayed]
    norm: float
    accumulation: int

    @property
    def loss(self) -> float:
        losses = [loss for rank in self.ranks for loss in rank.losses]
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan


def _replayed(
    task: ClassificationTask, taken: list[Batch], findings: Findings, weights: str | None, count: int
) -> Replayed:
    """Return what one rank found, with its images of the largest losses."""
    losses: list[float] = []
    targets = [task.as_trained(batch)[1].float().cpu() for batch in taken]
    for soft, logits in zip(targets, findings.returned, strict=True):
        losses += (-(soft * torch.log_softmax(logits, -1)).sum(-1)).tolist()
    shown = ShownBatch.of(task, zip(taken, findings.seen, targets, strict=True)).chosen(_worst(losses, count))
    found = {name: str(finding) for name in _PASSES if (finding := getattr(findings, name)) is not None}
    return Replayed(found, losses, weights, shown)


def _worst(losses: list[float], count: int) -> list[int]:
    """Return the places of the largest losses; those that are not finite come first."""
    return sorted(range(len(losses)), key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf)[:count]


def _report(title: str, step: _Step, name: str) -> dict[str, Any]:
    """Print what was found; returns the same as plain data.

    name: of the loss in the run's log; a student has another one, from its teacher, which is not of single images.
    """
    bad = sum(not math.isfinite(loss) for rank in step.ranks for loss in rank.losses)
    samples = sum(len(rank.losses) for rank in step.ranks)
    print(f"{title}: {name.replace('_', ' ')} {step.loss:.6g}, gradient norm {step.norm:.6g}")
    lines = [f"{bad} of {samples} samples have a loss that is not finite"] if bad else []
    for number, rank in enumerate(step.ranks):
        where = f"rank {number}: " if len(step.ranks) > 1 else ""
        lines += [f"{where}before the step: {rank.weights}"] if rank.weights else []
        lines += [f"{where}{name} pass, first not finite: {text}" for name, text in rank.findings.items()]
    if not lines and not math.isfinite(step.norm):
        lines = ["all gradients are finite, but the sum of their squares overflows"]
    for line in lines or ["all outputs and gradients are finite"]:
        print(printable(line))
    return {
        name: step.loss if math.isfinite(step.loss) else None,
        "grad_norm": step.norm if math.isfinite(step.norm) else None,
        "samples": samples,
        "samples_not_finite": bad,
        "ranks": [{**rank.findings, "weights": rank.weights} for rank in step.ranks],
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
