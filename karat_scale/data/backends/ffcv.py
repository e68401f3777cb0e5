"""Batches from FFCV's betons, made by data_prep/make_ffcv.py."""

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.decoders.ffcv import FfcvDecoder
from karat_scale.data.formats.beton import BetonSplit
from karat_scale.errors import DataError
from karat_scale.recipe import AugmentConfig, DataConfig


def open_ffcv(data: DataConfig, augment: AugmentConfig, image_size: int, num_classes: int, seed: int) -> ImageBackend:
    """The `ffcv` backend.

    `data.decoder = auto` uses FFCV's decoder. If the recipe names another decoder, FFCV need not be
    installed. Raises DataError if the betons are not right, and RecipeError if FFCV is not installed.
    """
    decoder = FfcvDecoder(augment.interpolation, data.max_pixels) if data.decoder == "auto" else None
    readahead = data.block_samples if data.order == "block" else 0
    lends = decoder is not None
    train = BetonSplit(data.path, data.train_split, num_classes, data.verify, readahead, lends)
    val = BetonSplit(data.path, data.val_split, num_classes, data.verify, lends=lends)
    if train.classes != val.classes:
        raise DataError(f"{train.path} and {val.path} have different classes; make both from one source")
    return ImageBackend(train, val, data, augment, image_size, seed, decoder)
