"""All files of each sample of indexed shards: captions, labels and whatever else is beside the image, by suffix."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from karat_scale.data.indexing.samples import LabelRule
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import scan_members
from karat_scale.foundation.errors import DataError


class SampleFiles:
    """The samples of a split as a map-style dataset, for `ExactLoader`: decode what you need in its `transform`.

    A sample is a dict: its members' bytes by their suffix, such as "jpg" and "txt"; "__key__", its name in the tar; and
    "__label__", its class. The members of a sample must follow each other in the tar, as everywhere in WebDataset.

    Args:
        path: of shards, or of the index of tars, also at a URL.
        split: the name of the split.

    Raises:
        DataError: there are no such samples. Also by `[]`, where a tar has changed.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self._split = ShardSplit(path, split, sys.maxsize, remote=RemoteUse())

    def __len__(self) -> int:
        return len(self._split)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels."""
        return self._split.classes

    @property
    def identity(self) -> object:
        """What a loader's state says of the data; equal for copies of them."""
        return self._split.identity

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        key, shard = self._split.locate(sample_id)
        found = _members(self._split.around(sample_id), shard)
        files = {suffix: content for name, suffix, content in found if name == key}
        if self._split.read(sample_id) not in files.values():
            raise DataError(f"{shard}: the members of sample {key} do not follow each other; make shards of them")
        return {"__key__": key, "__label__": int(self._split.labels[sample_id]), **files}


def _members(part: bytes, what: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, suffix and content of the members in a part of a tar, which may end with a header."""
    rule = LabelRule("cls")
    for member in scan_members(lambda at, size: part[at : at + size], sys.maxsize, what):
        end = member.offset + member.size
        if end > len(part):  # the header of the next image
            return
        key, suffix = rule.split_name(member.name)
        if member.kind == "file" and key:
            yield key, suffix, part[member.offset : end]
