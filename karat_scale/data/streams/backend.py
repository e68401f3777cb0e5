"""The `webdataset` backend with `data.order: stream`: training batches of tars without an index."""

from collections.abc import Iterable, Iterator
from functools import cached_property

from karat_scale.data.backends.images import ImageBackend
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import make_decoder
from karat_scale.data.loading.base import ImageSpec
from karat_scale.data.plan import BatchSlice
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.use import RemoteUse
from karat_scale.data.streams.assemble import StreamAssembler
from karat_scale.data.streams.samples import StreamSource


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
