"""The interface of all backends, and how their workers start and make a batch from its ids.

A worker reads, decodes, transforms and collects the images of a batch, from any source. It ignores the signals that the
trainer handles, and ends when the trainer ends.
"""

import mmap
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.batch import BadSample, Batch, Draw
from karat_scale.data.decoders import ChooseView, Decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.data.shards.shard_files import NO_BLOCKS, Blocks
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.foundation.machine import be_killed_with_parent, usable_cores
from karat_scale.recipe import AugmentConfig, DataConfig, Recipe

POLL_SECONDS = 1.0
MAX_WORKERS = 1024
# More would wait for each other, and each takes memory. The extra ones are for slow file systems.
_WORKERS_PER_CORE, _MORE_WORKERS = 4, 32


def check_worker_count(workers: int) -> None:
    """Raise RecipeError for far more workers than the cores that this process may use."""
    cores = usable_cores()
    most = min(_WORKERS_PER_CORE * cores + _MORE_WORKERS, MAX_WORKERS)
    if workers > most:
        raise RecipeError(
            f"data.workers = {workers} processes for each rank, but the cores that it may use here are {cores}; use "
            f"about {cores}, at most {most}"
        )


def prepare_worker(parent: int, is_of_main_thread: bool, worker_id: int) -> None:
    """Set up the calling process as a data worker of process `parent`; for DataLoader's worker_init_fn.

    Args:
        is_of_main_thread: the parent's main thread started it.

    A signal to the whole process group (Ctrl-C, SLURM) must not end the workers, since the trainer still
    needs its batches until it has written a checkpoint, and a worker's death would interrupt it anywhere. So
    SIGTERM ends a worker only when the parent itself sends it.
    """
    torch.set_num_threads(1)
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    # Blocked here, so that only the watching thread receives it and can read its sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if is_of_main_thread:  # the kernel goes by the thread
        be_killed_with_parent()
    # The parent's id is an argument. If it were read here, a parent that was killed before this line would be mistaken
    # for the process that adopts orphans, and its connections would stay open in a worker that never ends.
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def lead_own_commands() -> None:
    """Let a worker that starts commands lead a group of processes, so that the loader can end them with the worker.

    Ctrl-C does not reach them then: the trainer needs their output until it has saved.
    """
    if get_worker_info() is not None and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)


class Whereabouts:
    """The current sample of each worker, in memory that forked workers share with the trainer.

    A worker that hangs on a file system cannot be asked, but its last note can be read.
    """

    def __init__(self) -> None:
        self._samples = np.frombuffer(mmap.mmap(-1, 8 * MAX_WORKERS), dtype=np.int64)

    def tell(self, sample_id: int) -> None:
        """The calling worker is at this sample now."""
        worker = get_worker_info()
        # Counted from one: the memory starts as zeros.
        self._samples[worker.id if worker else 0] = sample_id + 1

    def of(self, worker: int) -> int | None:
        """The sample that a worker told of last."""
        sample = int(self._samples[worker])
        return sample - 1 if sample else None


@dataclass(frozen=True)
class ImageSpec:
    """The images that a run asks a backend for: square, `image_size` pixels wide, of at most `num_classes` classes."""

    data: DataConfig
    augment: AugmentConfig
    image_size: int
    num_classes: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> "ImageSpec":
        """Return what a recipe asks for."""
        return cls(recipe.data, recipe.augment, recipe.model.image_size, recipe.model.num_classes, recipe.run.seed)

    @property
    def readahead(self) -> Blocks:
        """The blocks that are read at once, for `order: block`."""
        return Blocks(self.data.block_samples, self.data.window_blocks) if self.data.order == "block" else NO_BLOCKS


class Backend(Protocol):
    """A source of whole batches. The interface is per batch, since FFCV and DALI decode and augment by batch.

    Batches come in the order of the slices, and depend only on slice, recipe and seed.
    """

    @property
    def num_train(self) -> int:
        """Number of training samples."""

    @property
    def num_val(self) -> int:
        """Number of evaluation samples."""

    @property
    def num_classes(self) -> int:
        """Number of classes in the data; the model may have more."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return augmented batches. Loading starts at once and runs ahead of the reader."""

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return centre-cropped batches. Ids of PADDING give zeros with valid = False."""

    def close(self) -> None:
        """Stop workers and close files. Iterators handed out before yield no more."""


MAX_REPLACEMENTS = 100
Pixels = npt.NDArray[np.uint8]


class ImageSource(Protocol):
    """Encoded images by sample id."""

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The label of each sample."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> bytes:
        """Return the image's bytes. Raises DataError if they have changed."""

    def locate(self, sample_id: int) -> tuple[str, str]:
        """Return the sample's key (or path) and its shard, for messages."""

    def file_of(self, sample_id: int) -> str:
        """Return the path of the file that holds the sample, without reading the disk."""

    def close(self) -> None:
        """Close open files."""


@runtime_checkable
class PreparesSamples(Protocol):
    """A source that fetches the samples of a batch together."""

    def prepare(self, sample_ids: Iterable[int]) -> None:
        """Fetch what these samples need. Raises DataError."""


def prepare(source: ImageSource, part: BatchSlice) -> None:
    """Let a source fetch the samples of a slice together, if it can. Raises DataError."""
    if isinstance(source, PreparesSamples):
        source.prepare(part.sample_ids[part.sample_ids != PADDING].tolist())


class Assembler(ABC):
    """Makes a Batch from a BatchSlice, in new memory or in given memory."""

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder) -> None:
        self._source = source
        self._image_size = spec.image_size
        self._stop = spec.data.on_bad_sample == "stop"
        self._decoder = decoder
        self._whereabouts = Whereabouts()

    def shape(self, part: BatchSlice) -> tuple[int, ...]:
        """Return the shape of the slice's images."""
        return len(part.sample_ids), 3, self._image_size, self._image_size

    def __getitem__(self, part: BatchSlice) -> Batch:
        return self.fill(part, torch.empty(self.shape(part), dtype=torch.uint8))

    @abstractmethod
    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        """Return the batch; its pixels are written to `images`."""

    def _prepare(self, part: BatchSlice) -> None:
        if part.sample_ids.size and part.sample_ids[0] != PADDING:
            self._whereabouts.tell(int(part.sample_ids[0]))
        prepare(self._source, part)

    def _decode(self, sample_id: int, choose: ChooseView) -> Pixels | BadSample:
        self._whereabouts.tell(sample_id)
        try:
            return self._decoder.read(self._source.read(sample_id), choose)
        except UndecodableImageError as error:
            bad = BadSample(sample_id, *self._source.locate(sample_id), str(error))
            if self._stop:
                raise DataError(
                    f"{bad}; remove it from the data set, or skip such images: add data.on_bad_sample=skip "
                    "'resume.allow=[data.on_bad_sample]'"
                ) from error
            return bad

    def whereabouts(self, workers: int) -> str:
        """Return each worker's last sample, for the message of a loader that gets no batch."""
        at = [(worker, self._whereabouts.of(worker)) for worker in range(workers)]
        told = [f"worker {worker} at sample {i} in {self._source.file_of(i)}" for worker, i in at if i is not None]
        return ", ".join(told) or "no worker had started"


class TrainAssembler(Assembler):
    """Training batches. If the recipe says skip, an unreadable sample is replaced by the next id that decodes.

    The replacement is augmented by its own seed, so it looks as it does at its own place.
    """

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder) -> None:
        super().__init__(source, spec, decoder)
        self._transform = TrainTransform(spec.augment, spec.image_size)
        self._seed = spec.seed

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        self._prepare(part)
        pixels = images.numpy()
        ids = part.sample_ids.copy()
        bad: list[BadSample] = []
        draws: list[Draw] = []
        for row, sample_id in enumerate(part.sample_ids.tolist()):
            used, draw, view = self._first_readable(part.epoch, sample_id, bad)
            pixels[row] = self._transform.finish(view, draw)
            ids[row] = used
            draws.append(draw)
        labels = self._source.labels[ids].astype(np.int64)
        return Batch(
            images=images,
            labels=torch.from_numpy(labels),
            sample_ids=torch.from_numpy(ids),
            valid=torch.ones(len(ids), dtype=torch.bool),
            bad=tuple(bad),
            draws=tuple(draws),
            epoch=part.epoch,
            batch=part.batch,
        )

    def _first_readable(self, epoch: int, sample_id: int, bad: list[BadSample]) -> tuple[int, Draw, Pixels]:
        draws: list[Draw] = []

        def choose(width: int, height: int) -> View:
            draws.append(self._transform.draw(sample_seed(self._seed, epoch, used), width, height))
            return self._transform.view(draws[-1])

        for candidate in range(sample_id, sample_id + min(MAX_REPLACEMENTS, len(self._source))):
            used = candidate % len(self._source)
            pixels = self._decode(used, choose)
            if not isinstance(pixels, BadSample):
                return used, draws[-1], pixels
            bad.append(pixels)
        raise DataError(f"{bad[-1]}; no sample near it can be decoded either, so make the data set again")


class EvalAssembler(Assembler):
    """Evaluation batches: padding and unreadable samples are zeros with valid = False."""

    def __init__(self, source: ImageSource, spec: ImageSpec, decoder: Decoder) -> None:
        super().__init__(source, spec, decoder)
        self._transform = EvalTransform(spec.augment, spec.image_size)

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        self._prepare(part)
        pixels = images.numpy()
        labels = np.zeros(len(part.sample_ids), dtype=np.int64)
        valid = part.sample_ids != PADDING
        bad: list[BadSample] = []
        for row in np.flatnonzero(valid).tolist():
            sample_id = int(part.sample_ids[row])
            labels[row] = self._source.labels[sample_id]
            view = self._decode(sample_id, self._transform.view)
            if isinstance(view, BadSample):
                valid[row] = False
                bad.append(view)
            else:
                pixels[row] = view.transpose(2, 0, 1)
        pixels[~valid] = 0
        return Batch(
            images=images,
            labels=torch.from_numpy(labels),
            sample_ids=torch.from_numpy(part.sample_ids.copy()),
            valid=torch.from_numpy(valid),
            bad=tuple(bad),
            epoch=part.epoch,
            batch=part.batch,
        )
