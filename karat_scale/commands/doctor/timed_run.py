"""The check of a recipe: whether it fits, then a short timed run that shows what limits its speed.

The run times each stage of a training step by itself, then the real training loop, end to end.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from karat_scale.commands.doctor import fit
from karat_scale.commands.doctor.device_speed import (
    BareModel,
    Communication,
    communication,
    optimizer_seconds,
    slowest,
    transfer_seconds,
)
from karat_scale.commands.doctor.fit import Subject, stays_cached
from karat_scale.commands.doctor.report import (
    Finding,
    Printer,
    Report,
    Row,
    Setting,
    Stage,
    Verdict,
    examine,
    found,
    judge,
)
from karat_scale.commands.doctor.storage import (
    DataFiles,
    DataSpeed,
    StorageSpeed,
    find_data_files,
    measure_data,
    measure_storage,
    read_into_page_cache,
    sampled_ids,
)
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import micro_batch_of
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.devices import wait_for
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import one_line_out_of_memory
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.console import plural
from karat_scale.foundation.machine import cpu_has_bf16
from karat_scale.models import parameter_count
from karat_scale.recipe import Recipe
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.run import build_parts
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.signals import StopSignals
from karat_scale.training.tasks.classification.distillation_teacher import build_model, keep_teacher
from karat_scale.training.tasks.classification.task import ClassificationTask, TrainState

MANY_STEPS = 1_000_000_000
FEWEST_STEPS = 2


@dataclass(frozen=True)
class LoopSpeed:
    """images_per_second: over all ranks. waiting_share: the share of time spent waiting for data, on the slowest rank.
    steps: the number of timed steps. unreadable: samples of rank 0 that could not be decoded.
    """

    images_per_second: float
    waiting_share: float
    steps: int
    unreadable: int


def measure_loop(parts: Parts, seconds: float) -> LoopSpeed:
    """Train for about `seconds`, after a first step that does not count. Nothing is evaluated or saved."""
    loop = Loop(parts, TrainState())
    waited = 0.0

    @contextmanager
    def waiting() -> Iterator[None]:
        nonlocal waited
        before = time.perf_counter()
        yield
        waited += time.perf_counter() - before

    unreadable = 0
    batches = loop.feed(MANY_STEPS, waiting)

    def counted() -> Iterator[Batch]:
        nonlocal unreadable
        for batch in loop.micro_batches(batches):
            unreadable += len(batch.bad)
            yield batch

    loop.step(counted())
    wait_for(parts.world.device)
    begun, waited = time.perf_counter(), 0.0
    steps = unreadable = 0
    while steps < FEWEST_STEPS or not parts.world.any(time.perf_counter() - begun > seconds):
        loop.step(counted())
        steps += 1
    wait_for(parts.world.device)
    elapsed = slowest(time.perf_counter() - begun, parts.world)
    rate = steps * parts.plan.global_batch / elapsed
    return LoopSpeed(rate, slowest(waited / elapsed, parts.world), steps, unreadable)


# Shares of the available seconds.
SHARES = {"storage": 0.1, "data": 0.35, "model": 0.15, "transfer": 0.05, "communication": 0.05, "optimizer": 0.1}
LOOP_SHARE = 0.2
FIRST_LOOK = 16
# A step should take at most this share of the available time.
STEP_SHARE = 1 / 12


@dataclass(frozen=True)
class Figures:
    """The measurements. micro_batch and global_batch: the timed ones, smaller than the recipe's if a step would have
    taken too long. Seconds are of one micro batch, or of one step for the optimizer and communication.
    """

    recipe: Recipe
    world_size: int
    micro_batch: int
    global_batch: int
    files: DataFiles | None
    storage: StorageSpeed | None
    data: DataSpeed
    transfer_seconds: float
    model_seconds: float
    optimizer_seconds: float
    communication: Communication | None
    loop: LoopSpeed

    @property
    def workers(self) -> int:
        """The number of data workers. Generated images are made in the trainer's process."""
        return 0 if self.recipe.data.row.files is None else self.recipe.data.workers

    @property
    def rates(self) -> dict[Stage, float]:
        """Images per second of each stage by itself, over all ranks, with the recipe's own global batch."""
        ranks, data = self.world_size, self.data
        wanted = self.recipe.train.global_batch
        rates: dict[Stage, float] = {}
        if self.storage is not None and self.files is not None:
            in_blocks = self.recipe.data.order == "block"
            speed = self.storage.sequential if in_blocks else self.storage.random
            rates["storage"] = ranks * speed / self.files.image_bytes
        rates["decode"] = ranks * data.workers / data.decode_share
        if data.decode_share < 1:
            rates["augmentation"] = ranks * data.workers / (1 - data.decode_share)
        rates["transfer"] = ranks * self.micro_batch / self.transfer_seconds
        rates["model"] = ranks * self.micro_batch / self.model_seconds
        rates["optimizer"] = wanted / self.optimizer_seconds
        if self.communication is not None:
            rates["communication"] = wanted / self.communication.seconds
        return rates

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "stages": {stage: {"images_per_second": round(rate, 2)} for stage, rate in self.rates.items()},
            "storage": asdict(self.storage) if self.storage else None,
            "data_path": {**asdict(self.data), "decode_share": self.data.decode_share},
            "device": {
                "transfer_seconds": self.transfer_seconds,
                "model_seconds": self.model_seconds,
                "optimizer_seconds": self.optimizer_seconds,
                "communication": asdict(self.communication) if self.communication else None,
            },
            "loop": {**asdict(self.loop), "micro_batch": self.micro_batch, "global_batch": self.global_batch},
        }


def time_recipe(subject: Subject, model: nn.Module, num_train: int, seconds: float, printer: Printer) -> Figures:
    """Measure for about `seconds`. Writes only below a temporary directory, and leaves no process. Raises DataError."""
    recipe, world = subject.recipe, subject.world
    budget = {name: share * seconds for name, share in SHARES.items()}
    files = find_data_files(recipe, num_train)
    storage = None
    if files is not None and files.paths:
        with printer.busy("timing the disk"):
            readers = max(1, recipe.data.workers)
            block = round(files.image_bytes)
            paths = files.paths[world.rank :: world.size] or files.paths  # a folder's files are an image each
            own = measure_storage(paths, block, readers, budget["storage"], world.rank)
            storage = min(world.gather(own), key=lambda speed: speed.random)
    with printer.busy("timing decoding and augmentation"):
        # A stream's samples have no ids, and it may say that there are very many.
        ids = np.arange(1) if recipe.data.is_stream else sampled_ids(num_train, recipe.run.seed)
        if files is not None and not files.paths:  # at a URL, consecutive images need few requests
            ids = np.arange(len(ids))
        read_into_page_cache(recipe, ids)
        data = measure_data(recipe, ids, subject.micro_batch, budget["data"], world)
    with printer.busy("timing the model"):
        bare = BareModel(model, recipe, world)
        look = min(FIRST_LOOK, subject.micro_batch)
        image_seconds = bare.seconds(look, 0.0) / look
        global_batch, micro_batch = timed_batch(
            recipe.train.global_batch, subject.micro_batch, world.size, image_seconds, seconds
        )
        model_seconds = bare.seconds(micro_batch, budget["model"])
        transfer = transfer_seconds(recipe, micro_batch, budget["transfer"], world)
        exchange = communication(model, recipe, budget["communication"], world)
        bare.leave_device()
    timed = recipe.changed(train__global_batch=global_batch, train__micro_batch=micro_batch)
    with printer.busy("timing the whole loop"), _trainer(subject, timed) as parts:
        optimizer = optimizer_seconds(parts, timed, micro_batch, budget["optimizer"])
        loop = measure_loop(parts, LOOP_SHARE * seconds)
    return Figures(
        recipe=recipe,
        world_size=world.size,
        micro_batch=micro_batch,
        global_batch=global_batch,
        files=files,
        storage=storage,
        data=data,
        transfer_seconds=transfer,
        model_seconds=model_seconds,
        optimizer_seconds=optimizer,
        communication=exchange,
        loop=loop,
    )


class _NoDisplay(PlainDisplay):
    """Replaces the loop's own lines and warnings, which do not belong in the report."""

    def line(self, text: str) -> None:
        """Print nothing."""


@contextmanager
def _trainer(subject: Subject, recipe: Recipe) -> Iterator[Parts]:
    """Build the trainer's parts in a temporary run directory."""
    with tempfile.TemporaryDirectory(prefix="karat-doctor-") as scratch:
        directory = RunDirectory(Path(scratch) / "run")
        # Few prefetched batches: a short run must not profit from those made before it began.
        reporter = Reporter(_NoDisplay(), None)
        task = ClassificationTask(recipe.changed(data__prefetch=1, data__verify="size"), subject.world, reporter)
        try:
            yield build_parts(task, directory, StopSignals())
        finally:
            task.close()


def setting_of(subject: Subject, figures: Figures, decoder: str) -> Setting:
    """Return the facts that the verdict needs in addition to the rates."""
    recipe = subject.recipe
    return Setting(
        workers=figures.workers,
        worker_rate=figures.data.one_core,
        cores=subject.cores_of_a_rank,
        world_size=subject.world.size,
        backend=recipe.data.backend,
        decoder=decoder,
        order=recipe.data.order,
        device=subject.world.device.type,
        precision=recipe.train.precision,
        has_bf16=cpu_has_bf16(),
        implementation=recipe.attention.implementation,
        global_batch=recipe.train.global_batch,
        accumulation=recipe.train.global_batch // (subject.world.size * subject.micro_batch),
        stays_cached=stays_cached(figures.files),
    )


def timed_batch(
    global_batch: int, micro_batch: int, world_size: int, image_seconds: float, seconds: float
) -> tuple[int, int]:
    """Return (global batch, micro batch) of which several steps fit into `seconds`: the given ones, or smaller ones.

    image_seconds: of forward and backward over one image on one rank. A micro batch that shrinks stays even, as mixing
    needs it.
    """
    part, images = global_batch // world_size, int(STEP_SHARE * seconds / image_seconds)
    if images >= part:
        return global_batch, micro_batch
    if images >= micro_batch:
        return images // micro_batch * micro_batch * world_size, micro_batch
    smaller = min(micro_batch, max(2, images // 2 * 2))
    return smaller * world_size, smaller


MB = 1e6
# If the loop is slower than its slower side by this factor, the two sides hinder each other.
HINDERED = 0.8
# Two sides that are closer than this limit training together.
CLOSE = 1.25


def check_up(recipe: Recipe, seconds: float, report: Report, before: Callable[[], None]) -> None:
    """Examine and time a recipe. `before` is called once the recipe is known to be valid.

    Raises:
        UserError: the recipe is wrong or does not fit the world.
    """
    world = distributed.start(recipe.run.device)
    try:
        micro_batch = micro_batch_of(recipe, world.size)
        load_ds_config(recipe, world.size, micro_batch)
        with tempfile.TemporaryDirectory(prefix="karat-doctor-") as scratch:
            keep_teacher(recipe, Path(scratch))
            model = build_model(recipe, Path(scratch))
        subject = Subject(recipe, world, micro_batch, parameter_count(model))
        before()
        _examine(subject, report, partial(time_recipe, subject, model, seconds=seconds, printer=report.printer))
    finally:
        distributed.stop()


def _examine(subject: Subject, report: Report, measure: Callable[[int], Figures]) -> None:
    backend: Backend | None = None

    def data() -> Iterable[Finding]:
        nonlocal backend
        # Hashing all shards would take all of the available time.
        backend = open_backend(ImageSpec.of(subject.recipe.changed(data__verify="size")))
        yield from fit.examine_data(subject, backend)
        yield from fit.examine_batches(subject, backend)

    findings = _examined(subject.world, "data", data)
    others = {
        "workers": fit.examine_workers,
        "run.dir": fit.examine_run_directory,
        "checkpoint.url": fit.examine_checkpoint_url,
    }
    for name, examination in others.items():
        findings += examine(name, partial(examination, subject))
    report.add("recipe", f"recipe {subject.recipe.run.name}", findings)
    if backend is None or any(finding.name == "data" and finding.level == "problem" for finding in findings):
        return
    num_train = backend.num_train
    backend.close()

    verdict = _examined(subject.world, "timed run", lambda: _judge(subject, measure(num_train), report))
    report.add("verdict", "what bounds training", verdict)


def _examined(world: World, name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Examine like `examine`; but with several ranks, raise, since one rank must not continue while the others wait."""
    fix = "lower train.micro_batch, or set train.precision=bf16"
    if world.size > 1:
        with one_line_out_of_memory(lambda: fix):
            return list(examination())

    def with_fix() -> Iterable[Finding]:
        try:
            return list(examination())
        except torch.OutOfMemoryError:
            return [found(name, "the micro batch does not fit the GPU's memory", fix, wrong=True)]

    return examine(name, with_fix)


def _judge(subject: Subject, figures: Figures, report: Report) -> list[Finding]:
    """Show the stages; return the verdict and its notes."""
    setting = setting_of(subject, figures, _decoder_name(subject.recipe))
    verdict = judge(figures.rates, setting)
    report.figures = {
        **figures.to_json(),
        "bound": verdict.bound,
        "advice": verdict.advice,
        "data_images_per_second": round(verdict.data_rate, 2),
        "device_images_per_second": round(verdict.device_rate, 2),
    }
    report.printer.table("images per second of each stage by itself", ("stage", "img/s", ""), _rows(subject, figures))
    return [
        found("bound", f"{verdict.bound}: {verdict.reason}", verdict.advice),
        *_remarks(figures, verdict),
    ]


def _rows(subject: Subject, figures: Figures) -> list[Row]:
    data, recipe = figures.data, subject.recipe
    workers = f"in {plural(figures.workers, 'worker')}" if figures.workers else "in the trainer"
    details = {
        "decode": f"{workers}; {data.decode_one_core:,.0f} on one core",
        "augmentation": f"{workers}; {100 * (1 - data.decode_share):.0f} % of the data path",
        "transfer": f"normalised and mixed, {1000 * figures.transfer_seconds:.1f} ms for {figures.micro_batch} images",
        "model": f"forward + backward, {1000 * figures.model_seconds:,.0f} ms for {figures.micro_batch} images",
        "optimizer": f"{1000 * figures.optimizer_seconds:.1f} ms a step of {recipe.train.global_batch} images",
    }
    if figures.storage is not None:
        storage = figures.storage
        details["storage"] = (
            f"{storage.random / MB:,.0f} MB/s at random, {storage.sequential / MB:,.0f} in sequence, {storage.state}; "
            f"{storage.random_again / MB:,.0f} again"
        )
    if figures.communication is not None:
        exchange = figures.communication
        details["communication"] = f"all-reduce of {exchange.bytes / MB:,.0f} MB in {1000 * exchange.seconds:,.1f} ms"
    rows = [(stage, f"{rate:,.0f}", details[stage]) for stage, rate in figures.rates.items()]
    loop = figures.loop
    waits = f"{100 * loop.waiting_share:.0f} % of the time waits for data"
    batches = f"{plural(loop.steps, 'step')} of {figures.global_batch}; {waits}"
    return [*rows, ("the real loop", f"{loop.images_per_second:,.0f}", batches)]


def _remarks(figures: Figures, verdict: Verdict) -> Iterable[Finding]:
    loop = figures.loop
    if loop.unreadable:
        yield found("samples", f"{loop.unreadable} could not be decoded", "data_prep/verify.py lists them")
    wanted = figures.recipe.train.global_batch
    if figures.global_batch != wanted:
        yield found("timed batch", f"{figures.global_batch} instead of {wanted}, to save time; see --seconds")
    slower, faster = sorted((verdict.data_rate, verdict.device_rate))
    if figures.workers and faster < CLOSE * slower:
        text = f"data makes {verdict.data_rate:,.0f} img/s and the trainer takes {verdict.device_rate:,.0f}"
        yield found("close", text, "to gain much, change both; --seconds measures for longer")
    if figures.workers and figures.global_batch == wanted and loop.images_per_second < HINDERED * slower:
        text = f"the loop makes {loop.images_per_second:,.0f} img/s, and its slower side by itself makes {slower:,.0f}"
        yield found(
            "together",
            text,
            "data workers, the trainer and other processes hinder each other: they share cores and memory",
        )
    storage = figures.rates.get("storage")
    if storage is not None and storage < slower and verdict.bound != "storage":
        text = f"the first epoch reads {storage:,.0f} img/s from the disk, less than the {slower:,.0f} of what follows"
        yield found("first epoch", text, "copy the data to a local disk: data_prep/stage.py")


def _decoder_name(recipe: Recipe) -> str:
    if recipe.data.row.own_decoder or recipe.data.row.files is None:
        return ""
    from karat_scale.data.decoders import make_decoder

    return make_decoder(recipe.data, recipe.augment.interpolation).name
