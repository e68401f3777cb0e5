"""`karat eval`: evaluate a checkpoint on its run's validation split or another test set, on any number of processes.

`--on DIR`, `--labels FILE` and `--corrupt` name other test sets; their results are kept with the run. Each image counts
once on any number of ranks. The validation split can be evaluated for any task.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karat_scale.checkpoint.store import MANIFEST
from karat_scale.commands.evaluate.predictions import (
    KEPT,
    SEVERITIES,
    Evaluation,
    Predictions,
    evaluation_file,
    keep_evaluation,
    read_evaluation,
)
from karat_scale.commands.evaluate.test_set import (
    SPLITS,
    Change,
    Corruption,
    OtherLabels,
    TestSet,
    check_corruptible,
    chosen_corruptions,
    load_test_set,
    open_test_set,
    with_other_labels,
)
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.remote import RemoteUse
from karat_scale.data.shards.shard_format import dataset_directory, require_directory
from karat_scale.data.shards.shards import FolderSplit
from karat_scale.engine import distributed
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import forward_for_evaluation
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter, SilentDisplay
from karat_scale.foundation.console import duration, printable, work_display, write_json
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.foundation.files import file_sha256, json_sha256
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import flatten
from karat_scale.training.run_directory import OpenRun
from karat_scale.training.task import Task
from karat_scale.training.tasks.classification.distillation_teacher import trained_classifier
from karat_scale.training.tasks.classification.task import OnEvalBatch, evaluate_batches, top_classes


def collect(
    forward: Callable[[Tensor], Tensor],
    load: Callable[[Iterable[BatchSlice]], Iterator[Batch]],
    images: int,
    run: OpenRun[Recipe],
    world: World,
    on_batch: OnEvalBatch,
    among: Tensor | None = None,
) -> Predictions:
    """Return a run's predictions for `images` images, the same on every rank, by `evaluate_batches`. Collective.

    Args:
        among: the labels between which the model may choose; None for all.

    Raises:
        DataError: no image can be read.
        RunDirectoryError: the model's outputs are not finite.
        UserError: memory ran out.
    """
    recipe = run.recipe
    batch_size, normalize = recipe.train.eval_batch, Normalize(recipe.augment.mean, recipe.augment.std)
    parts: list[dict[str, npt.NDArray[Any]]] = []

    def take(logits: Tensor, batch: Batch) -> None:
        if among is not None:
            masked = torch.full_like(logits, -torch.inf)
            masked[:, among] = logits[:, among]
            logits = masked
        top = top_classes(logits, KEPT if among is None else min(KEPT, len(among)))
        losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        arrays = {"ids": batch.sample_ids, "labels": batch.labels}
        arrays |= {"top_labels": top, "top_probabilities": logits.softmax(-1).gather(1, top), "losses": losses}
        keep = batch.valid.cpu().numpy()  # the images that could be read
        parts.append({name: values.cpu().numpy()[keep] for name, values in arrays.items()})

    bad = evaluate_batches(forward, load, images, batch_size, normalize, world, take, on_batch)
    gathered = world.gather({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    whole: dict[str, Any] = {name: np.concatenate([one[name] for one in gathered]) for name in gathered[0]}
    order = np.argsort(whole["ids"], kind="stable")
    ordered: dict[str, Any] = {name: values[order] for name, values in whole.items()}
    _refuse_nonfinite(run, int((~np.isfinite(ordered["losses"])).sum()), len(order))
    return Predictions(**ordered, bad=int(world.sum(torch.tensor(bad))), classes=())


def _refuse_nonfinite(run: OpenRun[Any], number: int, images: int) -> None:
    """Raise RunDirectoryError if a model's outputs for some images are not finite: they are no predictions."""
    if number:
        rounding = "" if run.recipe.train.precision == "fp32" else ", or try karat eval with train.precision=fp32"
        raise RunDirectoryError(
            f"{run.path} {run.chosen} ({run.weights_kind} weights): its outputs for {number:,} of {images:,} images "
            f"are not finite, so it has no score; name another --checkpoint{rounding}"
        )


@dataclass(frozen=True)
class Request:
    """The options of `karat eval` about another test set.

    Args:
        on: a directory or a URL; None is the run's own validation split.
        split: the split of the directory; "" chooses one.
        labels: a file of other labels.
        corrupt: names of corruptions, "all", or None. severity: the severities of the corruptions; None for all.
        name: the name under which the result is kept; "" takes the directory's.
    """

    on: str | None
    split: str
    labels: str | None
    corrupt: Sequence[str] | None
    severity: Sequence[int] | None
    name: str


def evaluate_on(
    run_dir: str, overrides: Sequence[str], checkpoint: str, weights: str, request: Request, json_file: str | None
) -> int:
    """Evaluate a checkpoint on another test set, print its scores and keep them; returns the exit code.

    Raises:
        UserError: no such run, checkpoint or test set, or a test set that does not fit the run.
    """
    run = OpenRun.at(run_dir, Recipe, overrides, weights, checkpoint)
    recipe, classes = run.recipe, run.directory.classes()
    if request.corrupt is not None and request.labels:
        raise UserError("--labels and --corrupt exclude each other; give one of them")
    if request.corrupt is not None:
        check_corruptible(recipe.model.image_size)
    if not classes:
        raise RunDirectoryError(
            f"{run.directory.classes_file} is missing; write the names of the classes there, in the order of the labels"
        )
    with (
        distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world,
        work_display() if world.is_main else nullcontext(lambda what, done, total: None) as show,
    ):
        reporter = Reporter(PlainDisplay() if world.is_main else SilentDisplay(), None, world.rank)
        run.choose(world)
        with world.together():
            use = RemoteUse.of(recipe.data, training=False)
            where = dataset_directory(recipe.data.path if request.on is None else request.on)
            if request.on is None:
                if (files := recipe.data.row.files) is None:
                    why = f"need files, and data.backend = {recipe.data.backend} has none; name a directory by --on"
                    raise UserError(f"--split, --labels, --corrupt and --name {why}")
                if isinstance(where, Path):
                    require_directory(where, files)
            split = request.split or ("" if request.on is not None else recipe.data.val_split)
            as_stored = request.on is None  # as plain `karat eval` sees them
            test_set = open_test_set(where, split, classes, use, as_stored)
        with closing(test_set):
            if test_set.notice:
                reporter.info(f"note: {test_set.notice}")
            # Another node may see other times of the files, and all ranks need the same identity.
            empty = world.on_main(lambda: _begun(run, request, where, split, test_set))
            world.on_main(partial(_refuse_another, run.path, empty, reporter))
            model = trained_classifier(run)
            check_implementation(model, world.device)
            forward = forward_for_evaluation(model, recipe.train, world.device)
            work = _Work(run, forward, test_set, world, reporter, show)
            if request.corrupt is not None:
                done = _corrupted(work, run.path, empty, request)
            else:
                done = _plain(work, empty, request.labels)
    if world.is_main:
        try:
            done = keep_evaluation(run.path, done)
        finally:  # the scores are printed even if the directory cannot be written
            print(printable(f"{run.path} {run.chosen} ({done.weights} weights) on {done.name}: {done.text}"))
            write_json(json_file, {"run": str(run.path), **done.model_dump()})
        print(f"kept in {evaluation_file(run.path, done.name)}")
    return 0


@dataclass(frozen=True)
class _Work:
    """The parts that a pass over the test set needs."""

    run: OpenRun[Recipe]
    forward: Callable[[Tensor], Tensor]
    test_set: TestSet
    world: World
    reporter: Reporter
    show: Callable[[str, int, int], None]

    def predictions(self, what: str, change: Change | None = None, passes: int = 1) -> Predictions:
        """Return the predictions for the images, each changed by `change`. Collective.

        Args:
            what: the name of the work in the progress.
            passes: the number of passes, of which this is the first; their expected total time is printed after two
                batches.
        """
        among, images = self.test_set.among, len(self.test_set)
        load = load_test_set(self.test_set, self.run.recipe, change)
        narrowed = None if len(among) == len(self.test_set.classes) else torch.from_numpy(among).to(self.world.device)
        started = time.monotonic()

        def told(done: int, total: int, bad: tuple[BadSample, ...]) -> None:
            if done == min(2, total) and passes > 1:
                cost = passes * (time.monotonic() - started) * total / done
                self.reporter.info(f"{passes} passes over {images:,} images take about {duration(cost)}")
            self.reporter.bad_samples(bad)
            self.show(what, done, total)

        return collect(self.forward, load, images, self.run, self.world, told, narrowed)


def _plain(work: _Work, empty: Evaluation, labels_file: str | None) -> Evaluation:
    labels = OtherLabels(Path(labels_file), work.test_set.classes) if labels_file else None
    predictions = work.predictions(f"evaluate on {empty.name}")
    counted = {"images": len(predictions), "unreadable": predictions.bad}
    if labels is None:
        return empty.model_copy(update={**counted, **predictions.scores})
    keys = work.test_set.keys()
    top1, images, left_out = with_other_labels(predictions, [keys[i] for i in predictions.ids.tolist()], labels)
    if left_out:
        work.reporter.info(f"note: {left_out} not counted")
    return empty.model_copy(update={**counted, "images": images, "top1": top1})


def _corrupted(work: _Work, run: Path, empty: Evaluation, request: Request) -> Evaluation:
    """Evaluate each corruption at each severity. Each result is kept at once, so a stopped command resumes there."""
    names = chosen_corruptions(request.corrupt or ())
    earlier = work.world.on_main(lambda: read_evaluation(evaluation_file(run, empty.name)))
    found = dict(earlier.corruptions) if earlier and earlier.identity == empty.identity else {}
    severities = sorted(set(request.severity or SEVERITIES))
    left = [(name, severity) for name in names for severity in severities if severity not in found.get(name, {})]
    done = earlier or empty
    for number, (name, severity) in enumerate(left):
        started = time.monotonic()
        passes = len(left) if number == 0 else 1
        predictions = work.predictions(f"{name} {severity}", Corruption(name, severity), passes)
        top1 = predictions.scores["top1"]
        counted = {"images": len(predictions), "unreadable": predictions.bad}
        scored = empty.model_copy(update=counted).with_more({**found, name: {**found.get(name, {}), severity: top1}})
        done = work.world.on_main(partial(keep_evaluation, run, scored))
        found = done.corruptions
        seconds = time.monotonic() - started
        rest = f", {number + 1} of {len(left)}, about {duration(seconds * (len(left) - number - 1))} left"
        work.reporter.info(f"{name} {severity}: top-1 {top1:.2f} % in {duration(seconds)}{rest}")
    return done


def identity_of(run: OpenRun[Recipe], **data: Any) -> str:
    """Return a digest of the weights, the preprocessing and the data; equal ones mean equal predictions."""
    recipe = run.recipe
    weights = {
        "manifest": file_sha256(run.store.root / run.chosen / MANIFEST),
        "weights": run.weights_kind,
        "model": recipe.model.model_dump(mode="json"),
        "augment": [getattr(recipe.augment, key) for key in ("interpolation", "eval_crop", "mean", "std")],
        "precision": recipe.train.precision,
    }
    return json_sha256({**weights, **data})


def _begun(run: OpenRun[Recipe], request: Request, where: Path | str, split: str, test_set: TestSet) -> Evaluation:
    """Return what is known of an evaluation before it has a score."""
    asked = request.split
    if request.on is None and split != run.trained.data.val_split:  # by an override
        asked = split
    place = where if isinstance(where, str) else str(where.resolve())
    source = place + (f", split {asked}" if asked else "")
    source += f", labels of {Path(request.labels).resolve()}" if request.labels else ""
    source = printable(source + (", corrupted" if request.corrupt is not None else ""))
    labels = hashlib.sha256(test_set.labels.tobytes()).hexdigest()
    images: dict[str, Any] = {"images": test_set.source.identity, "labels": labels, "turned": test_set.turns}
    if isinstance(test_set.source, FolderSplit):  # of which `identity` knows only the paths
        images["files"] = [_stamp(test_set.file_of(sample_id)) for sample_id in range(len(test_set))]
    data = {"decoder": run.recipe.data.decoder, "source": source, **images}
    return Evaluation(
        name=request.name or _name_of(place if request.on is not None else "", request, asked),
        source=source,
        checkpoint=run.chosen,
        weights=run.weights_kind,
        identity=identity_of(run, **data),
        model=identity_of(run, decoder=run.recipe.data.decoder),
        date=time.strftime("%Y-%m-%d %H:%M"),
        images=len(test_set),
        unmatched=[printable(name) for name in test_set.unmatched],
        left_out=test_set.left_out,
        among=len(test_set.among),
        classes=len(test_set.classes),
    )


def _stamp(file: str) -> tuple[int, int] | None:
    """Return a file's size and the time of its last change; None if it cannot be read."""
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _name_of(place: str, request: Request, split: str) -> str:
    """Return the name of an evaluation, from its place ("" for the run's own data) and the options."""
    base = "val"
    if place:
        whole = Path(place)
        base = (f"{whole.parent.name}-{whole.name}" if whole.name in SPLITS else whole.name) or "other"
    base += f"-{split}" if split else ""
    base += f"-{Path(request.labels).stem}" if request.labels else ""
    return base + ("-corrupted" if request.corrupt is not None else "")


def _refuse_another(run: Path, evaluation: Evaluation, reporter: Reporter) -> None:
    """Refuse to replace the result of the same name on another test set, or of another model.

    The result of an earlier checkpoint is replaced: the run has trained further.
    """
    if "/" in evaluation.name or evaluation.name.startswith("."):
        raise UserError(f"--name {evaluation.name}: should be a file's name, without / and with no . at its beginning")
    file = evaluation_file(run, evaluation.name)
    earlier = read_evaluation(file)
    if earlier is None:
        return
    if earlier.source != evaluation.source:
        raise UserError(f"{file} holds the result on {earlier.source}; choose another --name")
    if earlier.checkpoint < evaluation.checkpoint and earlier.weights == evaluation.weights:
        reporter.info(f"note: this replaces the result of {earlier.checkpoint}")
    elif earlier.model != evaluation.model:
        is_same = (earlier.checkpoint, earlier.weights) == (evaluation.checkpoint, evaluation.weights)
        this = f"not of {evaluation.checkpoint} ({evaluation.weights} weights)"
        raise UserError(
            f"{file} holds the result of {earlier.checkpoint} ({earlier.weights} weights), "
            f"{'with other settings, such as model.image_size' if is_same else this}; "
            "choose another --name, or remove the file"
        )


def evaluate_run(
    task_type: type[Task], run_dir: str, overrides: Sequence[str], checkpoint: str, weights: str, json_file: str | None
) -> int:
    """Evaluate a checkpoint (best, latest, or a name) and print its scores; returns the exit code.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or data that does not fit.
    """
    run = OpenRun.at(run_dir, task_type.recipe_type, overrides, weights, checkpoint)
    recipe = run.recipe
    with (
        distributed.joined(recipe.run.device, recipe.run.peer_timeout_minutes) as world,
        work_display() if world.is_main else nullcontext(lambda what, done, total: None) as show,
    ):
        reporter = Reporter(PlainDisplay() if world.is_main else SilentDisplay(), None, world.rank)
        run.choose(world)
        with closing(reporter), closing(task_type(recipe, world, reporter)) as task:
            if (classes := run.directory.classes()) and classes != task.classes:
                by_name = f"use `karat eval {run.path} --on DIR`, which matches classes by name"
                raise DataError(
                    f"data.path = {flatten(recipe)['data.path']} has other classes than the run; "
                    + (by_name if task.kind == "classification" else "put data.path right")
                )
            model = task.trained_model(run)
            check_implementation(model, world.device)
            if chosen := describe_implementation(model, world.device):
                reporter.info(chosen)
            forward = forward_for_evaluation(model, recipe.train, world.device)
            scores = task.evaluate(forward, partial(show, "evaluate batches"))
            figures = scores.to_json()
            _refuse_nonfinite(run, figures.get("nonfinite", 0), figures["images"])
    if world.is_main:
        print(f"{run.path} {run.chosen}{run.store.beside(run.chosen)}, {run.weights_kind} weights: {scores}")
        of = {"run": str(run.path), "checkpoint": run.chosen, "weights": run.weights_kind}
        write_json(json_file, {**of, **figures})
    return 0
