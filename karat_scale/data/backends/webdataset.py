"""Batches from indexed WebDataset shards.

webdataset's own reader streams shards and cannot keep an exact order, so shards are read through their index.
"""

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.formats.shards import ShardSplit
from karat_scale.recipe import AugmentConfig, DataConfig


def open_webdataset(
    data: DataConfig, augment: AugmentConfig, image_size: int, num_classes: int, seed: int
) -> ImageBackend:
    """The `webdataset` backend. Raises DataError if the shards are not right."""
    readahead = data.block_samples if data.order == "block" else 0
    train = ShardSplit(data.path, data.train_split, num_classes, data.verify, readahead)
    val = ShardSplit(data.path, data.val_split, num_classes, data.verify)
    return ImageBackend(train, val, data, augment, image_size, seed)
