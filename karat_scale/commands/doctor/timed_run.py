"""A short timed run of a recipe: each stage of a training step by itself, then the real training loop, end to end."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from karat_scale.commands.doctor.device_speed import (
    BareModel,
    Communication,
    communication,
    optimizer_seconds,
    slowest,
    transfer_seconds,
)
from karat_scale.commands.doctor.fit import Subject, stays_cached
from karat_scale.commands.doctor.report import Printer, Setting, Stage
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
from karat_scale.data.batch import Batch
from karat_scale.engine.devices import wait_for
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.machine import cpu_has_bf16
from karat_scale.recipe import Recipe
from karat_scale.training.loop import Loop, Parts
from karat_scale.training.run import build_parts
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.signals import StopSignals
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
