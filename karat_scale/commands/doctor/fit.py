"""Check whether a recipe fits its data, its run directory and this machine, before anything is timed."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from secrets import token_bytes, token_hex

import torch

from karat_scale.checkpoint.tensor_storage import planned_bytes
from karat_scale.commands.doctor import machine
from karat_scale.commands.doctor.report import Finding, found
from karat_scale.commands.measure.storage import DataFiles, find_data_files
from karat_scale.data.backends import Backend
from karat_scale.data.plan import TrainPlan, micro_batch_of
from karat_scale.engine.deepspeed_config import load_ds_config, zero_stage
from karat_scale.engine.distributed import World
from karat_scale.foundation.console import gigabytes, plural
from karat_scale.foundation.errors import RecipeError, RunDirectoryError
from karat_scale.foundation.machine import usable_cores
from karat_scale.foundation.stores import WritableStore
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Subject:
    """The subject of the checks: the recipe, this rank's world, its micro batch, and the model's trainable scalars."""

    recipe: Recipe
    world: World
    micro_batch: int
    parameters: int

    @property
    def local_ranks(self) -> int:
        """The number of ranks on this node."""
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or self.world.size)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint."""
        stage = zero_stage(load_ds_config(self.recipe, self.world.size, self.micro_batch))
        return planned_bytes(self.recipe, stage, self.parameters)

    @property
    def cores_of_a_rank(self) -> int:
        """The cores that this rank may use. srun gives each task its own; a launcher's ranks share them."""
        own = "SLURM_STEP_NUM_TASKS" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ
        shared = 1 if own else self.local_ranks
        return max(1, usable_cores() // shared)


def examine_data(subject: Subject, backend: Backend) -> Iterator[Finding]:
    """Report the data that the backend opened, and whether it will stay in memory."""
    recipe = subject.recipe
    source = recipe.data.stream or recipe.data.path or "generated in memory"
    train, val, classes = backend.num_train, backend.num_val, backend.num_classes
    counts = f"{train:,} training and {val:,} validation images, {classes} classes"
    yield found("data", f"{recipe.data.backend}, {source}: {counts}", train=train, val=val, classes=classes)
    files = find_data_files(recipe, backend.num_train)
    if files is not None:
        yield _page_cache(files, recipe.data.cache_gb)


def stays_cached(files: DataFiles | None) -> bool:
    """Report whether the available memory holds all the data."""
    return files is None or files.total_bytes < machine.cache_memory()


def _page_cache(files: DataFiles, cache_gb: float) -> Finding:
    room = machine.cache_memory()
    if not files.paths:
        text = f"{gigabytes(files.total_bytes)} of data at a URL, data.cache_gb = {cache_gb:g}"
        stays = files.total_bytes < 1e9 * cache_gb
        text += ": fetched only in the first epoch" if stays else ": fetched again in each epoch"
        fix = "" if stays else "raise data.cache_gb if the disk has room, or copy the data with data_prep/stage.py"
        return found("cache", text, fix, stays=stays, data_bytes=files.total_bytes)
    text = f"{gigabytes(files.total_bytes)} of data, {gigabytes(room)} of memory available"
    stays, fix = stays_cached(files), ""
    if stays:
        text += ": read from the disk only in the first epoch"
    else:
        fix = "every epoch reads the disk, so its speed matters; data_prep/stage.py copies the data to a local disk"
    image_bytes = round(files.image_bytes)
    return found("page cache", text, fix, stays=stays, data_bytes=files.total_bytes, image_bytes=image_bytes)


def examine_batches(subject: Subject, backend: Backend) -> Iterator[Finding]:
    """Report how the global batch is divided, and the world sizes that divide it. Raises UserError if none."""
    recipe, world, micro = subject.recipe, subject.world, subject.micro_batch
    plan = TrainPlan.of(recipe, backend.num_train, world.rank, world.size)
    fits = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if _divides(recipe, size)]
    text = (
        f"{plan.global_batch} = {plural(world.size, 'rank')} x {plan.accumulation} x {micro}, "
        f"{plan.steps_per_epoch:,} steps an epoch; divides over {', '.join(map(str, fits))} ranks"
    )
    yield found("global batch", text, accumulation=plan.accumulation, micro_batch=micro, world_sizes=fits)
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if world.size == 1 and gpus > 1:
        start = f"torchrun --nproc-per-node={gpus} -m karat_scale doctor ... times them all"
        yield found("ranks", f"1 of {gpus} GPUs is used", start)


def _divides(recipe: Recipe, size: int) -> bool:
    try:
        micro_batch_of(recipe, size)
    except RecipeError:
        return False
    return True


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
    side = subject.recipe.model.image_size
    under_way = data.workers * data.prefetch
    needed = ranks * under_way * subject.micro_batch * 3 * side * side
    free = machine.cache_memory()
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
    kept = checkpoint.keep_last + checkpoint.keep_best + 1 + bool(checkpoint.url)  # one that is copied may stay longer
    one = subject.checkpoint_bytes
    free = shutil.disk_usage(machine.nearest_existing(directory.path)).free
    text = f"{kept} checkpoints of {gigabytes(one)} (one of them while it is written), {gigabytes(free)} free"
    short = kept * one > free
    fix = "free space, choose another run.dir, or lower checkpoint.keep_last" if short else ""
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
        directory.refuse_another_recipe(recipe)
    except RunDirectoryError as error:
        return found("run.dir", str(error).removeprefix("run.dir = "), wrong=True)
    return found("run.dir", f"{directory.path} has this run: karat train resumes it")
