"""The interface of a source of images, for the scripts that write shards, betons or indexes."""

import hashlib
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sources.keys import unique_keys


class UnreadableSampleError(Exception):
    """A source image that cannot be used; the message is the reason."""


class Source(Protocol):
    """One split of a source, in a fixed order. Files that are known not to be images are in `skipped`.

    facts: additional facts about the source for dataset.json.
    """

    classes: list[str]
    skipped: list[tuple[str, str]]
    facts: dict[str, Any]

    def __len__(self) -> int: ...

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """The class number of each sample."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample, exact or approximate."""

    def name(self, index: int) -> str:
        """Return the place of sample `index` in the source, for reports."""

    def key(self, index: int) -> str:
        """Return the name of sample `index` in a shard, without suffix."""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises UnreadableSampleError."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the source does."""


# Splits by name, each opened with the classes that its labels number.
Openers = dict[str, Callable[[list[str]], Source]]


class ListedSource:
    """Common code of sources of image files with paths: the same files give the same shards from any of them."""

    def __init__(self, classes: list[str], paths: list[str], labels: list[int]) -> None:
        self.classes = classes
        self.facts: dict[str, Any] = {}
        self.labels: npt.NDArray[np.int32] = np.array(labels, dtype=np.int32)
        self._paths = paths
        self._keys = unique_keys(paths)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def key(self, index: int) -> str:
        return self._keys[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, size, label in zip(self._paths, self.sizes, self.labels, strict=True):
            digest.update(os.fsencode(path) + f"\0{size}\0{label}\n".encode())
        return digest.hexdigest()
