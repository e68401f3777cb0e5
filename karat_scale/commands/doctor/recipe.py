"""Check whether a recipe fits the machine, then find what limits its speed in a short timed run."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import Any

import numpy as np
import torch
from torch import nn

from karat_scale.checkpoint.tensor_storage import planned_bytes
from karat_scale.commands.doctor import machine
from karat_scale.commands.doctor.machine import OLDEST_CAPABILITY
from karat_scale.commands.doctor.report import Finding, Report, Setting, Stage, Verdict, examine, found, judge
from karat_scale.commands.measure import loading
from karat_scale.commands.measure.step import LoopSpeed, Stages, optimizer_seconds
from karat_scale.commands.plan.memory import loader_bytes
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.decoders import make_decoder
from karat_scale.data.plan import micro_batch_of, possible_micro_batch
from karat_scale.engine import distributed
from karat_scale.engine.deepspeed_config import load_ds_config, zero_stage
from karat_scale.engine.distributed import World
from karat_scale.engine.memory import apply_recompute, one_line_out_of_memory
from karat_scale.foundation.console import gigabytes, plural, print_table
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.foundation.machine import cpu_has_bf16, usable_cores
from karat_scale.foundation.stores import WritableStore
from karat_scale.models import parameter_count
from karat_scale.models.layers import freeze
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.distillation_teacher import build_model, keep_teacher
from karat_scale.training.tasks.classification.task import ClassificationTask
from karat_scale.training.trainer import silent_trainer


@dataclass(frozen=True)
class Subject:
    """The subject of the checks: the recipe, this rank's world, its micro batch, and the model's trainable scalars.

    frozen: the number of the model's other scalars.
    """

    recipe: Recipe
    world: World
    micro_batch: int
    parameters: int
    frozen: int = 0

    @property
    def local_ranks(self) -> int:
        """The number of ranks on this node."""
        # One process in a batch script has the variables of its job, too.
        of_slurm = os.environ.get("SLURM_NTASKS_PER_NODE") if self.world.size > 1 else None
        return int(os.environ.get("LOCAL_WORLD_SIZE") or of_slurm or self.world.size)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint."""
        stage = zero_stage(load_ds_config(self.recipe, self.world.size, self.micro_batch))
        return planned_bytes(self.recipe, stage, self.parameters, self.frozen)

    @property
    def cores_of_a_rank(self) -> int:
        """The cores that this rank may use. srun gives each task its own; a launcher's ranks share them."""
        own = "SLURM_STEP_NUM_TASKS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
        return max(1, usable_cores() // (1 if own else self.local_ranks))


def examine_data(subject: Subject, backend: Backend) -> Iterator[Finding]:
    """Report the data that the backend opened, and whether it will stay in memory."""
    recipe = subject.recipe
    source = recipe.data.stream or recipe.data.path or "generated in memory"
    train, val, classes = backend.num_train, backend.num_val, backend.num_classes
    counts = f"{train:,} training and {val:,} validation images, {plural(classes, 'class')}"
    yield found("data", f"{recipe.data.backend}, {source}: {counts}", train=train, val=val, classes=classes)
    files = loading.find_data_files(recipe, backend.num_train)
    if files is not None:
        yield _page_cache(files, recipe.data.cache_gb)


def stays_cached(files: loading.DataFiles | None) -> bool:
    """Return whether the available memory holds all the data."""
    return files is None or files.total_bytes < machine.cache_memory()


def _page_cache(files: loading.DataFiles, cache_gb: float) -> Finding:
    data_bytes, size = files.total_bytes, gigabytes(files.total_bytes)
    if not files.paths:
        stays = data_bytes < 1e9 * cache_gb
        text = f"{size} of data at a URL, data.cache_gb = {cache_gb:g}: fetched "
        text += "only in the first epoch" if stays else "again in each epoch"
        fix = "" if stays else "raise data.cache_gb if the disk has room, or copy the data with karat prepare stage"
        return found("cache", text, fix, stays=stays, data_bytes=data_bytes)
    stays = stays_cached(files)
    text = f"{size} of data, {gigabytes(machine.cache_memory())} of memory available"
    text += ": read from the disk only in the first epoch" if stays else ""
    slow = "every epoch reads the disk, so its speed matters; copy the data to a local disk"
    image_bytes, fix = round(files.image_bytes), "" if stays else slow
    return found("page cache", text, fix, stays=stays, data_bytes=data_bytes, image_bytes=image_bytes)


def examine_batches(subject: Subject, backend: Backend) -> Iterator[Finding]:
    """Report how the global batch is divided, and the world sizes that divide it. Raises UserError if none."""
    recipe, world, micro = subject.recipe, subject.world, subject.micro_batch
    plan = backend.plan(recipe.train.global_batch, micro, world.rank, world.size)
    fits = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if possible_micro_batch(recipe, size)]
    text = (
        f"{plan.global_batch} = {plural(world.size, 'rank')} x {plan.accumulation} x {micro}, "
        f"{plan.steps_per_epoch:,} steps an epoch; divides over {', '.join(map(str, fits))} ranks"
    )
    yield found("global batch", text, accumulation=plan.accumulation, micro_batch=micro, world_sizes=fits)
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if world.size == 1 and gpus > 1:
        start = "`karat launch doctor ...` times them all"
        yield found("ranks", f"1 of {gpus} GPUs is used", start)


def examine_workers(subject: Subject) -> Iterator[Finding]:
    """Check the data workers against cores and memory."""
    data, ranks = subject.recipe.data, subject.local_ranks
    if data.row.files is None or data.workers == 0:
        return
    cores = subject.cores_of_a_rank
    text = f"{data.workers} for {plural(cores, 'core')} of a rank"
    busy = data.workers + (subject.world.device.type == "cuda")
    fix = f"more workers than cores: set data.workers={max(1, cores - 1)}" if busy > max(2, cores) else ""
    yield found("workers", text, fix, workers=data.workers, cores=cores)
    needed, free = ranks * loader_bytes(subject.recipe, subject.micro_batch), machine.cache_memory()
    fix = "set a smaller data.prefetch or fewer data.workers" if needed > free else ""
    text = f"prefetched batches take up to {gigabytes(needed)} of {gigabytes(free)} available"
    yield found("memory for batches", text, fix, wrong=needed > free, needed_bytes=needed)


def examine_run_directory(subject: Subject) -> Iterator[Finding]:
    """Check that the run directory can be written, and that there is space for checkpoints."""
    recipe = subject.recipe
    directory = RunDirectory(recipe.run.dir)
    if not machine.is_writable(directory.path):
        yield found("run.dir", f"{directory.path} cannot be written", "choose another run.dir", wrong=True)
        return
    yield _occupied(recipe, directory)
    checkpoint = recipe.checkpoint
    kept = checkpoint.keep_last + checkpoint.keep_best + 1 + bool(checkpoint.url)  # a copied checkpoint may stay longer
    one = subject.checkpoint_bytes
    free = shutil.disk_usage(machine.nearest_existing(directory.path)).free
    text = f"{kept} checkpoints of {gigabytes(one)} (one of them while it is written)"
    needed = kept * one
    if checkpoint.snapshots:
        snapshots = (checkpoint.snapshots + 1) * 4 * (subject.parameters + subject.frozen)
        needed += snapshots
        text += f" and {checkpoint.snapshots + 1} snapshots of {gigabytes(snapshots)} in all"
    there = 0  # a resumed run has most of it
    with suppress(FileNotFoundError):  # a run that goes on removes some
        for folder in (directory.store.root, directory.snapshots):
            there += sum(file.lstat().st_size for file in folder.rglob("*"))
    text += f"; {gigabytes(there)} are there, {gigabytes(free)} are free" if there else f", {gigabytes(free)} free"
    short = max(needed - there, one) > free
    fewer = " or checkpoint.snapshots" if checkpoint.snapshots else ""
    fix = f"free space, choose another run.dir, or lower checkpoint.keep_last{fewer}" if short else ""
    yield found("room for checkpoints", text, fix, wrong=short, checkpoint_bytes=one, kept=kept, free_bytes=free)


def examine_checkpoint_url(subject: Subject) -> Iterator[Finding]:
    """Write a small file at checkpoint.url, read it and remove it. Raises StoreError."""
    checkpoint = subject.recipe.checkpoint
    if not checkpoint.url:
        return
    store, name, data = WritableStore(checkpoint.url, checkpoint.timeout), f"doctor-{token_hex(8)}", token_bytes(64)
    store.write(name, data)
    same = store.read_small(name, len(data)) == data
    store.remove([name])
    one = subject.checkpoint_bytes
    text = f"{checkpoint.url} can be {'written and read' if same else 'written, but not read'}"
    text += f"; each checkpoint copies about {gigabytes(one)} there"
    yield found("checkpoint.url", text, "" if same else "check the store", wrong=not same, checkpoint_bytes=one)


def _occupied(recipe: Recipe, directory: RunDirectory) -> Finding:
    if not directory.recipe_file.is_file():
        return found("run.dir", f"{directory.path} can be written")
    try:
        directory.admit(recipe)
    except RunDirectoryError as error:
        return found("run.dir", str(error).removeprefix("run.dir = "), wrong=True)
    if not directory.store.names():
        return found("run.dir", f"{directory.path} has a start that left no checkpoint: karat train begins anew")
    return found("run.dir", f"{directory.path} has this run: karat train resumes it")


# Shares of the available seconds.
SHARES = {"storage": 0.1, "data": 0.35, "model": 0.15, "transfer": 0.05, "communication": 0.05, "optimizer": 0.1}
LOOP_SHARE = 0.2
FIRST_LOOK = 16
# A step should take at most this share of the available time.
STEP_SHARE = 1 / 12


@dataclass(frozen=True)
class Figures:
    """The measurements.

    micro_batch, global_batch: the timed batches, smaller than the recipe's if a step would have taken too long.
    transfer, model: seconds of one micro batch. optimizer: seconds of one step.
    """

    subject: Subject
    micro_batch: int
    global_batch: int
    files: loading.DataFiles | None
    storage: loading.StorageSpeed | None
    data: loading.DataSpeed
    transfer: float
    model: float
    optimizer: float
    communication: dict[str, float] | None
    loop: LoopSpeed

    @property
    def workers(self) -> int:
        """The number of data workers. Generated images are made in the trainer's process."""
        data = self.subject.recipe.data
        return 0 if data.row.files is None else data.workers

    @property
    def rates(self) -> dict[Stage, float]:
        """Images per second of each stage by itself, over all ranks, with the recipe's own global batch."""
        ranks, data, recipe = self.subject.world.size, self.data, self.subject.recipe
        wanted = recipe.train.global_batch
        rates: dict[Stage, float] = {}
        if self.storage is not None and self.files is not None:
            speed = self.storage.sequential if recipe.data.order == "block" else self.storage.random
            rates["storage"] = ranks * speed / self.files.image_bytes
        rates["decode"] = ranks * data.workers / data.decode_share
        if data.decode_share < 1:
            rates["augmentation"] = ranks * data.workers / (1 - data.decode_share)
        rates["transfer"] = ranks * self.micro_batch / self.transfer
        rates["model"] = ranks * self.micro_batch / self.model
        rates["optimizer"] = wanted / self.optimizer
        if self.communication is not None:
            rates["communication"] = wanted / self.communication["seconds"]
        return rates

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "stages": {stage: {"images_per_second": round(rate, 2)} for stage, rate in self.rates.items()},
            "storage": asdict(self.storage) if self.storage else None,
            "data_path": {**asdict(self.data), "decode_share": self.data.decode_share},
            "device": {
                **{f"{name}_seconds": getattr(self, name) for name in ("transfer", "model", "optimizer")},
                "communication": self.communication,
            },
            "loop": {**asdict(self.loop), "micro_batch": self.micro_batch, "global_batch": self.global_batch},
        }


def time_recipe(subject: Subject, model: nn.Module, num_train: int, seconds: float, report: Report) -> Figures:
    """Measure for about `seconds`. Writes only below a temporary directory, and leaves no process. Raises DataError."""
    recipe, world = subject.recipe, subject.world
    budget = {name: share * seconds for name, share in SHARES.items()}
    files = loading.find_data_files(recipe, num_train)
    storage = None
    if files is not None and files.paths:
        with report.busy("timing the disk"):
            readers = max(1, recipe.data.workers)
            block = round(files.image_bytes)
            paths = files.paths[world.rank :: world.size] or files.paths  # a folder's files are an image each
            found_here = loading.measure_storage(paths, block, readers, budget["storage"], world.rank)
            storage = min(world.gather(found_here), key=lambda speed: speed.random)
    with report.busy("timing decoding and augmentation"):
        # A stream's samples have no ids, and their stated number may be very large.
        ids = np.arange(1) if recipe.data.is_stream else loading.sampled_ids(num_train, recipe.run.seed)
        if files is not None and not files.paths:  # at a URL, consecutive images need few requests
            ids = np.arange(len(ids))
        loading.read_into_page_cache(recipe, ids)
        data = loading.DataSpeed.of(recipe, ids, subject.micro_batch, budget["data"], world)
    with report.busy("timing the model"):
        stages = Stages(model, recipe, world)
        look = min(FIRST_LOOK, subject.micro_batch)
        image_seconds = stages.model_seconds(look, 0.0) / look
        global_batch, micro_batch = timed_batch(
            recipe.train.global_batch, subject.micro_batch, world.size, image_seconds, seconds
        )
        model_seconds = stages.model_seconds(micro_batch, budget["model"])
        transfer = stages.transfer_seconds(micro_batch, budget["transfer"])
        communication = stages.communication(budget["communication"])
        model.to("cpu")  # the device's memory is for what follows
    timed = recipe.changed(train__global_batch=global_batch, train__micro_batch=micro_batch)
    with report.busy("timing the whole loop"), tempfile.TemporaryDirectory(prefix="karat-doctor-") as scratch:
        # Few prefetched batches: a short run must not profit from those made before it began.
        own = timed.changed(data__prefetch=1, data__verify="size", run__dir=f"{scratch}/run", convert__images=0)
        with silent_trainer(own, world, ClassificationTask) as trainer:
            optimizer = optimizer_seconds(trainer, timed, micro_batch, budget["optimizer"])
            speed = LoopSpeed.of(trainer, LOOP_SHARE * seconds)
    batches = (micro_batch, global_batch)
    return Figures(subject, *batches, files, storage, data, transfer, model_seconds, optimizer, communication, speed)


def timed_batch(
    global_batch: int, micro_batch: int, world_size: int, image_seconds: float, seconds: float
) -> tuple[int, int]:
    """Return (global batch, micro batch) of which several steps fit into `seconds`: the given ones, or smaller ones.

    image_seconds: the seconds of forward and backward over one image on one rank. A micro batch that shrinks stays
    even, as mixing needs pairs.
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
    with distributed.joined(recipe.run.device) as world:
        micro_batch = micro_batch_of(recipe, world.size)
        load_ds_config(recipe, world.size, micro_batch)
        with tempfile.TemporaryDirectory(prefix="karat-doctor-") as scratch:
            keep_teacher(recipe, Path(scratch))
            model = build_model(recipe, Path(scratch))
        if recipe.train.freeze:
            freeze(model, recipe.train.freeze)
        apply_recompute(model, recipe)
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        subject = Subject(recipe, world, micro_batch, parameter_count(model), frozen)
        before()
        num_train = _fit(subject, report)
        if num_train is not None:
            timed = partial(time_recipe, subject, model, num_train, seconds, report)
            verdict = _examined(subject, "timed run", lambda: _judge(timed(), report))
            report.add("verdict", "what bounds training", verdict)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    return cpu_has_bf16()


def _fit(subject: Subject, report: Report) -> int | None:
    """Report whether the recipe fits; return the number of training images, or None if it cannot be timed."""
    backend: Backend | None = None

    def data() -> Iterable[Finding]:
        nonlocal backend
        # Hashing all shards would take all of the available time.
        backend = open_backend(ImageSpec.of(subject.recipe.changed(data__verify="size")))
        yield from examine_data(subject, backend)
        yield from examine_batches(subject, backend)

    findings = _examined(subject, "data", data)
    others = {"workers": examine_workers, "run.dir": examine_run_directory, "checkpoint.url": examine_checkpoint_url}
    for name, examination in others.items():
        findings += examine(name, partial(examination, subject))
    report.add("recipe", f"recipe {subject.recipe.run.name}", findings)
    if backend is None or any(finding.name == "data" and finding.level == "problem" for finding in findings):
        return None
    with closing(backend):
        return backend.num_train


def _examined(subject: Subject, name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Examine like `examine`; but with several ranks, raise, since one rank must not continue while the others wait."""
    fix = ClassificationTask.less_memory(subject.recipe, subject.world.size)
    if subject.world.size > 1:
        with one_line_out_of_memory(lambda: fix):
            return list(examination())

    def with_fix() -> Iterable[Finding]:
        try:
            return list(examination())
        except torch.OutOfMemoryError:
            return [found(name, "the micro batch does not fit the GPU's memory", fix, wrong=True)]

    return examine(name, with_fix)


def _judge(figures: Figures, report: Report) -> list[Finding]:
    """Show the stages; return the verdict and its notes."""
    subject, recipe, data = figures.subject, figures.subject.recipe, figures.subject.recipe.data
    has_decoder = data.row.files is not None and not data.row.own_decoder
    setting = Setting(
        recipe=recipe,
        workers=figures.workers,
        worker_rate=figures.data.one_core,
        cores=subject.cores_of_a_rank,
        world_size=subject.world.size,
        decoder=make_decoder(data, recipe.augment.interpolation).name if has_decoder else "",
        device=subject.world.device.type,
        has_bf16=_has_bf16(subject.world.device),
        accumulation=recipe.train.global_batch // (subject.world.size * subject.micro_batch),
        stays_cached=stays_cached(figures.files),
    )
    verdict = judge(figures.rates, setting)
    report.figures = {
        **figures.to_json(),
        "bound": verdict.bound,
        "advice": verdict.advice,
        "data_images_per_second": round(verdict.data_rate, 2),
        "device_images_per_second": round(verdict.device_rate, 2),
    }
    if report.is_main:
        print_table("images per second of each stage by itself", ("stage", "img/s", ""), _rows(figures), (0, 2))
    return [found("bound", f"{verdict.bound}: {verdict.reason}", verdict.advice), *_remarks(figures, verdict)]


def _rows(figures: Figures) -> list[tuple[str, str, str]]:
    data, storage, exchange, loop = figures.data, figures.storage, figures.communication, figures.loop
    workers = f"in {plural(figures.workers, 'worker')}" if figures.workers else "in the trainer"
    few = " (fewer than a micro batch, to fit --seconds)" if figures.micro_batch < figures.subject.micro_batch else ""
    images, batch = f"for {figures.micro_batch} images{few}", figures.subject.recipe.train.global_batch
    details = {
        "decode": f"{workers}; {data.decode_one_core:,.0f} on one core",
        "augmentation": f"{workers}; {100 * (1 - data.decode_share):.0f} % of the data path",
        "transfer": f"normalised and mixed, {1000 * figures.transfer:.1f} ms {images}",
        "model": f"forward + backward, {1000 * figures.model:,.0f} ms {images}",
        "optimizer": f"{1000 * figures.optimizer:.1f} ms a step of {batch} images",
    }
    if storage is not None:
        details["storage"] = (
            f"{storage.random / MB:,.0f} MB/s at random, {storage.sequential / MB:,.0f} in sequence, {storage.state}; "
            f"{storage.random_again / MB:,.0f} read again"
        )
    if exchange is not None:
        sent, took = exchange["bytes"] / MB, 1000 * exchange["seconds"]
        details["communication"] = f"all-reduce of {sent:,.0f} MB in {took:,.1f} ms"
    rows = [(stage, f"{rate:,.0f}", details[stage]) for stage, rate in figures.rates.items()]
    waits = f"{100 * loop.waiting_share:.0f} % of the time waits for data"
    batches = f"{plural(loop.steps, 'step')} of {figures.global_batch}; {waits}"
    return [*rows, ("the real loop", f"{loop.images_per_second:,.0f}", batches)]


def _remarks(figures: Figures, verdict: Verdict) -> Iterable[Finding]:
    loop = figures.loop
    if loop.unreadable:
        yield found("samples", f"{loop.unreadable} could not be decoded", "`karat data DIR --images N` lists them")
    wanted = figures.subject.recipe.train.global_batch
    if figures.global_batch != wanted:
        yield found("timed batch", f"{figures.global_batch} instead of {wanted}, to save time; see --seconds")
    slower, faster = sorted((verdict.data_rate, verdict.device_rate))
    if figures.workers and faster < CLOSE * slower:
        text = f"data makes {verdict.data_rate:,.0f} img/s and the trainer takes {verdict.device_rate:,.0f}"
        yield found("close", text, "to gain much, change both; --seconds measures for longer")
    if figures.workers and figures.global_batch == wanted and loop.images_per_second < HINDERED * slower:
        text = f"the loop makes {loop.images_per_second:,.0f} img/s, and its slower side by itself makes {slower:,.0f}"
        fix = "data workers, the trainer and other processes hinder each other: they share cores and memory"
        yield found("together", text, fix)
    storage = figures.rates.get("storage")
    if storage is not None and storage < slower and verdict.bound != "storage":
        text = f"the first epoch reads {storage:,.0f} img/s from the disk, less than the {slower:,.0f} of what follows"
        yield found("first epoch", text, "copy the data to a local disk")
