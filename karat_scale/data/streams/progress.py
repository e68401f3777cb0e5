"""Where the lanes of one rank stand after the last batch that was trained on, and how a checkpoint says it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice, LanePlace
from karat_scale.foundation.console import plural

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
