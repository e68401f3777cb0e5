"""The interface of all backends, and what they are asked for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.readahead import NO_BLOCKS, Blocks
from karat_scale.recipe import AugmentConfig, DataConfig, Recipe


@dataclass(frozen=True)
class ImageSpec:
    """The images that a run asks a backend for: square, `image_size` pixels wide, of at most `num_classes` classes."""

    data: DataConfig
    augment: AugmentConfig
    image_size: int
    num_classes: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> "ImageSpec":
        """Return what a recipe asks for."""
        return cls(recipe.data, recipe.augment, recipe.model.image_size, recipe.model.num_classes, recipe.run.seed)

    @property
    def readahead(self) -> Blocks:
        """The blocks that are read at once, for `order: block`."""
        return Blocks(self.data.block_samples, self.data.window_blocks) if self.data.order == "block" else NO_BLOCKS


class Backend(Protocol):
    """A source of whole batches. The interface is per batch, since FFCV and DALI decode and augment by batch.

    Batches come in the order of the slices, and depend only on slice, recipe and seed.
    """

    @property
    def num_train(self) -> int:
        """Number of training samples."""

    @property
    def num_val(self) -> int:
        """Number of evaluation samples."""

    @property
    def num_classes(self) -> int:
        """Number of classes in the data; the model may have more."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return augmented batches. Loading starts at once and runs ahead of the reader."""

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Return centre-cropped batches. Ids of PADDING give zeros with valid = False."""

    def close(self) -> None:
        """Stop workers and close files. Iterators handed out before yield no more."""
