"""Make images and targets from the ids of a batch, in data workers."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.loading.loader import OrderedResults
from karat_scale.data.loading.workers import Whereabouts
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import PADDING, BatchSlice
from karat_scale.training.tasks.detection.coco import CocoSplit
from karat_scale.training.tasks.detection.jitter import boxes_of, draw_jitter, jitter_image, jitter_masks
from karat_scale.training.tasks.detection.recipe import CocoConfig, DetectionRecipe

Target = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class DetectionBatch:
    """Images of different sizes, as arrays, since workers pickle these without /dev/shm.

    images: uint8 [3, h, w] each. targets: only in training, `boxes` float32 [n, 4] in pixels, `labels` int64 [n] from
    1, `masks` uint8 [n, h, w]. samples: their numbers in the split.
    """

    images: list[npt.NDArray[np.uint8]]
    targets: list[Target]
    samples: list[int]

    def to(self, device: torch.device) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Return (images float32 in 0 .. 1, targets) on a device, as torchvision's detectors expect them."""
        images = [torch.from_numpy(image).to(device).float() / 255 for image in self.images]
        targets = [{key: torch.from_numpy(x).to(device) for key, x in target.items()} for target in self.targets]
        return images, targets


class TrainMaker:
    """Makes training batches: a sample's jitter depends only on the seed, the epoch and the sample."""

    def __init__(self, split: CocoSplit, recipe: DetectionRecipe) -> None:
        self._split, self._recipe = split, recipe
        self._whereabouts = Whereabouts()

    def __call__(self, part: BatchSlice) -> DetectionBatch:
        """Return the batch of a slice. Raises DataError for an image that cannot be read."""
        samples = [int(sample) for sample in part.sample_ids]
        made = [self._make(sample, part.epoch) for sample in samples]
        return DetectionBatch([image for image, _ in made], [target for _, target in made], samples)

    def _make(self, sample: int, epoch: int) -> tuple[npt.NDArray[np.uint8], Target]:
        self._whereabouts.tell(sample)
        image = self._split.read(sample)
        labels, masks = self._split.objects(sample)
        recipe = self._recipe
        seed = sample_seed(recipe.run.seed, epoch, sample)
        jitter = draw_jitter(seed, image.width, image.height, recipe.model.image_size, recipe.augment)
        masks = jitter_masks(masks, jitter)
        seen = masks.any(axis=(1, 2))
        masks, labels = masks[seen], labels[seen]
        return jitter_image(image, jitter), {"boxes": boxes_of(masks), "labels": labels, "masks": masks}

    def whereabouts(self, workers: int) -> str:
        """Return the last sample of each worker."""
        return _whereabouts(self._whereabouts, self._split, workers)


class EvalMaker:
    """Makes evaluation batches: whole images, without the padding of the last slice."""

    def __init__(self, split: CocoSplit) -> None:
        self._split = split
        self._whereabouts = Whereabouts()

    def __call__(self, part: BatchSlice) -> DetectionBatch:
        """Return the batch of a slice. Raises DataError for an image that cannot be read."""
        samples = [int(sample) for sample in part.sample_ids if sample != PADDING]
        images = []
        for sample in samples:
            self._whereabouts.tell(sample)
            images.append(np.ascontiguousarray(np.asarray(self._split.read(sample)).transpose(2, 0, 1)))
        return DetectionBatch(images, [], samples)

    def whereabouts(self, workers: int) -> str:
        """Return the last sample of each worker."""
        return _whereabouts(self._whereabouts, self._split, workers)


def load_batches(
    make: TrainMaker | EvalMaker, slices: Iterable[BatchSlice], data: CocoConfig
) -> OrderedResults[DetectionBatch]:
    """Return the batches of `slices`, in order, from workers."""
    return OrderedResults(make, slices, data.workers, data.prefetch, data.timeout, make.whereabouts)


def _whereabouts(whereabouts: Whereabouts, split: CocoSplit, workers: int) -> str:
    at = [(worker, whereabouts.of(worker)) for worker in range(workers)]
    told = [f"worker {worker} at {split.file_of(sample)}" for worker, sample in at if sample is not None]
    return ", ".join(told) or "no worker had started"
