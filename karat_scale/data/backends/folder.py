"""Batches from an ImageFolder, without any preparation: train/<class>/<image> and val/<class>/<image>."""

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.formats.folder import FolderSplit
from karat_scale.recipe import AugmentConfig, DataConfig


def open_folder(data: DataConfig, augment: AugmentConfig, image_size: int, num_classes: int, seed: int) -> ImageBackend:
    """The `folder` backend. Raises DataError if the folders are not right."""
    train = FolderSplit(data.path, data.train_split, num_classes)
    val = FolderSplit(data.path, data.val_split, num_classes, train.classes)
    return ImageBackend(train, val, data, augment, image_size, seed)
