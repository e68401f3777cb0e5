"""Batches of encoded images from files, decoded and augmented by torch's DataLoader workers."""

from collections.abc import Iterable, Iterator

from karat_scale.data.assemble import EvalAssembler, ImageSource, TrainAssembler
from karat_scale.data.augmentation.augment import EvalTransform, TrainTransform
from karat_scale.data.backends.splits import SplitBackend
from karat_scale.data.batch import Batch
from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.loader import MakesBatches, OrderedLoader
from karat_scale.data.plan import BatchSlice
from karat_scale.recipe import AugmentConfig, DataConfig


class ImageBackend(SplitBackend):
    """The `folder`, `webdataset` and `ffcv` backends: two sources of encoded images, one per split. See Backend.

    decoder: instead of the one in `data.decoder`.
    """

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource,
        data: DataConfig,
        augment: AugmentConfig,
        image_size: int,
        seed: int,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__(train, val)
        self._data = data
        decoder = decoder or make_decoder(data, augment.interpolation)
        self._make_train = TrainAssembler(
            train, image_size, data.on_bad_sample, decoder, TrainTransform(augment, image_size), seed
        )
        self._make_val = EvalAssembler(val, image_size, data.on_bad_sample, decoder, EvalTransform(augment, image_size))

    def train_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_train, slices)

    def eval_batches(self, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
        return self._load(self._make_val, slices)

    def _load(self, make: MakesBatches, slices: Iterable[BatchSlice]) -> OrderedLoader:
        loader = OrderedLoader(make, slices, self._data.workers, self._data.prefetch, self._data.timeout)
        return self._handing_out(loader)
