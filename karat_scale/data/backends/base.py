"""The interface of all backends."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice


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
