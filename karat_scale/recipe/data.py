"""The `data` and `augment` sections of a recipe.

For a stream (`data.order: stream`), `data` also says how the tars are named, and where a sample's class is.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from karat_scale.foundation.stores import check_url, is_url
from karat_scale.foundation.tables import BACKENDS, DECODERS, BackendRow, Files
from karat_scale.recipe.base import Count, Duration, Effect, Fraction, NonNegative, OneOf, Positive, Section, Triple

_LABELS = ("cls", "txt", "path")
# A user in a URL, or a query; a shell variable may stand for both.
_IN_URL = re.compile(r"\w://(?!\$)[^\s/]*@|\w://[^\s'\"]*[?#](?!\$)")
_NAME = r"[\w-]*(?:secret|token|passw(?:or)?d|api[_-]?key|access[_-]?key|credential)[\w-]*"
_IN_COMMAND = (
    re.compile(rf"{_NAME}=(?!['\"]?\$)\S", re.IGNORECASE),
    re.compile(rf"(?:^|\s)--?{_NAME}\s+(?!['\"]?\$)\S", re.IGNORECASE),
    re.compile(r"authorization:(?![^'\"]*\$)", re.IGNORECASE),
    re.compile(r"\s(?:-u|--user)[\s=]+['\"]?[^\s$:]+:(?!\$)\S"),
)


def check_tars(text: str) -> None:
    """Refuse a spelling of tars that holds a credential. The message does not repeat it. Raises ValueError."""
    if _IN_URL.search(text) or any(pattern.search(text) for pattern in _IN_COMMAND):
        raise ValueError(
            "data.stream has a user, a query or a secret in it, which the recipe, the log and each checkpoint would "
            "repeat; leave these out, and let the command take them from a variable of the environment, such as $TOKEN"
        )


class DataConfig(Section):
    """The images, and how they become batches."""

    backend: Annotated[str, OneOf(BACKENDS), Effect.ROUNDING] = "webdataset"
    """The source of batches. docs/data.md compares them."""
    path: Annotated[str, Effect.NOTHING] = ""
    """The directory of the data set, or its URL: s3://, gs://, https:// or hf://."""
    train_split: str = "train"
    """The split to train on."""
    val_split: str = "val"
    """The split to evaluate on."""
    order: Literal["full", "block", "stream"] = "full"
    """`full` permutes all samples. `block` permutes blocks of samples, for disks with slow seeks. `stream` trains on
    the tars of `stream`, each read from start to end, instead of a split of `path`."""
    block_samples: Count = 256
    """Consecutive samples in a block, for `order: block`."""
    window_blocks: Count = 32
    """Blocks in the window in which samples are shuffled, for `order: block`."""
    stream: str = ""
    """The tars of `order: stream`, in the webdataset library's notation: paths, https://, or `pipe:` and a command,
    with {000..146} for numbers and :: between several."""
    stream_samples: Count | None = None
    """Images that count as one epoch of `order: stream`."""
    stream_label: str = "cls"
    """The place of a sample's class in `stream`: cls, json:FIELD, txt or path, as for `karat index`."""
    stream_buffer: Count = 1000
    """Number of images in the buffer in which each data worker shuffles `stream`. They are held as stored, not
    decoded."""
    decoder: Annotated[str, OneOf(DECODERS, "auto"), Effect.ROUNDING] = "auto"
    """The decoder of the folder, webdataset and ffcv backends. `auto` uses the fastest that runs; with ffcv it is
    FFCV's own."""
    max_pixels: Count = 80_000_000
    """An image with more pixels is refused before it is decoded."""
    workers: Annotated[int, Field(ge=0), Effect.SPEED] = 2
    """Data workers of each rank; threads for dali and nvjpeg, at least 1. 0 reads in the trainer itself. With
    `order: stream`, a run that resumes with another number begins a new pass over the tars."""
    prefetch: Annotated[Count, Effect.SPEED] = 4
    """Batches that each worker (dali, nvjpeg: each rank) prepares ahead."""
    timeout: Annotated[Duration, Effect.NOTHING] = 300.0
    """Seconds a batch may take. After that, the run ends with an error that names what it waited for."""
    cache_gb: Annotated[Positive, Effect.SPEED] = 20.0
    """Gigabytes that a node keeps of a data set at a URL. docs/data.md says where, and how much is needed."""
    on_bad_sample: Annotated[Literal["skip", "stop"], Effect.NOTHING] = "stop"
    """`stop` ends the run at an image that cannot be read. `skip` counts it, and trains on the next image
    instead. Both see the same images until the first bad one."""
    verify: Annotated[Literal["size", "hash"], Effect.NOTHING] = "size"
    """The check against the data set's record when the data is opened: the `size` of each file, or also its
    `hash`."""
    synthetic_samples: Count = 1024
    """Number of training images of the synthetic backend."""

    @property
    def row(self) -> BackendRow:
        """The backend's row in the table."""
        return BACKENDS[self.backend]

    @property
    def is_stream(self) -> bool:
        """True if the training images have no index."""
        return self.order == "stream"

    @property
    def lanes(self) -> int:
        """The lanes of each rank of a stream; 0 if the training images have an index."""
        return max(1, self.workers) if self.is_stream else 0

    def on_a_cpu(self) -> "DataConfig":
        """Return what reads the same images without a GPU; their pixels may differ a little."""
        return self.changed(backend=self.row.without_gpu or self.backend)

    @property
    def fewest_workers(self) -> int:
        """The workers that it takes to read a batch: a stream may stay silent, and only a worker can be given up."""
        return 1 if self.row.own_threads or self.is_stream else 0

    def _refusals(self) -> Iterator[str]:
        if not self.is_stream:
            for name in ("stream", "stream_samples"):
                if getattr(self, name):
                    yield (
                        f"data.{name} is set, but data.order = {self.order} reads data.path; add data.order=stream or "
                        f"unset it by data.{name}="
                    )
        else:
            if not self.row.streams:
                those = " or ".join(name for name, row in BACKENDS.items() if row.streams)
                yield f"data.order = stream needs data.backend={those}, not {self.backend}"
            if not self.stream:
                yield (
                    "data.order = stream: data.stream is empty; set it to the tars to train on, such as "
                    "'data.stream=pipe:cat data/train-{000..146}.tar'"
                )
            if self.stream_samples is None:
                yield (
                    "data.order = stream: data.stream_samples is not set; set it to the number of images that count "
                    "as an epoch"
                )
            check_tars(self.stream)
            kind, _, field = self.stream_label.partition(":")
            if self.stream_label not in _LABELS and not (kind == "json" and field):
                yield f"data.stream_label = {self.stream_label}: should be cls, json:FIELD, txt or path"
        if self.row.files is not None and not self.path:
            yield f"data.path is empty; set it to {self.row.files.value}"
        if self.row.files is not None and is_url(self.path):
            try:
                check_url(self.path)
            except ValueError as error:
                yield f"data.path: {error}"
            if self.row.files is not Files.SHARDS:
                yield (
                    f"data.backend = {self.backend} reads a file system; only shards can be at a URL, with "
                    "data.backend=webdataset, dali or nvjpeg"
                )


class AugmentConfig(Section):
    """Training augmentation, label smoothing, and the evaluation crop."""

    crop: Literal["pytorch", "big_vision"] = "pytorch"
    """How a random resized crop is drawn. `pytorch`: area and logarithm of the aspect ratio are uniform.
    `big_vision`: height and aspect ratio are uniform, as by TensorFlow, so there are more small crops."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Least and greatest area of a random resized crop, as a share of the image."""
    ratio: tuple[Positive, Positive] = (0.67, 1.5)
    """Least and greatest aspect ratio of a random resized crop."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color_jitter: NonNegative = 0.0
    """Strength of the random change of brightness, contrast and colour; 0 turns it off. timm and DeiT leave it out
    where RandAugment is set, so the paper most likely trained without the 0.4 that it states (0.3 for Swin)."""
    randaugment: str = "rand-m15-n2-mstd1.0-inc1"
    """timm's RandAugment string. Empty turns it off."""
    erasing: Fraction = 0.0
    """Probability of random erasing."""
    run_on: Literal["workers", "device"] = "workers"
    """The place where RandAugment, jitter and erasing run, with the same random draws: in the data workers (Pillow), or
    on the training device, batch by batch. Crop and flip run in the workers (dali, nvjpeg: where they decode), mixup
    and cutmix on the device."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of the resize."""
    mixup: NonNegative = 0.8
    """Alpha of mixup's Beta distribution. 0 turns mixup off."""
    cutmix: NonNegative = 1.0
    """Alpha of cutmix's Beta distribution. 0 turns cutmix off."""
    mix_prob: Fraction = 1.0
    """Probability that a global batch is mixed."""
    mix_switch_prob: Fraction = 0.5
    """Probability of cutmix, if both mixup and cutmix are on."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of the label that is spread evenly over all classes."""
    eval_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Side of the evaluation crop as a share of the resized short side."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, subtracted from pixels in 0 to 1."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, by which the result is divided."""

    @property
    def mixes(self) -> bool:
        """True if mixup or cutmix can change a batch."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def workers_only_flip(self) -> bool:
        """True if the workers only crop and flip."""
        return self.run_on == "device" or not (self.randaugment or self.color_jitter or self.erasing)

    @field_validator("randaugment")
    @classmethod
    def _is_a_timm_policy(cls, value: str) -> str:
        if value and not re.fullmatch(r"rand(-([a-z]+\d[\d.]*|t\w+))+", value):
            raise ValueError("should be empty or timm's RandAugment string, such as rand-m9-mstd0.5-inc1")
        return value

    def _refusals(self) -> Iterator[str]:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                yield f"augment.{name} = [{low}, {high}] is not in ascending order; swap the two"
        if self.scale[1] == 0:
            yield "augment.scale = [0, 0] makes empty crops; use [0.08, 1.0]"
