"""Common code of backends with two sources of encoded images."""

import weakref
from typing import Protocol, TypeVar

from karat_scale.data.assemble import ImageSource


class Closable(Protocol):
    """Batches that are made ahead, by a thread or process that must be stopped."""

    def close(self) -> None:
        """Stop making batches."""


Batches = TypeVar("Batches", bound=Closable)


class SplitBackend:
    """The counts and names of a training and a validation source, and closing of all batches. See Backend."""

    def __init__(self, train: ImageSource, val: ImageSource) -> None:
        self._train, self._val = train, val
        self._handed_out: weakref.WeakSet[Closable] = weakref.WeakSet()

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

    def _handing_out(self, batches: Batches) -> Batches:
        """Remember batches that `close` must stop."""
        self._handed_out.add(batches)
        return batches

    def close(self) -> None:
        for batches in list(self._handed_out):
            batches.close()
        self._train.close()
        self._val.close()
