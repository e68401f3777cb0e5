"""Make a batch from its ids, with any source of images: read, decode, transform, collect."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.decoders import ChooseView, Decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.view import View
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.loading.workers import Whereabouts
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.foundation.errors import DataError

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
