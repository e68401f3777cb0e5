"""Detection data in COCO's format: the images and objects of a split, their jitter, and batches made in data workers.

Jitter is large-scale (Ghiasi et al., arXiv 2012.07177), as in ViTDet: drawn first, then applied in one resize.
"""

import contextlib
import hashlib
import io
import json
import math
import pickle
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.loading.workers import OrderedResults, Whereabouts
from karat_scale.data.plan import PADDING, BatchSlice, sample_seed
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import read_image
from karat_scale.training.tasks.detection.recipe import CocoConfig, DetectionRecipe, JitterConfig, require_pycocotools

FIX = "correct data.path, or the keys of images and annotations in data"
_IMAGE_FIELDS = {"file_name": (str, "a name"), "width": (int, "pixels"), "height": (int, "pixels")}


@dataclass(frozen=True)
class ImageRecord:
    """The annotations of one image; only objects that can be learned, as (id, category, segmentation)."""

    file_name: str
    width: int
    height: int
    objects: tuple[tuple[int, int, Any], ...]


class CocoSplit:
    """Images with their objects. Samples are numbered 0 .. len - 1.

    Args:
        root: the data set's directory.
        images: the images' directory below it.
        annotations: the JSON file below it.
        for_training: leave out images without an object to learn; such an object is not a crowd and has an area. Else
            pycocotools' index is kept as `index`.

    Raises:
        DataError: a file is missing or wrong, or no image has an object.
        RecipeError: pycocotools is not installed.
    """

    def __init__(self, root: str, images: str, annotations: str, for_training: bool) -> None:
        self.file = Path(root).expanduser() / annotations
        self._images = Path(root).expanduser() / images
        index = _read(self.file)
        categories = sorted(index.cats)
        self._labels = {category: label for label, category in enumerate(categories, start=1)}
        self.classes = tuple(str(index.cats[category].get("name", category)) for category in categories)
        """The category names in the order of the labels 1, 2, ..., which is the order of the category ids."""
        self.category_ids = tuple(categories)
        records = {image: self._record(index, image) for image in sorted(index.imgs)}
        if not any(record.objects for record in records.values()):
            raise DataError(f"{self.file} has no image with objects; {FIX}")
        self.image_ids = [image for image, record in records.items() if record.objects or not for_training]
        flat = sum(self._area(one) <= 0 for image in index.imgs for one in index.imgToAnns.get(image, ()))
        self.notices = _left_out(index, len(records) - len(self.image_ids), flat)
        """One line on each part of the annotations that is not used."""
        named = [(image, records[image].file_name, len(records[image].objects)) for image in self.image_ids]
        self.identity = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        """A hash of the images' ids and names and of the numbers of their objects; it is equal for a copy."""
        self._records = _Packed([records[image] for image in self.image_ids])
        self.index: Any = None if for_training else self._completed(index)

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_of(self, sample: int) -> Path:
        """Return the image's file."""
        return self._images / self._records[sample].file_name

    def read(self, sample: int) -> Image.Image:
        """Return the image in RGB.

        Raises:
            DataError: it is missing, cannot be decoded, or its size differs from the annotations.
        """
        path, record = self.file_of(sample), self._records[sample]
        try:
            image = decode_rgb(read_image(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {FIX}") from error
        except UndecodableImageError as error:
            raise DataError(f"{path} cannot be decoded: {error}; replace it with a complete copy") from error
        if image.size != (record.width, record.height):
            is_turned = image.size == (record.height, record.width)
            fix = "turn its pixels as its EXIF says, which is not read here" if is_turned else "use the annotated image"
            raise DataError(
                f"{path} is {image.width} x {image.height}, but {self.file.name} says {record.width} x "
                f"{record.height}; {fix}"
            )
        return image

    def objects(self, sample: int) -> tuple[npt.NDArray[np.int64], Iterator[npt.NDArray[np.uint8]]]:
        """Return labels [n] from 1 of the objects to learn, and their masks [H, W] of 0 and 1 at the image's size.

        A mask is made when its turn comes: all of a large photograph may not fit into memory.

        Raises:
            DataError: an annotation has no readable segmentation; raised when its mask is made.
        """
        labels = [self._labels[category] for _, category, _ in self._records[sample].objects]
        return np.array(labels, np.int64), self._masks(self._records[sample])

    def _masks(self, record: ImageRecord) -> Iterator[npt.NDArray[np.uint8]]:
        from pycocotools import mask as coco_mask

        for number, _, segmentation in record.objects:
            try:
                yield coco_mask.decode(_runs(segmentation, record.height, record.width))
            except Exception as error:  # pycocotools asserts, indexes and casts
                raise self._unreadable(number, error) from error

    def _record(self, index: Any, image: int) -> ImageRecord:
        about = index.imgs[image]
        learnable = [
            (annotation.get("id"), self._category(annotation), self._segmentation(annotation))
            for annotation in index.imgToAnns.get(image, ())
            if not self._is_crowd(annotation) and self._area(annotation) > 0
        ]
        for key, (kind, what) in _IMAGE_FIELDS.items():
            if key not in about:
                raise DataError(f"{self.file}: image {image} has no {key}; {FIX}")
            if not isinstance(about[key], kind) or isinstance(about[key], bool):
                raise DataError(f"{self.file}: image {image} has {key} = {about[key]!r}, not {what}; correct it")
        return ImageRecord(about["file_name"], about["width"], about["height"], tuple(learnable))

    def _completed(self, index: Any) -> Any:
        """Return pycocotools' index as its evaluation needs it: without objects that have no area, and with each key.

        Raises DataError for a segmentation or a box that cannot be read.
        """
        from pycocotools import mask as coco_mask

        known = [one for one in index.dataset["annotations"] if one["image_id"] in index.imgs and self._area(one) > 0]
        # To pycocotools, a detection that matched annotation 0 has matched nothing.
        for number, annotation in enumerate(known, start=1):
            image = index.imgs[annotation["image_id"]]
            try:
                runs = _runs(annotation.get("segmentation"), image["height"], image["width"])
                annotation.setdefault("area", float(coco_mask.area(runs)))
                box = [float(one) for one in annotation.get("bbox") or coco_mask.toBbox(runs)]
                if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                    raise ValueError(f"its bbox is {box}")
            except Exception as error:  # pycocotools asserts, indexes and casts
                raise self._unreadable(annotation.get("id"), error) from error
            crowd = int(self._is_crowd(annotation))
            annotation.update(id=number, segmentation=runs, bbox=box, iscrowd=crowd)
        index.dataset["annotations"] = known
        with contextlib.redirect_stdout(io.StringIO()):
            index.createIndex()
        return index

    def _unreadable(self, number: Any, error: Exception) -> DataError:
        return DataError(
            f"{self.file}: annotation {number} has no readable segmentation or box: {type(error).__name__}: {error}; "
            "correct it"
        )

    def _category(self, annotation: Any) -> int:
        category: int = annotation.get("category_id")
        if category not in self._labels:
            raise self._wrong(annotation, "category_id", category, "the id of a category")
        return category

    def _segmentation(self, annotation: Any) -> Any:
        found = annotation.get("segmentation")
        if not found:
            raise DataError(
                f"{self.file}: annotation {annotation.get('id')} has no segmentation, and Mask R-CNN learns "
                "masks, not boxes alone; add it, or leave the annotation out"
            )
        return found

    def _is_crowd(self, annotation: Any) -> bool:
        crowd = annotation.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise self._wrong(annotation, "iscrowd", crowd, "0 or 1")
        return bool(crowd)

    def _area(self, annotation: Any) -> float:
        area = annotation.get("area", 1.0)
        if not isinstance(area, int | float) or not math.isfinite(area):
            raise self._wrong(annotation, "area", area, "a number")
        return area

    def _wrong(self, annotation: Any, key: str, value: object, what: str) -> DataError:
        number = annotation.get("id")
        return DataError(f"{self.file}: annotation {number} has {key} = {value!r}, not {what}; correct it")


def _left_out(index: Any, images: int, flat: int) -> list[str]:
    """Return notices on images without an object to learn, and on annotations without an area or an image."""
    strangers = [image for image in index.imgToAnns if image not in index.imgs]
    annotations = sum(len(index.imgToAnns[image]) for image in strangers)
    notices = [f"{plural(images, 'image')} of {len(index.imgs):,} left out: no object to learn"] if images else []
    if flat:
        notices.append(f"{plural(flat, 'annotation')} left out: no area above 0")
    if annotations:
        notices.append(f"{plural(annotations, 'annotation')} left out: no image has the id {strangers[0]!r}")
    return notices


class _Packed:
    """Records as one array of bytes: if they were a million objects, each worker would copy those that it touches."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        packed = [pickle.dumps(record) for record in records]
        self._ends = np.cumsum([len(record) for record in packed])
        self._bytes = np.frombuffer(b"".join(packed), np.uint8)

    def __getitem__(self, number: int) -> ImageRecord:
        start = self._ends[number - 1] if number else 0
        record: ImageRecord = pickle.loads(self._bytes[start : self._ends[number]].data)
        return record


def check_classes(split: CocoSplit, num_classes: int) -> None:
    """Raise DataError unless there are as many categories as the model has classes."""
    if len(split.classes) != num_classes:
        raise DataError(
            f"{split.file} has {len(split.classes)} categories, but model.num_classes = {num_classes}; "
            f"set model.num_classes={len(split.classes)}"
        )


def _runs(segmentation: Any, height: int, width: int) -> Any:
    """Return polygons, or run lengths, compressed or not, as the compressed run lengths of the whole image.

    Raises ValueError for others: with these, pycocotools reads uninitialised memory, and compares without an end.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    lengths = [int(one) for one in counts] if isinstance(counts, list) else _lengths(counts)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its mask is {segmentation['size'][1]} x {segmentation['size'][0]}")
    if min(lengths) < 0 or sum(lengths) != height * width:
        raise ValueError(f"its run lengths are {sum(lengths)} pixels together, not {width} x {height}")
    return coco_mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation


def _lengths(compressed: str | bytes) -> list[int]:
    """Return the run lengths that pycocotools wrote as text.

    Each character has five bits, the lowest first. From the fourth length on, the text has its difference from the
    length two before it.
    """
    lengths: list[int] = []
    number = shift = 0
    for character in compressed.encode() if isinstance(compressed, str) else compressed:
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (bits & 16) << shift - 4
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number = shift = 0
    return lengths


def _read(file: Path) -> Any:
    """Return pycocotools' index of an annotation file."""
    require_pycocotools()
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            index = COCO(str(file))
        for ids in (index.imgs, index.cats):
            sorted(ids)  # numbers, or texts
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {FIX}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}; replace it with a complete copy") from error
    except (AssertionError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not in COCO's format: {type(error).__name__}: {error}; {FIX}") from error
    if missing := [key for key in ("images", "annotations", "categories") if not index.dataset.get(key)]:
        raise DataError(f"{file} is not in COCO's format for instances: it has no {missing[0]}; {FIX}")
    for key, one_of_each in {"images": index.imgs, "categories": index.cats}.items():
        if len(one_of_each) != len(index.dataset[key]):
            again = next(one for one, count in Counter(one["id"] for one in index.dataset[key]).items() if count > 1)
            raise DataError(f"{file}: two of its {key} have the id {again!r}; give each its own, also in annotations")
    return index


def open_split(recipe: DetectionRecipe, name: str) -> CocoSplit:
    """Return the split "train", only images with objects, or "val", all images.

    Raises:
        UserError: it cannot be read, or its categories are not as many as the model's classes.
    """
    data = recipe.data
    names = (data.train_images, data.train_annotations) if name == "train" else (data.val_images, data.val_annotations)
    split = CocoSplit(data.path, *names, for_training=name == "train")
    check_classes(split, recipe.model.num_classes)
    return split


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Jitter:
    """The jitter of one sample: `box` (left, top, right, bottom) of the image becomes `size` (width, height)."""

    box: Box
    size: tuple[int, int]
    flip: bool


def draw_jitter(seed: int, width: int, height: int, image_size: int, config: JitterConfig) -> Jitter:
    """Draw a scale, relative to that at which the longer side fits `image_size`, a place for the crop, and a flip.

    The result has sides of at most `image_size`.
    """
    rng = random.Random(seed)
    scale = rng.uniform(*config.scale) * image_size / max(width, height)
    size = [min(max(round(side * scale), 1), image_size) for side in (width, height)]
    taken = [min(part / scale, side) for part, side in zip(size, (width, height), strict=True)]
    left, top = ((side - part) * rng.random() for part, side in zip(taken, (width, height), strict=True))
    return Jitter((left, top, left + taken[0], top + taken[1]), (size[0], size[1]), rng.random() < config.hflip)


def jitter_image(image: Image.Image, jitter: Jitter) -> npt.NDArray[np.uint8]:
    """Return the pixels [3, h, w] of an image, jittered; bilinear, averaged when it shrinks."""
    pixels = np.asarray(image.resize(jitter.size, Image.Resampling.BILINEAR, box=jitter.box))
    return np.ascontiguousarray(_flipped(pixels, jitter, axis=1).transpose(2, 0, 1))


def jitter_masks(masks: Iterable[npt.NDArray[np.uint8]], jitter: Jitter) -> npt.NDArray[np.uint8]:
    """Return masks [H, W] as [n, h, w], jittered like their image, with the nearest pixel."""
    width, height = jitter.size
    resized = [
        np.asarray(Image.fromarray(mask).resize(jitter.size, Image.Resampling.NEAREST, box=jitter.box))
        for mask in masks
    ]
    return _flipped(np.stack(resized) if resized else np.zeros((0, height, width), np.uint8), jitter, axis=2)


def boxes_of(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the tight boxes [n, 4] (left, top, right, bottom) of masks [n, h, w], none of them empty."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _flipped(array: npt.NDArray[np.uint8], jitter: Jitter, axis: int) -> npt.NDArray[np.uint8]:
    return np.flip(array, axis).copy() if jitter.flip else array


Target = dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class DetectionBatch:
    """Images of different sizes, as arrays, since workers pickle these without /dev/shm.

    `images` are uint8 [3, h, w] each. `targets`, only in training, are `boxes` float32 [n, 4] in pixels, `labels` int64
    [n] from 1 and `masks` uint8 [n, h, w]. `samples` are the images' numbers in the split.
    """

    images: list[npt.NDArray[np.uint8]]
    targets: list[Target]
    samples: list[int]

    def to(self, device: torch.device) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Return (images float32 in 0 .. 1, targets) on a device, as torchvision's detectors expect them."""
        images = [torch.from_numpy(image).to(device).float() / 255 for image in self.images]
        targets = [{key: torch.from_numpy(x).to(device) for key, x in target.items()} for target in self.targets]
        return images, targets


class EvalMaker:
    """Makes evaluation batches: whole images, without the padding of the last slice."""

    def __init__(self, split: CocoSplit) -> None:
        self._split = split
        self._whereabouts = Whereabouts()

    def __call__(self, part: BatchSlice) -> DetectionBatch:
        """Return the batch of a slice. Raises DataError for an image that cannot be read."""
        samples = [int(sample) for sample in part.sample_ids if sample != PADDING]
        images = [np.ascontiguousarray(np.asarray(self._read(sample)).transpose(2, 0, 1)) for sample in samples]
        return DetectionBatch(images, [], samples)

    def _read(self, sample: int) -> Image.Image:
        self._whereabouts.tell(sample)
        return self._split.read(sample)

    def whereabouts(self, workers: int) -> str:
        """Return the last sample of each worker."""
        return self._whereabouts.told(workers, lambda sample: f"at {self._split.file_of(sample)}")


class TrainMaker(EvalMaker):
    """Makes training batches: a sample's jitter depends only on the seed, the epoch and the sample."""

    def __init__(self, split: CocoSplit, recipe: DetectionRecipe) -> None:
        super().__init__(split)
        self._recipe = recipe

    def __call__(self, part: BatchSlice) -> DetectionBatch:
        """Return the batch of a slice. Raises DataError for an image that cannot be read."""
        samples = [int(sample) for sample in part.sample_ids]
        made = [self._make(sample, part.epoch) for sample in samples]
        return DetectionBatch([image for image, _ in made], [target for _, target in made], samples)

    def _make(self, sample: int, epoch: int) -> tuple[npt.NDArray[np.uint8], Target]:
        image = self._read(sample)
        labels, whole = self._split.objects(sample)
        recipe = self._recipe
        seed = sample_seed(recipe.run.seed, epoch, sample)
        jitter = draw_jitter(seed, image.width, image.height, recipe.model.image_size, recipe.augment)
        masks = jitter_masks(whole, jitter)
        seen = masks.any(axis=(1, 2))
        masks, labels = masks[seen], labels[seen]
        return jitter_image(image, jitter), {"boxes": boxes_of(masks), "labels": labels, "masks": masks}


def load_batches(make: EvalMaker, slices: Iterable[BatchSlice], data: CocoConfig) -> OrderedResults[DetectionBatch]:
    """Return the batches of `slices`, in order, from workers."""
    return OrderedResults(make, slices, data.workers, data.prefetch, data.timeout, make.whereabouts)
