"""Batches from indexed WebDataset shards, by Pillow and torch's DataLoader workers.

webdataset's own reader streams shards and cannot keep an exact order, so its format is read by index.
"""

import weakref
from collections.abc import Iterable, Iterator

from karat_scale.data.assemble import EvalAssembler, TrainAssembler
from karat_scale.data.augment import EvalTransform, TrainTransform
from karat_scale.data.batch import Batch
from karat_scale.data.loader import MakesBatches, OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards import ShardSplit
from karat_scale.recipe import AugmentConfig, DataConfig


class WebDatasetBackend:
    """The `webdataset` backend; see Backend. Opening raises DataError when the shards are not right."""

    def __init__(self, data: DataConfig, augment: AugmentConfig, image_size: int, num_classes: int, seed: int) -> None:
        self._data = data
        self._train = ShardSplit(data.path, data.train_split, num_classes, data.verify)
        self._val = ShardSplit(data.path, data.val_split, num_classes, data.verify)
        self._make_train = TrainAssembler(
            self._train, image_size, data.on_bad_sample, TrainTransform(augment, image_size), seed
        )
        self._make_val = EvalAssembler(self._val, image_size, data.on_bad_sample, EvalTransform(augment, image_size))
        self._loaders: weakref.WeakSet[OrderedLoader] = weakref.WeakSet()

    @property
    def num_train(self) -> int:
        return len(self._train)

    @property
    def num_val(self) -> int:
        return len(self._val)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._train.classes

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_train, slices)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_val, slices)

    def _load(self, make: MakesBatches, slices: Iterable[BatchSlice]) -> OrderedLoader:
        loader = OrderedLoader(make, slices, self._data.workers, self._data.prefetch)
        self._loaders.add(loader)
        return loader

    def close(self) -> None:
        for loader in list(self._loaders):
            loader.close()
        self._train.close()
        self._val.close()
