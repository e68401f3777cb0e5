"""The `webdataset` backend with `data.order: stream`: training batches of tars without an index.

A batch is made from the next samples of a lane: they are decoded, transformed and collected. The progress of a rank is
where its lanes stand after the last batch that was trained on. A checkpoint holds it.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Annotated

from pydantic import Field

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.batch import Batch, Streamed
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.loading.assemble import MAX_REPLACEMENTS, Assembler, ImageSpec, Sample
from karat_scale.data.loading.workers import lead_own_commands
from karat_scale.data.plan import BatchSlice, LanePlace, TrainPlan
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.streams.samples import InLane, StreamShards, StreamSource
from karat_scale.foundation.console import plural


class UnusableSampleError(UndecodableImageError):
    """A sample of a stream lacks an image or a right label; the message is the reason."""

    done = "used"


class StreamAssembler(Assembler):
    """Makes training batches of a stream. Each worker reads its own lane; its next sample replaces a bad one."""

    def __init__(self, source: StreamSource, spec: ImageSpec, decoder: Decoder) -> None:
        super().__init__(spec, decoder, training=True)
        self._source = source
        self._lanes: dict[int, Generator[InLane, None, None]] = {}
        self._used: list[InLane] = []  # the last candidate of each row of the batch

    def _candidates(self, part: BatchSlice) -> Iterator[Iterator[Sample]]:
        if part.place is not None or part.lane not in self._lanes:
            lead_own_commands()
            place = part.place or LanePlace(part.lane)
            self._lanes[part.lane] = self._source.lane(place, part.lanes, self._whereabouts.tell)
        return (self._next_of(self._lanes[part.lane], row) for row in range(len(part.sample_ids)))

    def _next_of(self, lane: Iterator[InLane], row: int) -> Iterator[Sample]:
        for one in islice(lane, MAX_REPLACEMENTS):
            self._used[row:] = [one]
            locate = partial(self._locate, one)
            yield Sample(one.sample.id, one.sample.label, one.cycle, partial(_image_of, one), locate)

    def _locate(self, one: InLane) -> tuple[str, str]:
        return one.sample.key, self._source.shards.names[one.shard]

    def _streamed(self, part: BatchSlice) -> Streamed:
        return Streamed(part.lane, self._used[-1].place, tuple(map(self._locate, self._used)))

    def whereabouts(self, workers: int) -> str:
        return self._whereabouts.told(workers, lambda i: f"reads {self._source.shards.names[i]}")

    def close(self) -> None:
        """Stop the commands of lanes that this process itself reads."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()


def _image_of(one: InLane) -> bytes:
    if one.sample.problem:
        raise UnusableSampleError(one.sample.problem)
    return one.sample.image


class StreamBackend(ImageBackend):
    """Trains on a stream, and evaluates on an indexed split, which also names the classes. See Backend."""

    def __init__(self, spec: ImageSpec) -> None:
        data = spec.data
        remote = RemoteUse.of(data, training=False)
        val = ShardSplit(data.path, data.val_split, spec.num_classes, data.verify, remote=remote)
        super().__init__(val, val, spec)
        self.num_train = data.stream_samples or 0

    def plan(
        self, global_batch: int, micro_batch: int, rank: int, world_size: int, lanes: int | None = None
    ) -> TrainPlan:
        plan = super().plan(global_batch, micro_batch, rank, world_size, lanes)
        StreamShards(self._data, self.spec.seed).check_lanes(world_size, plan.lanes)
        return plan

    @cached_property
    def _make_stream(self) -> StreamAssembler:  # not before it is used: an evaluation needs none of it
        source = StreamSource(self._data, self.spec.seed, self.classes)
        decoder = make_decoder(self._data, self.spec.augment.interpolation)
        return StreamAssembler(source, self.spec, decoder)

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_stream, slices)

    def close(self) -> None:
        super().close()
        if "_make_stream" in self.__dict__:
            self._make_stream.close()


Count = Annotated[int, Field(ge=0, lt=2**40)]


@dataclass
class StreamState:
    """What a checkpoint says of a stream. shards: their number. lanes: of all ranks, the entry and the used samples."""

    shards: Annotated[int, Field(ge=1)]
    lanes: Annotated[list[tuple[Count, Count]], Field(min_length=1)]


class StreamProgress:
    """The places of this rank's lanes.

    lanes: of each rank. shards: the number of the stream's shards.
    """

    def __init__(self, rank: int, ranks: int, lanes: int, shards: int) -> None:
        self._mine = range(rank * lanes, (rank + 1) * lanes)
        self._all, self._shards = ranks * lanes, shards
        self.places = {lane: LanePlace(lane) for lane in self._mine}

    def from_here(self, slices: Iterable[BatchSlice]) -> Iterator[BatchSlice]:
        """Yield the slices; the first one of each lane says where it stands."""
        waiting = dict(self.places)
        for part in slices:
            yield replace(part, place=waiting.pop(part.lane, None))

    def note(self, batch: Batch) -> None:
        """A batch was trained on."""
        if batch.streamed is not None:
            self.places[batch.streamed.lane] = batch.streamed.place

    def mine(self) -> list[LanePlace]:
        """Return the places of this rank's lanes in order."""
        return [self.places[lane] for lane in self._mine]

    def state(self, places: Iterable[LanePlace]) -> StreamState:
        """Return what a checkpoint says, given the places of all ranks."""
        return StreamState(self._shards, [(place.entry, place.used) for place in places])

    def resume(self, saved: StreamState | None) -> str:
        """Go on where a checkpoint stands; returns why that cannot be done exactly, and what happens instead."""
        if saved is None:
            return ""
        if (saved.shards, len(saved.lanes)) == (self._shards, self._all):
            self.places = {lane: LanePlace(*saved.lanes[lane]) for lane in self._mine}
            return ""
        cycle = max(entry for entry, _ in saved.lanes) // saved.shards + 1
        self.places = {lane: LanePlace(cycle * self._shards + lane) for lane in self._mine}
        now, then = _described(self._shards, self._all), _described(saved.shards, len(saved.lanes))
        return f"the stream now has {now}, and {then} in the checkpoint: each lane begins at cycle {cycle}"


def _described(shards: int, lanes: int) -> str:
    return f"{plural(shards, 'tar')} and {plural(lanes, 'lane')} (ranks x data workers)"
