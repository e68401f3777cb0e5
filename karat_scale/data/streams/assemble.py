"""The `webdataset` backend with `data.order: stream`: training batches of tars without an index.

A batch is made from the next samples of a lane: they are decoded, transformed and collected. The progress of a rank is
where its lanes stand after the last batch that was trained on. A checkpoint holds it.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field

from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.batch import BadSample, Batch, Draw, Streamed
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View
from karat_scale.data.loading.assemble import MAX_REPLACEMENTS, ImageSpec, Pixels, Whereabouts, lead_own_commands
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import BatchSlice, LanePlace
from karat_scale.data.shards.cache import RemoteUse
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.streams.samples import InLane, StreamSource
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import DataError


class StreamAssembler:
    """Training batches of a stream, see MakesBatches. Each worker reads its own lane.

    If the recipe says skip, the next sample of the lane replaces one that cannot be used.
    """

    def __init__(self, source: StreamSource, spec: ImageSpec, decoder: Decoder) -> None:
        self._source, self._decoder = source, decoder
        self._image_size, self._seed = spec.image_size, spec.seed
        self._stop = spec.data.on_bad_sample == "stop"
        self._transform = TrainTransform(spec.augment, spec.image_size)
        self._whereabouts = Whereabouts()
        self._lanes: dict[int, Generator[InLane, None, None]] = {}

    def shape(self, part: BatchSlice) -> tuple[int, ...]:
        """Return the shape of the slice's images."""
        return len(part.sample_ids), 3, self._image_size, self._image_size

    def fill(self, part: BatchSlice, images: torch.Tensor) -> Batch:
        """Return the batch; its pixels are written to `images`."""
        lane = self._lane(part)
        pixels = images.numpy()
        bad: list[BadSample] = []
        found: list[InLane] = []
        draws: list[Draw] = []
        for row in range(len(part.sample_ids)):
            one, draw, view = self._next_readable(lane, bad)
            pixels[row] = self._transform.finish(view, draw)
            found.append(one)
            draws.append(draw)
        names = self._source.shards.names
        return Batch(
            images=images,
            labels=torch.tensor([one.sample.label for one in found], dtype=torch.int64),
            sample_ids=torch.tensor([one.sample.id for one in found], dtype=torch.int64),
            valid=torch.ones(len(found), dtype=torch.bool),
            bad=tuple(bad),
            draws=tuple(draws),
            epoch=part.epoch,
            batch=part.batch,
            streamed=Streamed(part.lane, found[-1].place, tuple((one.sample.key, names[one.shard]) for one in found)),
        )

    def _lane(self, part: BatchSlice) -> Iterator[InLane]:
        if part.place is not None or part.lane not in self._lanes:
            lead_own_commands()
            place = part.place or LanePlace(part.lane)
            self._lanes[part.lane] = self._source.lane(place, part.lanes, self._whereabouts.tell)
        return self._lanes[part.lane]

    def _next_readable(self, lane: Iterator[InLane], bad: list[BadSample]) -> tuple[InLane, Draw, Pixels]:
        draws: list[Draw] = []
        for _ in range(MAX_REPLACEMENTS):
            one = next(lane)

            def choose(width: int, height: int, one: InLane = one) -> View:
                draws.append(self._transform.draw(sample_seed(self._seed, one.cycle, one.sample.id), width, height))
                return self._transform.view(draws[-1])

            sample, shard = one.sample, self._source.shards.names[one.shard]
            if sample.problem:
                bad.append(BadSample(sample.id, sample.key, shard, sample.problem, "used"))
            else:
                try:
                    pixels = self._decoder.read(sample.image, choose)
                    return one, draws[-1], pixels
                except UndecodableImageError as error:
                    bad.append(BadSample(sample.id, sample.key, shard, str(error)))
            if self._stop:
                raise DataError(f"{bad[-1]}; set data.on_bad_sample=skip, or remove the sample from the tar")
        raise DataError(f"{bad[-1]}, nor can the {MAX_REPLACEMENTS - 1} before it in its lane; look into data.stream")

    def whereabouts(self, workers: int) -> str:
        """Return each worker's shard, for the message of a loader that gets no batch."""
        at = [(worker, self._whereabouts.of(worker)) for worker in range(workers)]
        told = [f"worker {worker} reads {self._source.shards.names[i]}" for worker, i in at if i is not None]
        return ", ".join(told) or "no worker had started"

    def close(self) -> None:
        """Stop the commands of lanes that this process itself reads."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()


class StreamBackend(ImageBackend):
    """Trains on a stream, and evaluates on an indexed split, which also names the classes. See Backend."""

    def __init__(self, spec: ImageSpec) -> None:
        data = spec.data
        remote = RemoteUse.of(data, training=False)
        val = ShardSplit(data.path, data.val_split, spec.num_classes, data.verify, remote=remote)
        super().__init__(val, val, spec)
        self._spec = spec

    @property
    def num_train(self) -> int:
        return self._data.stream_samples or 0

    @cached_property
    def _make_stream(self) -> StreamAssembler:  # not before it is used: an evaluation needs none of it
        source = StreamSource(self._data, self._spec.seed, self.classes)
        decoder = make_decoder(self._data, self._spec.augment.interpolation)
        return StreamAssembler(source, self._spec, decoder)

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
