"""Ours and other libraries' loaders over the same JPEGs, each as its documentation shows it.

Each prepares what it reads, and then yields (epoch, ids, state) of its batches: `state()` is what a user can save to
resume with the next batch. Where a library has no such state, it is the epoch's number, and a resume starts that epoch
over. Each crops at random to 224 px, mirrors, and batches uint8; the label of an image is its id.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from karat_scale.commands.bench.data import decode_whole
from karat_scale.commands.measure.loading import AUGMENTS, SIZE
from karat_scale.data import ExactLoader
from karat_scale.data.shards.shard_format import DatasetRecord, SplitRecord, write_dataset_record
from karat_scale.data.shards.tars import EncodedSample, shard_name, write_shard
from karat_scale.foundation.tables import is_installed

# Of torchvision's 31 levels.
RANDAUGMENT_MAGNITUDE = 15
PER_SHARD = 64
SEED = 0

State = dict[str, Any]
Found = Iterator[tuple[int, Sequence[int], Callable[[], State]]]


@dataclass(frozen=True)
class Use:
    """How a loader is used. epochs: where it ends."""

    place: Path
    workers: int
    batch: int
    augment: str
    epochs: int


@dataclass(frozen=True)
class Peer:
    """A loader: what it needs installed, what it prepares of a folder of classes, and its batches from a state."""

    name: str
    library: str
    prepare: Callable[[Path, Path], object]
    batches: Callable[[Use, State], Found]
    augments: tuple[str, ...] = ("crop",)
    without_decoding: bool = False

    @property
    def lacks(self) -> str:
        """Why it cannot run; empty if it can."""
        return "" if is_installed(self.library) else f"{self.library} is not installed"


def encoded_of(folder: Path) -> list[bytes]:
    """Return the images of a folder in the order of their ids."""
    return [path.read_bytes() for path in sorted(folder.glob("train/*/*.jpg"))]


def transforms(augment: str, last: list[Any]) -> v2.Compose:
    """Return torchvision's transforms with the settings of ours."""
    ours = AUGMENTS[augment]
    interpolation = InterpolationMode(ours.interpolation)
    steps: list[Any] = [
        v2.RandomResizedCrop(SIZE, ours.scale, ours.ratio, interpolation=interpolation, antialias=True),
        v2.RandomHorizontalFlip(ours.hflip),
    ]
    if ours.randaugment:
        steps.append(v2.RandAugment(2, RANDAUGMENT_MAGNITUDE, interpolation=interpolation))
    if ours.color_jitter:
        steps.append(v2.ColorJitter(*3 * [ours.color_jitter]))
    return v2.Compose([*steps, *last])


def decoded(data: bytes, augment: str = "crop") -> torch.Tensor:
    """Return an image, decoded and cropped by torchvision."""
    made: torch.Tensor = transforms(augment, [])(decode_whole(data))
    return made


# Whole decode: the base, without a loader.
def whole_decode(use: Use, state: State) -> Found:
    """Decode, and no more: with simplejpeg if it is there."""
    encoded = encoded_of(use.place)
    decode: Callable[[bytes], object] = decode_whole
    if find_spec("simplejpeg"):
        decode = partial(import_module("simplejpeg").decode_jpeg, strict=False)
    for epoch in range(state.get("epoch", 0), use.epochs):
        for start in range(0, len(encoded), use.batch):
            for data in encoded[start : start + use.batch]:
                decode(data)
            yield epoch, range(start, start + use.batch), lambda: {}


def use_folder(folder: Path, place: Path) -> None:
    """Use the folder as it is."""
    place.symlink_to(folder)


# Ours.
def ours(use: Use, state: State, decoder: str = "auto") -> Found:
    """Return the batches of ExactLoader."""
    loader = ExactLoader(
        use.place,
        global_batch=use.batch,
        seed=SEED,
        rank=0,
        world_size=1,
        workers=use.workers,
        epochs=use.epochs,
        augment=AUGMENTS[use.augment].changed(mix_prob=0.0, label_smoothing=0.0, erasing=0.0),
        dtype=torch.uint8,
        decoder=decoder,
    )
    if state:
        loader.load_state_dict(state)
    for epoch in range(loader.epoch, use.epochs):
        for _, ids in loader:
            yield epoch, ids.tolist(), loader.state_dict
    loader.close()


def prepare_shards(folder: Path, place: Path) -> None:
    """Write shards, as data_prep/make_webdataset.py does."""
    place.mkdir()
    samples = [EncodedSample(f"{i:06d}", "jpg", data, i) for i, data in enumerate(encoded_of(folder))]
    starts = range(0, len(samples), PER_SHARD)
    written = [write_shard(place, shard_name("train", i), samples[at : at + PER_SHARD]) for i, at in enumerate(starts)]
    split = SplitRecord(samples=len(samples), bytes=sum(shard.bytes for shard in written), shards=written)
    classes = [sample.key for sample in samples]
    write_dataset_record(place, DatasetRecord(classes=classes, splits={"train": split, "val": split}))


# torch's DataLoader, and torchdata's with a state.
def _decoded_file(path: str) -> torch.Tensor:
    return decode_whole(Path(path).read_bytes())


def torch_dataloader(use: Use, state: State, read: str = "Pillow", stateful: bool = False) -> Found:
    """Return the batches of ImageFolder through a DataLoader."""
    if read == "Pillow":
        dataset = ImageFolder(str(use.place / "train"), transforms(use.augment, [v2.PILToTensor()]))
    else:
        dataset = ImageFolder(str(use.place / "train"), transforms(use.augment, []), loader=_decoded_file)
    kind: Any = import_module("torchdata.stateful_dataloader").StatefulDataLoader if stateful else DataLoader
    torch.manual_seed(SEED)
    loader = kind(dataset, use.batch, shuffle=True, drop_last=True, num_workers=use.workers)
    if "loader" in state:
        loader.load_state_dict(state["loader"])
    for epoch in range(state.get("epoch", 0), use.epochs):
        for _, ids in loader:
            yield epoch, ids.tolist(), partial(_state, epoch, loader if stateful else None)


def _state(epoch: int, loader: Any) -> State:
    return {"epoch": epoch} if loader is None else {"epoch": epoch, "loader": loader.state_dict()}


# webdataset.
def webdataset(use: Use, state: State) -> Found:
    """Return the batches of a WebLoader over tars, mixed by a buffer."""
    wds = import_module("webdataset")
    tars = sorted(map(str, use.place.glob("*.tar")))
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True, seed=SEED)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(partial(decoded, augment=use.augment), int)
        .batched(use.batch, collation_fn=default_collate)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=min(use.workers, len(tars)))
    for epoch in range(state.get("epoch", 0), use.epochs):
        for _, ids in loader:
            yield epoch, ids.tolist(), partial(_state, epoch, None)


# litdata.
def _own_item(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "id": int(Path(path).parent.name)}


def prepare_litdata(folder: Path, place: Path) -> None:
    """Write litdata's chunks."""
    paths = sorted(map(str, folder.glob("train/*/*.jpg")))
    import_module("litdata").optimize(_own_item, paths, str(place), chunk_bytes="8MB", num_workers=1)


def litdata(use: Use, state: State) -> Found:
    """Return the batches of litdata's StreamingDataLoader."""
    library = import_module("litdata")

    class Images(library.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            found = super().__getitem__(index)
            return decoded(found["image"], use.augment), found["id"]

    dataset = Images(str(use.place), shuffle=True, drop_last=True, seed=SEED)
    loader = library.StreamingDataLoader(dataset, batch_size=use.batch, num_workers=use.workers)
    if "loader" in state:
        loader.load_state_dict(state["loader"])
    for epoch in range(state.get("epoch", 0), use.epochs):
        for _, ids in loader:
            yield epoch, ids.tolist(), partial(_state, epoch, loader)


# mosaicml-streaming.
def prepare_mds(folder: Path, place: Path) -> None:
    """Write MDS shards."""
    columns = {"image": "bytes", "id": "int"}
    with import_module("streaming").MDSWriter(out=str(place), columns=columns, size_limit="8mb") as out:
        for number, data in enumerate(encoded_of(folder)):
            out.write({"image": data, "id": number})


def mosaicml_streaming(use: Use, state: State) -> Found:
    """Return the batches of streaming's StreamingDataLoader."""
    library = import_module("streaming")
    library.base.util.clean_stale_shared_memory()

    class Images(library.StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: Any) -> tuple[torch.Tensor, int]:
            found = super().__getitem__(at)
            return decoded(found["image"], use.augment), found["id"]

    dataset = Images(local=str(use.place), shuffle=True, shuffle_seed=SEED, batch_size=use.batch)
    loader = library.StreamingDataLoader(dataset, batch_size=use.batch, num_workers=use.workers)
    if "loader" in state:
        loader.load_state_dict(state["loader"])
    for epoch in range(state.get("epoch", 0), use.epochs):
        for _, ids in loader:
            yield epoch, ids.tolist(), partial(_state, epoch, loader)


# FFCV.
class _Pixels:
    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return np.array(Image.open(io.BytesIO(self._encoded[index]))), index


def prepare_beton(folder: Path, place: Path, mode: str = "jpg") -> None:
    """Write a beton: JPEGs of quality 95, or pixels."""
    fields, writer = import_module("ffcv.fields"), import_module("ffcv.writer")
    kinds = {"image": fields.RGBImageField(write_mode=mode, jpeg_quality=95), "label": fields.IntField()}
    # A page must hold the pixels of the largest image; with FFCV's own 8 MiB its writer would hang.
    written = writer.DatasetWriter(str(place), kinds, page_size=1 << 26, num_workers=1)
    written.from_indexed_dataset(_Pixels(encoded_of(folder)))


@cache  # it compiles its pipeline for many seconds
def _ffcv_loader(place: Path, workers: int, batch: int) -> Any:
    loader, image, basic = (import_module(f"ffcv.{name}") for name in ("loader", "fields.rgb_image", "fields.basics"))
    kinds, crop = import_module("ffcv.transforms"), AUGMENTS["crop"]
    cropped = image.RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=crop.scale, ratio=crop.ratio)
    flip = kinds.RandomHorizontalFlip(crop.hflip)
    return loader.Loader(
        str(place),
        batch,
        num_workers=max(1, workers),
        order=loader.OrderOption.RANDOM,
        os_cache=True,
        seed=SEED,
        drop_last=True,
        pipelines={
            "image": [cropped, flip, kinds.ToTensor(), kinds.ToTorchImage()],
            "label": [basic.IntDecoder(), kinds.ToTensor(), kinds.Squeeze(-1)],
        },
    )


def ffcv(use: Use, state: State) -> Found:
    """Return the batches of FFCV's Loader, on as many threads as workers."""
    batches = _ffcv_loader(use.place, use.workers, use.batch)
    for epoch in range(state.get("epoch", 0), use.epochs):
        for _, ids in batches:
            yield epoch, ids.tolist(), partial(_state, epoch, None)


# DALI.
def dali(use: Use, state: State) -> Found:
    """Return the batches of DALI's pipeline on the CPU, on as many threads as workers."""
    library, fn, types = (import_module(f"nvidia.dali{name}") for name in ("", ".fn", ".types"))
    crop = AUGMENTS["crop"]
    pipeline = library.Pipeline(
        batch_size=use.batch,
        num_threads=max(1, use.workers),
        device_id=None,
        seed=SEED,
        enable_checkpointing=True,
        checkpoint=state.get("pipeline"),
    )
    with pipeline:
        root = str(use.place / "train")
        encoded, labels = fn.readers.file(file_root=root, shuffle_after_epoch=True, name="files")
        cropped = fn.decoders.image_random_crop(
            encoded, random_area=list(crop.scale), random_aspect_ratio=list(crop.ratio)
        )
        small = fn.resize(cropped, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR)
        pipeline.set_outputs(fn.flip(small, horizontal=fn.random.coin_flip(probability=crop.hflip)), labels)
    pipeline.build()
    length = pipeline.epoch_size("files") // use.batch
    for number in range(state.get("batches", 0), use.epochs * length):
        images, ids = pipeline.run()
        images.as_array()
        saved = partial(_dali_state, number + 1, pipeline)
        yield number // length, ids.as_array()[:, 0].tolist(), saved


def _dali_state(batches: int, pipeline: Any) -> State:
    return {"batches": batches, "pipeline": pipeline.checkpoint()}


# spdl.
def spdl(use: Use, state: State) -> Found:
    """Return the batches of spdl's pipeline, with as many threads as workers, and torchvision's decoder.

    Its own decoder needs FFmpeg.
    """
    pipelines = import_module("spdl.pipeline")
    paths = sorted(use.place.glob("train/*/*.jpg"))

    def load(number: int) -> tuple[torch.Tensor, int]:
        return decoded(paths[number].read_bytes(), use.augment), number

    threads = max(1, use.workers)
    for epoch in range(state.get("epoch", 0), use.epochs):
        order = np.random.default_rng(epoch).permutation(len(paths)).tolist()
        builder = pipelines.PipelineBuilder().add_source(order).pipe(load, concurrency=threads)
        pipeline = builder.aggregate(use.batch).pipe(default_collate).add_sink(2)
        with (running := pipeline.build(num_threads=threads, max_failures=0)).auto_stop():
            for _, ids in running.get_iterator():
                yield epoch, ids.tolist(), partial(_state, epoch, None)


# torchvision has RandAugment of images of Pillow with our interpolation.
BOTH = ("crop", "paper")
WHOLE = Peer("whole decode", "torch", use_folder, whole_decode, BOTH)
OURS = [
    Peer("ExactLoader, shards", "torch", prepare_shards, ours, BOTH),
    Peer("ExactLoader, folder", "torch", use_folder, ours, BOTH),
]
PEERS = [
    Peer("torch DataLoader, Pillow", "torch", use_folder, torch_dataloader, BOTH),
    Peer("torch DataLoader, torchvision's decoder", "torch", use_folder, partial(torch_dataloader, read="torch")),
    Peer(
        "torchdata StatefulDataLoader",
        "torchdata",
        use_folder,
        partial(torch_dataloader, read="torch", stateful=True),
    ),
    Peer("webdataset", "webdataset", prepare_shards, webdataset),
    Peer("litdata", "litdata", prepare_litdata, litdata),
    Peer("mosaicml-streaming", "streaming", prepare_mds, mosaicml_streaming),
    Peer("FFCV, JPEG of quality 95", "ffcv", prepare_beton, ffcv),
    Peer("FFCV, pixels", "ffcv", partial(prepare_beton, mode="raw"), ffcv, without_decoding=True),
    Peer("DALI, CPU", "nvidia.dali", use_folder, dali),
    Peer("spdl", "spdl.pipeline", use_folder, spdl),
]
