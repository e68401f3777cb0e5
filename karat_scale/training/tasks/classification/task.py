"""Training a classifier of images: its data, soft-target cross-entropy, and its scores, top-1 and top-5.

The images of a recipe are opened on all ranks. With `data.verify: hash`, the ranks of a node share the hashing. An
evaluation counts each sample once on any world size. A checkpoint's `state.json` has the scores.
"""

import itertools
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from karat_scale.checkpoint.weights import Snapshots, snapshot_steps
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.batch import BITS, BadSample, Batch, batch_digest
from karat_scale.data.exact import ExactLoader
from karat_scale.data.loading.device_feed import DeviceFeed
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan, micro_batch_of
from karat_scale.data.shards.shard_format import staged_copy, unused_classes
from karat_scale.data.shards.shards import hash_files, is_hashed
from karat_scale.data.streams import StreamProgress, StreamShards, StreamState
from karat_scale.engine.deepspeed_internals import whole_parameters
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine, pixel_dtype
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.optimizers import CosineSchedule, build_schedule
from karat_scale.engine.reporting.interval import Efficiency, device_peak
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.engine.run_state import RunState
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.foundation.tables import require_trust
from karat_scale.models.attention_matrices import beyond_reach, can_be_watched, content_of, reaches
from karat_scale.models.factory import layer_sizes
from karat_scale.models.init_from import take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.matching import Conversion
from karat_scale.recipe import AttentionConfig, DataConfig, Recipe
from karat_scale.training.agreement import StopSignals
from karat_scale.training.run_directory import OpenRun, RunDirectory
from karat_scale.training.task import AfterStep, BeyondReach, OnBatch, Scores, Task, Waiting
from karat_scale.training.tasks.classification import distillation_teacher as teachers
from karat_scale.training.tasks.classification.conversion import Stage, begin_conversion, take_original
from karat_scale.training.weights_file import run_behind

# How long a rank reads before it meets the others: far less than the time after which a wait counts as a hang.
_TURN_SECONDS = 2.0


def open_images(recipe: Recipe, world: World, reporter: Reporter, is_verified: bool) -> Backend:
    """Return the backend of a recipe. Collective.

    Args:
        is_verified: whether this run has compared the files with their hashes before, so that their sizes are enough.

    Raises:
        DataError, RecipeError: as in `open_backend`.
    """
    spec = ImageSpec.of(recipe)
    shares = is_hashed(spec.data)
    backend = open_backend(replace(spec, data=spec.data.changed(verify="size")) if shares else spec)
    if shares and not is_verified:
        try:
            hash_together(spec.data, world, lambda: reporter.move("starting"))
        except BaseException:
            backend.close()
            raise
    if copy := staged_copy(recipe.data.path):
        reporter.info(f"the images are read from {copy}, this node's copy")
    seen = "data.val_split is also data.train_split, so top-1 is of training images"
    same = seen if recipe.data.val_split == recipe.data.train_split else ""
    for notice in (*backend.notices, same, unused_classes(backend.num_classes, recipe.model.num_classes)):
        if notice:
            reporter.info(f"notice: {notice}")
    return backend


def hash_together(data: DataConfig, world: World, beat: Callable[[], object]) -> None:
    """Compare the files of a data set, which can be opened, with their hashes. Collective.

    Only the ranks of one node share its files: each node may have its own copy. Each rank calls `beat` while all make
    progress.

    Raises:
        DataError: a file differs on one rank; raised on all.
    """
    nodes = world.gather(_this_node())
    here = [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]
    with world.together():
        pieces = hash_files(data, here.index(world.rank), len(here))
    left = True
    while world.any(left):
        beat()
        with world.together():
            end = time.monotonic() + _TURN_SECONDS
            left = left and any(time.monotonic() > end for _ in pieces)  # False at the end of the pieces


def _this_node() -> str:
    """Return a text that differs between nodes, even if they have the same name."""
    kernel = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (kernel.read_text() if kernel.exists() else "")


@dataclass(frozen=True)
class EvalResult(Scores):
    """Percentages over `images` samples; `bad` samples could not be read and are not among them.

    `nonfinite` is the number of `images` for which the model's output was not finite. They count as wrong.
    """

    top1: float
    top5: float
    loss: float
    images: int
    bad: int
    nonfinite: int = 0

    def __str__(self) -> str:
        five = f" top-5 {self.top5:.2f} %" if self.top5 < 100 else ""  # as of a model with five classes
        scores = f"top-1 {self.top1:.2f} %{five} loss {self.loss:.4f}"
        bad = f", {self.bad} unreadable" if self.bad else ""
        odd = f", {self.nonfinite:,} with outputs that are not finite" if self.nonfinite else ""
        return f"{scores} on {self.images:,} images{bad}{odd}"


Forward = Callable[[Tensor], Tensor]
"""A function from normalised images [b, 3, H, W] to logits [b, classes]."""
OnEvalBatch = Callable[[int, int, tuple[BadSample, ...]], None]
"""A function that gets how many batches are done, of how many, and the unreadable samples of the last one."""


def top_classes(logits: Tensor, count: int) -> Tensor:
    """Return the most probable classes, best first: logits [b, classes] to [b, count].

    Of equal logits, which bf16 often has, the lower class comes first. `topk` orders them differently for each count.
    """
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :count]


@torch.no_grad()
def evaluate_batches(
    forward: Forward,
    load: Callable[[Iterable[BatchSlice]], Iterator[Batch]],
    images: int,
    batch_size: int,
    normalize: Normalize,
    world: World,
    take: Callable[[Tensor, Batch], None],
    on_batch: OnEvalBatch,
) -> int:
    """Compute the logits of `images` images, each on one rank; returns how many this rank could not read.

    Args:
        load: a function from slices of the ids 0 to images - 1 to batches, such as a backend's `eval_batches`.
        take: a function that gets the logits of each batch, float32, and the batch.
        on_batch: a function to call after each batch, equally often on every rank; it may raise to stop.

    Raises:
        UserError: memory ran out.
    """
    plan = EvalPlan(images, batch_size, world.rank, world.size)
    batches = DeviceFeed(load(plan.slices()), world.device)
    bad = 0
    for done in itertools.count(1):
        with one_line_out_of_memory(lambda: f"lower train.eval_batch (now {batch_size})"):
            batch = next(batches, None)
            if batch is None:
                break
            logits = forward(normalize(batch.images)).float()
            batches.fetch_ahead()
            take(logits, batch)
        bad += len(batch.bad)
        on_batch(done, plan.num_batches, batch.bad)
    return bad


def evaluate(
    forward: Forward, backend: Backend, normalize: Normalize, batch_size: int, world: World, on_batch: OnEvalBatch
) -> EvalResult:
    """Return the scores on the validation split; the arguments are those of `evaluate_batches`.

    Raises:
        DataError: no sample of the split can be read.
        UserError: memory ran out.
    """
    totals = torch.zeros(5, dtype=torch.float64, device=world.device)

    def count(logits: Tensor, batch: Batch) -> None:
        """[top-1 hits, top-5 hits, summed loss, samples, those with outputs that are not finite]"""
        labels, valid = batch.labels, batch.valid
        ranked = top_classes(logits, 5)
        loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none").double()
        finite = loss.isfinite()  # else some logit is not, and sorting puts NaN first
        hits = (ranked == labels[:, None]) & (valid & finite)[:, None]
        summed = torch.where(valid, loss, 0.0).sum()
        counts = (hits[:, 0].sum(), hits.sum(), summed, valid.sum(), (valid & ~finite).sum())
        totals.add_(torch.stack([one.double() for one in counts]))

    number = backend.num_val
    bad = evaluate_batches(forward, backend.eval_batches, number, batch_size, normalize, world, count, on_batch)
    top1, top5, loss, images, nonfinite = world.sum(totals).tolist()
    bad = int(world.sum(torch.tensor(bad)))
    if not images:
        raise DataError(f"none of the {number} validation samples can be read; set data.on_bad_sample=stop to see why")
    return EvalResult(100 * top1 / images, 100 * top5 / images, loss / images, int(images), bad, int(nonfinite))


@dataclass
class TrainState(RunState):
    """The state of a run that trains a classifier. Scores are in percent."""

    scores = ("top1", "top5")

    best_top1: float | None = None
    best_top5: float | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    data_digest: int = 0
    bad_samples: int = 0
    distilled_from: str = ""
    """The digest of the weights of `distill.from`."""
    image_size: int = 0
    """The image size of the model in the checkpoint, in a run with `schedule.image_sizes`."""
    stream: StreamState | None = None
    """The positions of the lanes, in a run with `data.order: stream`."""


# To measure what S depends on: the most images of an evaluation, and the most entries of a block's matrices.
IMAGES_TO_LOOK_AT, ENTRIES_TO_LOOK_AT = 16, 2**24
# The images of a micro batch of which each report of training checks how far their scores reach.
IMAGES_OF_A_BATCH = 2


class ClassificationTask(Task):
    """Images and labels of a backend, augmented, mixed and normalised on the device."""

    kind = "classification"
    recipe_type = Recipe
    state_type = TrainState
    recipe: Recipe

    def __init__(self, recipe: Recipe, world: World, reporter: Reporter, is_verified: bool = False) -> None:
        super().__init__(recipe, world, reporter)
        self.backend = open_images(recipe, world, reporter, is_verified)
        self.classes = self.backend.classes
        # A teacher starts from the student's pixels, and may need more of their bits than the student.
        self._dtype = torch.float32 if recipe.distill.from_ else pixel_dtype(recipe.train, world.device)
        self.normalize = Normalize(recipe.augment.mean, recipe.augment.std, self._dtype)
        self.objective = SoftTargetCrossEntropy()
        self.efficiency = Efficiency(recipe, world.size, device_peak(world.device, recipe.train))
        self._digest = self._bad = 0
        self.stream_differs = ""
        """The reason why a resumed run does not go on with the next samples of its stream; mostly empty."""
        self._distillation: teachers.Distillation | None = None
        self._conversion: Conversion | None = None
        self.stage: Stage | None = None
        """The conversion of a start with `convert.images` before the first step."""
        self._to_look_at: Tensor | None = None
        self._last_images: Tensor | None = None
        self._learns_attention = recipe.attention.learns
        self._growing_size = recipe.model.image_size if recipe.schedule.image_sizes else 0

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return self.backend.num_train

    @property
    def num_val(self) -> int:
        """Number of validation images."""
        return self.backend.num_val

    @property
    def train_identity(self) -> str:
        """The identity of the training images; empty for a stream."""
        data = self.recipe.data
        if data.is_stream:
            return ""
        kind = data.row.files.name if data.row.files else data.backend
        return f"{kind}:{sha256(json.dumps(self.backend.identity).encode()).hexdigest()}"

    @staticmethod
    def less_memory(recipe: Recipe, world_size: int) -> str:
        """Return what to change in the recipe if memory runs out."""
        train = recipe.train
        return (
            f"lower train.micro_batch (now {micro_batch_of(recipe, world_size)}), recompute more by "
            f"train.recompute.policy (now {train.recompute.policy}), or partition more by deepspeed.config (now "
            f"{recipe.deepspeed.config})"
        )

    @cached_property
    def _stream(self) -> StreamProgress | None:
        data, world = self.recipe.data, self.world
        if not data.is_stream:
            return None
        return StreamProgress(world.rank, world.size, data.lanes, len(StreamShards(data, self.recipe.run.seed)))

    def plan(self) -> TrainPlan:
        """Return the order of the data on this rank."""
        micro_batch = micro_batch_of(self.recipe, self.world.size)
        return self.backend.plan(self.recipe.train.global_batch, micro_batch, self.world.rank, self.world.size)

    @cached_property
    def loader(self) -> ExactLoader:
        """This rank's training batches. Raises DataError and RecipeError as `plan`."""
        return ExactLoader.of(ImageSpec.of(self.recipe), self.plan(), self.backend, self.world.device, self._dtype)

    def schedule(self, steps_per_epoch: int) -> CosineSchedule:
        """Return the recipe's schedule in steps."""
        return build_schedule(self.recipe, steps_per_epoch)

    def at(self, step: int) -> "ClassificationTask":
        """Return the task of the image size that `schedule.image_sizes` has from `step` on; it opens the images."""
        size, stop = self.size_at(step)
        task = self
        if size != self.recipe.model.image_size:
            self.close()
            self.reporter.info(f"images of {size} x {size} pixels from step {step} on")
            of_size = self.recipe.changed(model__image_size=size)
            task = ClassificationTask(of_size, self.world, self.reporter, is_verified=True)
        task.stop_step = stop
        return task

    def size_at(self, step: int) -> tuple[int, int | None]:
        """Return the image size from `step` on, and the step at which another one follows; None for the end."""
        sizes = self.recipe.schedule.image_sizes
        if not sizes:
            return self.recipe.model.image_size, None
        steps = self.plan().steps_per_epoch
        number = max(number for number, (epoch, _) in enumerate(sizes) if epoch * steps <= step)
        after = sizes[number + 1 : number + 2]
        return sizes[number][1], after[0][0] * steps if after else None

    def prepare(self, directory: RunDirectory) -> None:
        """Copy the teachers of `attention.transfer_from` and `distill.from`, if any, into the run's directory."""
        for _, size in self.recipe.schedule.image_sizes:
            layer_sizes(self.recipe.model.changed(image_size=size))  # else a wrong size would end the run midway
        sizes = self.recipe.schedule.image_sizes
        whole = self.recipe.changed(model__image_size=sizes[-1][1]) if sizes else self.recipe  # the user's
        self.world.on_main(lambda: teachers.keep_teacher(whole, directory.path))
        self.world.on_main(lambda: teachers.keep_distillation_teacher(whole, directory.path))
        if self.recipe.distill.from_:
            with self.world.together():
                teacher = teachers.read_distillation_teacher(self.recipe, self.classes, directory.path)
            if self.world.is_main:  # it counts the teacher's operations
                self.reporter.info(teachers.describe_teacher(self.recipe, teacher))
            self._distillation = teachers.Distillation(self.recipe, teacher, self.world.device)

    def build_backbone(self, directory: RunDirectory) -> nn.Module:
        """Return the classifier, with its teacher if it has one."""
        model = teachers.build_model(self.recipe, directory.path)
        if self._distillation is not None and teachers.use_distillation_token(model):
            self.reporter.info("the distillation token learns from the teacher, the class token from the labels")
        return model

    def take_weights(self, backbone: nn.Module, weights: Mapping[str, Tensor], attention: AttentionConfig) -> str:
        """Copy the weights of `init_from` into the classifier; returns what was not simply copied."""
        if not self.recipe.convert.images:
            return take_weights(backbone, weights, attention=attention)
        require_trust(attention.classes, self.recipe.init_from)  # of a file, too: they would be imported
        self._conversion = begin_conversion(backbone, self.recipe, weights, attention)
        return take_original(backbone, self.recipe, weights, attention)

    def convert(self, backbone: nn.Module, directory: RunDirectory, signals: StopSignals) -> None:
        """Match the attention with that of `init_from`, if the recipe asks for it."""
        if self._conversion is not None:
            self.stage = Stage(self, self.backend, self._conversion, directory, signals)
            self.stage.run()

    def trained_model(self, run: OpenRun[Recipe]) -> nn.Module:
        """Return a checkpoint's model; interpolated if the recipe has another image size than it was trained at."""
        return teachers.trained_classifier(run)

    def after_step(self, engine: Engine, directory: RunDirectory, total_steps: int) -> list[AfterStep]:
        """Return the snapshots of `checkpoint.snapshots`."""
        steps = snapshot_steps(total_steps, self.recipe.checkpoint.snapshots)
        return [Snapshots(directory.snapshots, directory.store, steps, engine, self.world, self.recipe, self.reporter)]

    def train_batches(self, slices: Iterable[BatchSlice], waiting: Waiting) -> DeviceFeed[Batch]:
        """Return this rank's micro batches on its device."""
        if self._stream is not None:
            slices = self._stream.from_here(slices)
        return self.loader.feed(slices, waiting)

    def losses(self, forward: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the mean cross-entropy of a micro batch with its soft targets; with a teacher, also both parts."""
        self._bad += len(batch.bad)
        self._digest = (self._digest + batch_digest(batch)) % 2**BITS
        self.reporter.bad_samples(batch.bad)
        if self._stream is not None:
            self._stream.note(batch)
        images, targets = self.as_trained(batch)
        if self._learns_attention:
            self._last_images = images[:IMAGES_OF_A_BATCH].clone()
        output = forward(images)
        if self._distillation is not None:
            return self._distillation.losses(output, images, targets, self.objective)
        return {"loss": self.objective(output, targets)}

    def as_trained(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the model sees of a micro batch: augmented, normalised and mixed images, and soft targets."""
        return self.loader.finish(batch)

    def evaluate(self, forward: Callable[..., Tensor], on_batch: OnBatch) -> EvalResult:
        """Evaluate the validation split."""

        def told(done: int, total: int, bad: tuple[BadSample, ...]) -> None:
            self.reporter.bad_samples(bad)
            on_batch(done, total)

        def noted(images: Tensor) -> Tensor:
            if self._to_look_at is None:
                largest = max(size.heads * size.scores for size in layer_sizes(self.recipe.model))
                self._to_look_at = images[: max(1, min(IMAGES_TO_LOOK_AT, ENTRIES_TO_LOOK_AT // largest))].clone()
            return forward(images)

        return evaluate(noted, self.backend, self.normalize, self.recipe.train.eval_batch, self.world, told)

    def look_inside(self, engine: Engine) -> dict[str, Any]:
        """Return what S depends on in the first validation images, of each block. Rank 0's images count."""
        if self._to_look_at is None or not can_be_watched(engine.module):
            return {}
        learned = [p for layer in attention_layers(engine.module) for p in layer.attention.parameters()]
        with whole_parameters(engine.deepspeed, learned):
            return {"content": content_of(engine.module, engine.forward, self._to_look_at)}

    def look_at_scores(self, engine: Engine) -> dict[int, BeyondReach]:
        """Return the shares for the first images of each rank's last micro batch."""
        model = engine.module
        blocks = reaches(model)
        if self._last_images is None or not blocks:
            return {}
        learned = [p for layer in attention_layers(model) for p in layer.attention.parameters()]
        model.eval()  # draws no random numbers
        try:
            with whole_parameters(engine.deepspeed, learned):
                shares = beyond_reach(model, engine.forward, self._last_images)
        finally:
            model.train()
        means = self.world.sum(shares) / self.world.size
        return {block: BeyondReach(*both) for block, *both in zip(blocks, means.tolist(), blocks.values(), strict=True)}

    @property
    def counts(self) -> tuple[Any, ...]:
        """The digest of the data, the number of unreadable samples, and the places in a stream."""
        return self._digest, self._bad, dict(self._stream.places) if self._stream else None

    @counts.setter
    def counts(self, counts: tuple[Any, ...]) -> None:
        self._digest, self._bad, places = counts
        if self._stream is not None:
            self._stream.places = places

    def fold(self, state: TrainState) -> None:
        """Add the digest of the data and the number of unreadable samples, and note the places in a stream."""
        counts = torch.tensor([self._digest, self._bad], dtype=torch.float64)
        self._digest = self._bad = 0
        digest, bad = self.world.sum(counts).tolist()
        state.data_digest = (state.data_digest + int(digest)) % 2**BITS
        state.bad_samples += int(bad)
        if self._stream is not None:
            places = self.world.gather(self._stream.mine())
            state.stream = self._stream.state(place for rank in places for place in rank)

    def figures(self, state: TrainState, images_per_second: float | None) -> dict[str, Any]:
        """Return how well the device is used, and the digest and unreadable samples of the data so far."""
        efficiency = self.efficiency.figures(images_per_second)
        return {**efficiency, "bad_samples": state.bad_samples, "data_digest": state.data_digest}

    def begin(self) -> TrainState:
        """Return the state of a run that starts from the beginning."""
        return TrainState(
            begun_with=run_behind(self.recipe.init_from),
            distilled_from=self._teachers_digest(),
            image_size=self._growing_size,
        )

    def check_resumed(self, state: TrainState) -> None:
        """Resume the stream, if there is one, and check that the teacher is the one of the checkpoint's run.

        Raises:
            RunDirectoryError: it is another teacher.
        """
        state.image_size = self._growing_size
        if self._stream is not None:
            self.stream_differs = self._stream.resume(state.stream)
            if self.stream_differs:
                self.reporter.info(self.stream_differs)
        if state.distilled_from != self._teachers_digest():
            if not state.distilled_from:
                raise RunDirectoryError(
                    "the run's checkpoint learned from no teacher; remove distill.from, or start another run with "
                    "init_from"
                )
            if self._distillation is None:
                raise RunDirectoryError(
                    "the checkpoint learned from a teacher; set distill.from to it, or start another run with init_from"
                )
            raise RunDirectoryError(
                f"the checkpoint learned from another teacher than {teachers.FILE} holds; put that file back or, with "
                "resume.from, set distill.from to its teacher"
            )

    def _teachers_digest(self) -> str:
        return self._distillation.teacher.digest if self._distillation else ""

    def facts(self, state: TrainState) -> dict[str, Any]:
        """Return the data's digest, and the runs behind `init_from` and `attention.transfer_from`, by key."""
        teacher = RunDirectory(self.recipe.run.dir).path / teachers.TEACHER_FILE
        kept = teacher.with_name(teachers.FILE)
        taught = self.recipe.attention.transfer_from and teacher.is_file()
        runs = {"init_from": state.begun_with}
        with suppress(UserError):  # they were read at the start; what became of them does not end a trained run
            runs["attention.transfer_from"] = run_behind(str(teacher)) if taught else {}
            runs["distill.from"] = run_behind(str(kept)) if state.distilled_from else {}
        return {
            "lineage": {key: behind for key, behind in runs.items() if behind},
            "data_digest": state.data_digest,
            "bad_samples": state.bad_samples,
        }

    def close(self) -> None:
        """Stop the data workers."""
        self.backend.close()
