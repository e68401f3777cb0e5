"""From the ids of a batch to the batch: read, decode, transform, collect; for any source of images."""

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from karat_scale.data.augment import EvalTransform, TrainTransform
from karat_scale.data.batch import BadSample, Batch
from karat_scale.data.decode import UndecodableImageError, decode_rgb
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.errors import DataError

MAX_REPLACEMENTS = 100


class ImageSource(Protocol):
    """Encoded images by sample id."""

    labels: npt.NDArray[np.int32]

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> bytes:
        """The image's bytes. Raises DataError where they are not what they were."""

    def locate(self, sample_id: int) -> tuple[str, str]:
        """The sample's key (or path) and the shard that holds it, for messages."""

    def close(self) -> None:
        """Give back open files."""


class Assembler:
    """Makes a Batch of a BatchSlice; `assembler[slice]` so that a DataLoader can call it as a dataset."""

    def __init__(self, source: ImageSource, image_size: int, on_bad_sample: Literal["skip", "stop"]) -> None:
        self._source = source
        self._image_size = image_size
        self._stop = on_bad_sample == "stop"

    def _empty(self, part: BatchSlice) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
        images = torch.zeros(len(part.sample_ids), 3, self._image_size, self._image_size, dtype=torch.uint8)
        return images, images.numpy()

    def _decode(self, sample_id: int) -> Image.Image | BadSample:
        try:
            return decode_rgb(self._source.read(sample_id))
        except UndecodableImageError as error:
            bad = BadSample(sample_id, *self._source.locate(sample_id), str(error))
            if self._stop:
                raise DataError(
                    f"{bad}; set data.on_bad_sample=skip, or remove the image and make the shards again"
                ) from error
            return bad


class TrainAssembler(Assembler):
    """Training batches. An unreadable sample gives its place to the next id that decodes, when the recipe
    says skip.

    The substitute is augmented by its own seed, so it looks as it does in its own place.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        on_bad_sample: Literal["skip", "stop"],
        transform: TrainTransform,
        seed: int,
    ) -> None:
        super().__init__(source, image_size, on_bad_sample)
        self._transform = transform
        self._seed = seed

    def __getitem__(self, part: BatchSlice) -> Batch:
        images, pixels = self._empty(part)
        ids = part.sample_ids.copy()
        bad: list[BadSample] = []
        for row, sample_id in enumerate(part.sample_ids.tolist()):
            used, image = self._first_readable(sample_id, bad)
            pixels[row] = self._transform(image, sample_seed(self._seed, part.epoch, used))
            ids[row] = used
        labels = self._source.labels[ids].astype(np.int64)
        return Batch(
            images=images,
            labels=torch.from_numpy(labels),
            sample_ids=torch.from_numpy(ids),
            valid=torch.ones(len(ids), dtype=torch.bool),
            bad=tuple(bad),
            epoch=part.epoch,
            batch=part.batch,
        )

    def _first_readable(self, sample_id: int, bad: list[BadSample]) -> tuple[int, Image.Image]:
        for candidate in range(sample_id, sample_id + min(MAX_REPLACEMENTS, len(self._source))):
            used = candidate % len(self._source)
            image = self._decode(used)
            if isinstance(image, Image.Image):
                return used, image
            bad.append(image)
        raise DataError(f"{bad[-1]}; no sample near it can be decoded either, so make the shards again")


class EvalAssembler(Assembler):
    """Evaluation batches: padding and unreadable samples are zeros with valid = False."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        on_bad_sample: Literal["skip", "stop"],
        transform: EvalTransform,
    ) -> None:
        super().__init__(source, image_size, on_bad_sample)
        self._transform = transform

    def __getitem__(self, part: BatchSlice) -> Batch:
        images, pixels = self._empty(part)
        labels = np.zeros(len(part.sample_ids), dtype=np.int64)
        valid = part.sample_ids != PADDING
        bad: list[BadSample] = []
        for row in np.flatnonzero(valid).tolist():
            sample_id = int(part.sample_ids[row])
            labels[row] = self._source.labels[sample_id]
            image = self._decode(sample_id)
            if isinstance(image, BadSample):
                valid[row] = False
                bad.append(image)
            else:
                pixels[row] = self._transform(image)
        return Batch(
            images=images,
            labels=torch.from_numpy(labels),
            sample_ids=torch.from_numpy(part.sample_ids.copy()),
            valid=torch.from_numpy(valid),
            bad=tuple(bad),
            epoch=part.epoch,
            batch=part.batch,
        )
