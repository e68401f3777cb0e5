"""What a recipe of `karat detect` may say.

Defaults are ViTDet's for a plain ViT-B on COCO (Li et al., arXiv 2203.16527): AdamW, 1e-4 at batch 64, weight decay
0.1, layer-wise decay 0.7, 100 epochs of large-scale jitter, the rate divided by ten at 88.9 and 96.3 % of them. Anchors
are a quarter of those for its 1,024 px.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from karat_scale.recipe import ModelConfig, OptimConfig, RunRecipe
from karat_scale.recipe.base import Count, Fraction, NonNegative, Positive, Section
from karat_scale.recipe.keep import ReportConfig, SaveConfig
from karat_scale.recipe.train import Rate


class CocoConfig(Section):
    """Images and annotations in COCO's format and layout. All names are below `path`.

    `timeout` is how many seconds a batch may take before the run ends with an error that says what was waited for.
    """

    path: Annotated[str, Field(min_length=1)]
    train_images: str = "train2017"
    train_annotations: str = "annotations/instances_train2017.json"
    val_images: str = "val2017"
    val_annotations: str = "annotations/instances_val2017.json"
    workers: Annotated[int, Field(ge=0)] = 4
    prefetch: Count = 2
    timeout: Positive = 300.0


class JitterConfig(Section):
    """Large-scale jitter: an image is resized to `scale` times what fits the input, cropped or padded, and flipped."""

    scale: tuple[Positive, Positive] = (0.1, 2.0)
    hflip: Fraction = 0.5

    @field_validator("scale")
    @classmethod
    def _ascends(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("descends; swap the two")
        return value


class DetectorConfig(Section):
    """Attention windows, pyramid, heads, and what is kept of the detections.

    Tokens attend within windows of `window` x `window` patches, so that N is the same for every image size. An image of
    one window is seen whole. In a larger one `global_blocks` blocks, evenly spread, see all of it by softmax.

    `channels` are those of the pyramid and of the heads' convolutions, `box_features` the width of the box head's
    linear layer, `anchor_sizes` pixels of the input at the five levels. `anchors` and `rois` are sampled an image for
    the losses; `proposals` go on from the first stage, of as many a level, in training twice as many.
    """

    window: Count = 14
    global_blocks: Annotated[int, Field(ge=0)] = 4
    channels: Count = 256
    box_features: Count = 1024
    anchor_sizes: tuple[Count, Count, Count, Count, Count] = (8, 16, 32, 64, 128)
    anchors: Count = 256
    rois: Count = 512
    proposals: Count = 1000
    min_score: Fraction = 0.05
    detections: Count = 100


class AdamWConfig(OptimConfig):
    """AdamW. The peak learning rate is lr * train.global_batch / lr_batch.

    With `layer_decay` d the rate of the block n blocks below the pyramid is multiplied by d^n. `clip_grad` 0 clips
    nothing.
    """

    name: Literal["adamw"] = "adamw"
    lr: Rate = 1e-4
    lr_batch: Count | None = 64
    weight_decay: NonNegative = 0.1
    eps: Positive = 1e-8
    clip_grad: NonNegative = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7


class StepScheduleConfig(Section):
    """Linear warm-up from `warmup_factor` of the rate; at each share `drops` of training it falls by `drop_factor`."""

    warmup_steps: Annotated[int, Field(ge=0)] = 250
    warmup_factor: Fraction = 0.001
    drops: tuple[Fraction, ...] = (0.889, 0.963)
    drop_factor: Fraction = 0.1


class DetectionTrainConfig(Section):
    """How long and in what pieces. `micro_batch` null means the largest that the world allows.

    No step is ever taken on a loss or gradients that are not finite; `max_skipped_steps` of them in a row end the run.
    """

    epochs: Count = 100
    max_steps: Count | None = None
    global_batch: Count = 64
    micro_batch: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every_epochs: Count = 5
    eval_batch: Count = 8
    max_skipped_steps: Count = 20


class DetectionRecipe(RunRecipe):
    """A whole run of `karat detect`, as data. `model` is the backbone; its `num_classes` are the categories."""

    shipped = Path(__file__).parent / "recipes"

    data: CocoConfig
    augment: JitterConfig = JitterConfig()
    detector: DetectorConfig = DetectorConfig()
    optim: AdamWConfig = AdamWConfig()
    schedule: StepScheduleConfig = StepScheduleConfig()
    train: DetectionTrainConfig = DetectionTrainConfig()
    checkpoint: SaveConfig = SaveConfig()
    log: ReportConfig = ReportConfig()

    @property
    def patch_size(self) -> int:
        """Pixels a patch, which a detector's recipe says."""
        return self.model.patch_size or 0

    @property
    def window_model(self) -> ModelConfig:
        """The backbone on one window, for which attention is built."""
        return self.model.model_copy(update={"image_size": self.detector.window * self.patch_size})

    @model_validator(mode="after")
    def _model_is_a_backbone(self) -> "DetectionRecipe":
        if self.model.patch_size is None:
            raise ValueError("model.patch_size is unset, and windows are counted in patches; set it, as to 16")
        if self.model.pool is not None:
            raise ValueError(f"model.pool = {self.model.pool} has no meaning in detection; leave it out")
        return self

    @model_validator(mode="after")
    def _windows_tile_the_image(self) -> "DetectionRecipe":
        window = self.detector.window * self.patch_size
        if self.model.image_size % window:
            nearest = max(round(self.model.image_size / window), 1) * window
            raise ValueError(
                f"model.image_size = {self.model.image_size} is not a multiple of the attention window, {window} px: "
                f"detector.window = {self.detector.window} patches of {self.patch_size} px, for N is fixed; "
                f"use {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "DetectionRecipe":
        if self.attention.transfer_from:
            raise ValueError(
                f"attention.transfer_from = {self.attention.transfer_from} has no meaning in detection; leave it out"
            )
        if self.train.micro_batch and self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch = {self.train.global_batch} is not a multiple of train.micro_batch = "
                f"{self.train.micro_batch}"
            )
        return self
