"""One split of a detection set in COCO's format: images, categories, and the objects in an image."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decode import UndecodableImageError, decode_rgb
from karat_scale.errors import DataError, RecipeError

MEND = "correct data.path or the names below it"


class CocoSplit:
    """Images with their objects. Samples are numbered 0 .. len - 1.

    Args:
        root: the set's directory.
        images: the images' directory below it.
        annotations: the JSON file below it.
        only_with_objects: leave out images without an object that can be learned: one that is no crowd and has an area.

    Raises:
        DataError: a file is missing, is not what it should be, or nothing is left.
        RecipeError: pycocotools is not installed.
    """

    def __init__(self, root: str, images: str, annotations: str, only_with_objects: bool) -> None:
        self.file = Path(root).expanduser() / annotations
        self._images = Path(root).expanduser() / images
        self.index = _read(self.file)
        categories = sorted(self.index.cats)
        self._labels = {category: label for label, category in enumerate(categories, start=1)}
        self.classes = tuple(str(self.index.cats[category].get("name", category)) for category in categories)
        """Names in the order of the labels 1, 2, ...: that of the category ids."""
        self.category_ids = tuple(categories)
        self.image_ids = [
            image for image in sorted(self.index.imgs) if not only_with_objects or any(self._learnable(image))
        ]
        if not self.image_ids:
            raise DataError(f"{self.file} has no image{' with objects' if only_with_objects else ''}; {MEND}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_of(self, sample: int) -> Path:
        """The image's file."""
        return self._images / str(self.index.imgs[self.image_ids[sample]]["file_name"])

    def read(self, sample: int) -> Image.Image:
        """The image in RGB.

        Raises:
            DataError: it is missing, cannot be decoded, or is of another size than the annotations say.
        """
        path, about = self.file_of(sample), self.index.imgs[self.image_ids[sample]]
        try:
            image = decode_rgb(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {MEND}") from error
        except UndecodableImageError as error:
            raise DataError(f"{path} cannot be decoded: {error}; put a whole copy there") from error
        if image.size != (about["width"], about["height"]):
            raise DataError(
                f"{path} is {image.width} x {image.height}, but {self.file.name} says {about['width']} x "
                f"{about['height']}; put the image there that was annotated"
            )
        return image

    def objects(self, sample: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Labels [n] from 1, and masks [n, H, W] of 0 and 1 at the image's size, of the objects that can be learned.

        Raises:
            DataError: an annotation has no segmentation that pycocotools can read.
        """
        image = self.image_ids[sample]
        about = self.index.imgs[image]
        labels, masks = [], [np.zeros((0, about["height"], about["width"]), np.uint8)]
        for annotation in self._learnable(image):
            try:
                masks.append(self.index.annToMask(annotation)[None])
                labels.append(self._labels[annotation["category_id"]])
            except Exception as error:  # pycocotools asserts, indexes and casts
                raise DataError(
                    f"{self.file}: annotation {annotation.get('id')} has no category or segmentation that can be read: "
                    f"{type(error).__name__}: {error}; correct it"
                ) from error
        return np.array(labels, np.int64), np.concatenate(masks)

    def _learnable(self, image: int) -> list[dict[str, Any]]:
        return [
            annotation
            for annotation in self.index.imgToAnns.get(image, ())
            if not annotation.get("iscrowd") and annotation.get("area", 1) > 0
        ]


def check_classes(split: CocoSplit, num_classes: int) -> None:
    """Raises DataError where the categories are not as many as the model's classes."""
    if len(split.classes) != num_classes:
        raise DataError(
            f"{split.file} has {len(split.classes)} categories, but model.num_classes = {num_classes}; "
            f"set model.num_classes={len(split.classes)}"
        )


def require_pycocotools() -> None:
    """Raises RecipeError with the command that installs it, where it is not."""
    try:
        import pycocotools.coco  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"karat detect needs pycocotools ({error}); install the extra: pip install 'karat-scale[detection]'"
        ) from error


def _read(file: Path) -> Any:
    """pycocotools' index of an annotation file."""
    require_pycocotools()
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            index = COCO(str(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {MEND}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not JSON: {error}; put a whole copy there") from error
    except (AssertionError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not in COCO's format: {type(error).__name__}: {error}; {MEND}") from error
    missing = [key for key in ("images", "annotations", "categories") if not index.dataset.get(key)]
    if missing:
        raise DataError(f"{file} is not in COCO's format for instances: it has no {missing[0]}; {MEND}")
    return index
