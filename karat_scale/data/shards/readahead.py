"""Read whole blocks of samples ahead, for an order that uses few blocks at a time."""

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Blocks(NamedTuple):
    """An order that uses few blocks at a time. samples: of each block; 0 for another order. window: so many blocks."""

    samples: int = 0
    window: int = 0


NO_BLOCKS = Blocks()


class Readahead:
    """Asks the system to read each block when one of its samples is read, once in an epoch.

    It remembers little more than a window: a part of a block at its start, and blocks that files cut, are more parts.
    So it has forgotten a block when the next epoch comes to it.
    offsets, sizes: int64 [samples], the position of each sample in its file, in bytes.
    """

    def __init__(self, blocks: Blocks, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> None:
        self._block_samples, self._window = blocks
        self._offsets, self._sizes = offsets, sizes
        self._remembered = self._window + self._window // 2 + 2
        self._asked: OrderedDict[int, None] = OrderedDict()

    def ask(self, file: int, sample_id: int, start: int, stop: int) -> None:
        """Request the part of a sample's block that is in the open `file`, whose samples are start .. stop - 1."""
        if not self._block_samples:
            return
        block = sample_id // self._block_samples
        # Blocks and files are both in order, so the first sample identifies the part.
        first = max(block * self._block_samples, start)
        if first in self._asked:
            return
        self._asked[first] = None
        if len(self._asked) > self._remembered:
            self._asked.popitem(last=False)
        last = min((block + 1) * self._block_samples, stop) - 1
        begin, end = int(self._offsets[first]), int(self._offsets[last] + self._sizes[last])
        if hasattr(os, "posix_fadvise"):  # not on every system, and only a hint
            os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)
