"""Make a batch from the next samples of a lane: decode, transform, collect."""

from collections.abc import Generator, Iterator

import torch

from karat_scale.data.augmentation.augment import TrainTransform
from karat_scale.data.augmentation.draw import Draw
from karat_scale.data.batch import BadSample, Batch, Streamed
from karat_scale.data.decoders import Decoder
from karat_scale.data.decoders.decode import UndecodableImageError
from karat_scale.data.decoders.view import View
from karat_scale.data.loading.assemble import MAX_REPLACEMENTS, Pixels
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.loading.workers import Whereabouts, lead_own_commands
from karat_scale.data.order import sample_seed
from karat_scale.data.plan import BatchSlice, LanePlace
from karat_scale.data.streams.samples import InLane, StreamSource
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
