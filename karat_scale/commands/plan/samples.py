"""How many training images a recipe's data has, read from its records alone: no image, decoder or hash is touched."""

import sys

from karat_scale.data.shards.beton import beton_path, read_record
from karat_scale.data.shards.checks import must_answer
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shard_format import chosen_splits, dataset_directory, read_dataset_record, staged_copy
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig

IMAGENET = 1_281_167
# Seconds for data at a URL, which this machine may not reach.
_PATIENCE = 10.0


def count_samples(data: DataConfig) -> tuple[int, str]:
    """Training images, and where the number comes from; ImageNet-1K's where the recipe's data is not here."""
    try:
        return _recorded(data), "of the recipe's data"
    except DataError:
        return IMAGENET, "ImageNet-1K's, since the recipe's data is not here"


def _recorded(data: DataConfig) -> int:
    """The number in the records of the data's format; a folder of images is listed. Raises DataError."""
    if data.row.files is None:
        return data.synthetic_samples
    if data.stream_samples is not None:
        return data.stream_samples
    directory = dataset_directory(staged_copy(data.path) or data.path)
    if isinstance(directory, str):
        record = read_dataset_record(directory, min(data.timeout, _PATIENCE))
        (split,) = chosen_splits(directory, record, data.train_split).values()
        return split.samples
    must_answer(directory, data.timeout)
    if data.row.files is Files.IMAGES:
        return len(FolderSplit(directory, data.train_split, num_classes=sys.maxsize))
    if data.row.files is Files.BETONS:
        return read_record(beton_path(directory, data.train_split)).samples
    (split,) = chosen_splits(directory, read_dataset_record(directory), data.train_split).values()
    return split.samples
