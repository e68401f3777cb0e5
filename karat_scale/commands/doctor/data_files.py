"""The files of a recipe's data: their number and size, and the size of an image in them."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.data.order import epoch_order
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.data.shards.shard_format import dataset_directory, read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.use import RemoteUse
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import Files
from karat_scale.recipe import DataConfig, Recipe

SAMPLED_IMAGES = 256


@dataclass(frozen=True)
class DataFiles:
    """paths: some files that hold training images; none for data at a URL. total_bytes: of both splits.

    image_bytes: of a training image.
    """

    paths: tuple[Path, ...]
    total_bytes: int
    image_bytes: float


def sampled_ids(num_train: int, seed: int) -> npt.NDArray[np.int64]:
    """Return some random training samples, int64 [at most SAMPLED_IMAGES]."""
    return epoch_order(seed, 0, num_train)[:SAMPLED_IMAGES]


def find_data_files(recipe: Recipe, num_train: int) -> DataFiles | None:
    """Return the files of the recipe's data, or None if it has none or a stream. No image is read. Raises DataError."""
    data = recipe.data
    if data.row.files is None or data.is_stream:
        return None
    if data.row.files is Files.BETONS:
        return _betons(data, num_train)
    with closing(_open_split(recipe)) as split:
        files = dict.fromkeys(split.file_of(int(i)) for i in sampled_ids(num_train, recipe.run.seed))
        paths = () if isinstance(split, ShardSplit) and split.ahead else tuple(map(Path, files))
        if isinstance(split, FolderSplit):
            size = sum(path.stat().st_size for path in paths) / len(paths)
            val = FolderSplit(data.path, data.val_split, recipe.model.num_classes, split.classes)
            return DataFiles(paths, round(size * (num_train + len(val))), size)
    splits = read_dataset_record(dataset_directory(data.path), data.timeout).splits
    bytes_of = {name: sum(shard.bytes for shard in split.shards) for name, split in splits.items()}
    total = sum(bytes_of[name] for name in {data.train_split, data.val_split})
    return DataFiles(paths, total, bytes_of[data.train_split] / num_train)


def read_into_page_cache(recipe: Recipe, ids: npt.NDArray[np.int64]) -> None:
    """Read these training images, so that timing the decoder does not time the disk. Raises DataError."""
    if recipe.data.row.files in (Files.IMAGES, Files.SHARDS) and not recipe.data.is_stream:
        with closing(_open_split(recipe)) as split:
            if isinstance(split, ShardSplit):
                split.prepare(ids.tolist())
            for sample_id in ids:
                split.read(int(sample_id))


def _open_split(recipe: Recipe) -> ShardSplit | FolderSplit:
    data, num_classes = recipe.data, recipe.model.num_classes
    if data.row.files is Files.IMAGES:
        return FolderSplit(data.path, data.train_split, num_classes)
    return ShardSplit(data.path, data.train_split, num_classes, remote=RemoteUse.of(data, training=True))


def _betons(data: DataConfig, num_train: int) -> DataFiles:
    directory = Path(data.path).expanduser()
    train, val = (directory / f"{split}.beton" for split in (data.train_split, data.val_split))
    for path in (train, val):
        if not path.is_file():
            raise DataError(f"{path} is missing; make it with data_prep/make_ffcv.py")
    size = train.stat().st_size
    return DataFiles((train,), size + val.stat().st_size, size / num_train)
