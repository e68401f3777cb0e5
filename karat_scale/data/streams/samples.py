"""The samples of a lane from a given place on, shuffled and without end.

The webdataset library reads the samples of each shard and groups them.
"""

import random
from collections.abc import Callable, Generator, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from webdataset.filters import shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander

from karat_scale.data.indexing.samples import IMAGES, LabelRule, NoLabelError, number_of
from karat_scale.data.order import shuffle_seed
from karat_scale.data.plan import LanePlace
from karat_scale.data.shards.streamed import StreamShards
from karat_scale.data.streams.shard_bytes import ShardBytes, ShardError, opened
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError
from karat_scale.recipe import DataConfig

DOUBLED = "__doubled__"


def read_tar(url: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as the library makes them, in the shard's order.

    A sample in which a suffix occurs twice has DOUBLED, and the first of the two.

    Args:
        url: what to open.
        name: what messages call it.

    Raises:
        DataError: the shard cannot be opened, is damaged or ends early, or its command fails.
    """
    count = 0
    try:
        with opened(url) as shard:
            for sample in _samples(shard):
                count += 1
                yield sample
            shard.check_end()
    except ShardError as error:
        after = f" after {plural(count, 'sample')}" if count else ""
        text = f"data.stream: {name} {error.reason}{after}; put it right, or take it out of data.stream"
        raise DataError(text) from None


def _samples(shard: ShardBytes) -> Iterator[dict[str, Any]]:
    doubled = False

    def note(error: Exception) -> bool:
        nonlocal doubled
        if not isinstance(error, ValueError):
            raise error
        doubled = True
        return True  # go on

    try:
        for sample in group_by_keys(tar_file_expander([{"url": "", "stream": shard}]), handler=note):
            yield {**sample, DOUBLED: True} if doubled else sample
            doubled = False
    except ShardError:
        raise
    except Exception as error:  # of tarfile, or of a header's text
        reason = str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
        raise shard.explained("is empty" if shard.is_empty else f"is damaged or ends early ({reason})") from error


# Samples that the buffer must have before one is taken from it.
_INITIAL = 100


class StreamSample(NamedTuple):
    """A sample as it is stored. problem: why it cannot be used; its image and label say nothing then."""

    id: int
    key: str
    image: bytes
    label: int
    problem: str = ""


class InLane(NamedTuple):
    """A sample of a lane. shard: its number. place: of the lane after it."""

    sample: StreamSample
    cycle: int
    shard: int
    place: LanePlace


class StreamSource:
    """The shards of a recipe's stream, and how its samples say their class.

    classes: the names of the classes, in the order of the labels.
    """

    def __init__(self, data: DataConfig, seed: int, classes: tuple[str, ...]) -> None:
        self.shards = StreamShards(data, seed)
        self._seed, self._buffer = seed, data.stream_buffer
        self._rule = LabelRule.parse(data.stream_label)
        self._numbers = {name: number for number, name in enumerate(classes)}

    def lane(self, place: LanePlace, lanes: int, begins: Callable[[int], None]) -> Generator[InLane, None, None]:
        """Yield the samples of a lane from a place on, without end.

        The order in a shard is a function of the seed and the shard's entry in the endless list. So to go on inside a
        shard, its samples are read and shuffled once more from its start, and those that were used are dropped.

        Args:
            lanes: of all ranks.
            begins: is told the number of each shard before it is opened.

        Raises:
            DataError: a shard cannot be read, is not whole or has no sample.
        """
        entry, used = place
        while True:
            shard = self.shards.at(entry)
            begins(shard)
            mix = shuffle(self._buffer, initial=_INITIAL, rng=random.Random(shuffle_seed(self._seed, entry)))
            samples: Iterator[StreamSample] = mix(self._samples(shard))
            there = sum(1 for _ in islice(samples, used))
            if there < used:
                name = self._name(shard)
                raise DataError(f"data.stream: {name} has {plural(there, 'sample')}, and the run has used {used}")
            for sample in samples:
                used += 1
                yield InLane(sample, entry // len(self.shards), shard, LanePlace(entry, used))
            if not used:
                raise DataError(f"data.stream: {self._name(shard)} has no sample; take it out of data.stream")
            entry, used = entry + lanes, 0

    def _name(self, shard: int) -> str:
        return self.shards.names[shard]

    def _samples(self, shard: int) -> Iterator[StreamSample]:
        name = self._name(shard)
        for members in read_tar(self.shards.urls[shard], name):
            yield self._sample(members, name)

    def _sample(self, members: Mapping[str, Any], shard: str) -> StreamSample:
        key = members["__key__"]
        number = _stable_id(shard, key)
        suffix = next((suffix for suffix in members if suffix in IMAGES), "")
        try:
            if not members.get(suffix):
                raise NoLabelError("the image is empty" if suffix else f"no image ({', '.join(IMAGES)})")
            if DOUBLED in members:
                raise NoLabelError("a suffix occurs twice")
            return StreamSample(number, key, members[suffix], self._label(members, f"{key}.{suffix}"))
        except NoLabelError as error:
            return StreamSample(number, key, b"", 0, str(error))

    def _label(self, members: Mapping[str, Any], image: str) -> int:
        kind = self._rule.kind
        if kind != "path" and kind not in members:
            raise NoLabelError(f"no label: .{kind} is missing")
        label = self._rule.label(image, b"" if kind == "path" else members[kind])
        try:
            number = number_of(label, self._numbers)
        except KeyError:
            raise NoLabelError(f"its class {str(label)[:60]!r} is none of data.path's {len(self._numbers)}") from None
        if not 0 <= number < len(self._numbers):
            raise NoLabelError(f"its label is {number}, but data.path has {len(self._numbers)} classes")
        return number


def _stable_id(shard: str, key: str) -> int:
    """Return a number below 2^63 that tells a sample from others."""
    digest = blake2b(f"{shard}\0{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
