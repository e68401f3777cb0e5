"""What every backend offers the trainer."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice


class Backend(Protocol):
    """A source of whole batches. FFCV and DALI decode and augment by batch, so the seam is here.

    Batches come in the order of the slices and depend on nothing but slice, recipe and seed.
    """

    @property
    def num_train(self) -> int:
        """Training samples."""

    @property
    def num_val(self) -> int:
        """Evaluation samples."""

    @property
    def num_classes(self) -> int:
        """Classes in the data; the model may have more."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Augmented batches; loading starts at once and runs ahead of the reader."""

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        """Centre-cropped batches; ids of PADDING give zeros with valid = False."""

    def close(self) -> None:
        """End workers and give back files. Iterators handed out before yield no more."""
