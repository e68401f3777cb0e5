"""The `data` and `augment` sections of a recipe."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from karat_scale.recipe.base import Count, Fraction, NonNegative, Positive, Section, Triple


class DataConfig(Section):
    """The images, and how they become batches.

    `decoder` is that of the folder and webdataset backends, where auto takes the fastest that runs, and of ffcv,
    where auto is FFCV's own. `timeout` is how many seconds a batch may take before the run ends with an error that
    says what was waited for. `block_samples` and `window_blocks` belong to `order: block`.
    """

    backend: Literal["folder", "webdataset", "ffcv", "dali", "synthetic"] = "webdataset"
    path: str = ""
    train_split: str = "train"
    val_split: str = "val"
    order: Literal["full", "block"] = "full"
    block_samples: Count = 256
    window_blocks: Count = 32
    decoder: Literal["auto", "native", "torchvision", "pillow"] = "auto"
    max_pixels: Count = 80_000_000
    workers: Annotated[int, Field(ge=0)] = 2
    prefetch: Count = 4
    timeout: Positive = 300.0
    on_bad_sample: Literal["skip", "stop"] = "stop"
    verify: Literal["size", "hash"] = "size"
    synthetic_samples: Count = 1024

    @model_validator(mode="after")
    def _backend_has_a_source(self) -> "DataConfig":
        if self.backend != "synthetic" and not self.path:
            made_by = {
                "folder": "a directory of train/<class>/<image> and val/<class>/<image>",
                "ffcv": "a directory made by data_prep/make_ffcv.py",
            }.get(self.backend, "a directory made by data_prep/make_webdataset.py")
            raise ValueError(f"data.path is empty; set it to {made_by}")
        return self


class AugmentConfig(Section):
    """Training augmentation, label smoothing, and the evaluation crop.

    `run_on` says who does RandAugment, jitter and erasing: the data workers by Pillow, or the training device, batch by
    batch, from the same draws. Crop and flip are the workers', mixup and cutmix the device's.
    """

    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.67, 1.5)
    hflip: Fraction = 0.5
    color_jitter: NonNegative = 0.4
    randaugment: str = "rand-m15-n2-mstd1.0-inc1"
    erasing: Fraction = 0.0
    run_on: Literal["workers", "device"] = "workers"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mix_prob: Fraction = 1.0
    mix_switch_prob: Fraction = 0.5
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    eval_crop: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    mean: Triple = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix may touch a batch."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def workers_only_flip(self) -> bool:
        """Whether workers do nothing to a crop but flip it."""
        return self.run_on == "device" or not (self.randaugment or self.color_jitter or self.erasing)

    @field_validator("randaugment")
    @classmethod
    def _is_a_timm_policy(cls, value: str) -> str:
        if value and not value.startswith("rand-"):
            raise ValueError("should be empty or timm's RandAugment string, such as rand-m9-mstd0.5-inc1")
        return value

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "AugmentConfig":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"augment.{name} = [{low}, {high}] descends; swap the two")
        if self.scale[1] == 0:
            raise ValueError("augment.scale = [0, 0] crops nothing; use [0.08, 1.0]")
        return self
