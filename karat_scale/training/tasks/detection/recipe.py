"""The schema of a recipe of `karat detect`.

The defaults are ViTDet's for a plain ViT-B on COCO (Li et al., arXiv 2203.16527): AdamW, 1e-4 at batch 64, weight decay
0.1, layer-wise decay 0.7, and 100 epochs of large-scale jitter. The rate is divided by ten after 88.9 and 96.3 % of
training. The anchors are a quarter of those that ViTDet uses at 1,024 px.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.tables import how_to_install
from karat_scale.recipe import ModelConfig, OptimConfig, RunRecipe, TrainConfig
from karat_scale.recipe.base import Count, Effect, Fraction, NonNegative, Positive, Section, Triple
from karat_scale.recipe.train import Rate


def require_pycocotools() -> None:
    """Raise RecipeError, with the command that installs it, if pycocotools is missing."""
    try:
        import pycocotools.coco  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"karat detect needs pycocotools ({error}); {how_to_install('detection')}") from error


class CocoConfig(Section):
    """Images and annotations in COCO's format and layout."""

    path: Annotated[str, Field(min_length=1), Effect.NOTHING]
    """The directory of the data set."""
    train_images: str = "train2017"
    """Directory of the training images, below `path`."""
    train_annotations: str = "annotations/instances_train2017.json"
    """Annotations of the training images, below `path`."""
    val_images: str = "val2017"
    """Directory of the validation images, below `path`."""
    val_annotations: str = "annotations/instances_val2017.json"
    """Annotations of the validation images, below `path`."""
    workers: Annotated[int, Field(ge=0), Effect.SPEED] = 4
    """Data workers of each rank. 0 reads in the trainer itself."""
    prefetch: Annotated[Count, Effect.SPEED] = 2
    """Number of batches that each worker prepares ahead."""
    timeout: Annotated[Positive, Effect.NOTHING] = 300.0
    """Seconds a batch may take. After that, the run ends with an error that names what it waited for."""


class BackboneConfig(ModelConfig):
    """A plain ViT of timm's. As for a classifier, but one category is enough."""

    num_classes: Annotated[Count, Effect.SHAPES] = 1000
    """Number of categories."""


class JitterConfig(Section):
    """Large-scale jitter: an image is resized to `scale` times what fits the input, cropped or padded, and flipped.

    Then mean and standard deviation normalise its pixels.
    """

    scale: tuple[Positive, Positive] = (0.1, 2.0)
    """Least and greatest size, as a factor of the size that fits the input."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Mean of the RGB channels, subtracted from pixels in 0 to 1."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, by which the result is divided."""

    @field_validator("scale")
    @classmethod
    def _ascends(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("is not in ascending order; swap the two")
        return value


class DetectorConfig(Section):
    """Attention windows, pyramid, heads, and the detections to keep.

    Tokens attend within windows of `window` x `window` patches, so N is the same at every image size.
    """

    window: Annotated[Count, Effect.SHAPES] = 14
    """Side of the attention windows in patches. N is window^2 at every image size."""
    global_blocks: Annotated[int, Field(ge=0)] = 4
    """In images larger than one window, this many blocks, evenly spaced, attend to the whole image by softmax."""
    channels: Annotated[Count, Effect.SHAPES] = 256
    """Channels of the pyramid and of the heads' convolutions."""
    box_features: Annotated[Count, Effect.SHAPES] = 1024
    """Width of the linear layer in the box head."""
    anchor_sizes: tuple[Count, Count, Count, Count, Count] = (8, 16, 32, 64, 128)
    """Anchor sizes in input pixels, one for each of the five levels."""
    anchors: Count = 256
    """Anchors sampled per image for the loss of the region proposal network."""
    rois: Count = 512
    """Regions of interest sampled per image for the losses of the heads."""
    proposals: Count = 1000
    """Proposals that the first stage keeps."""
    proposals_in_training: Count | None = None
    """The same in training. Null means `proposals`."""
    candidates: Count | None = None
    """Candidates per level, of which non-maximum suppression (NMS) leaves the proposals. Null means `proposals`."""
    candidates_in_training: Count | None = None
    """The same in training. Null means twice `proposals`."""
    min_score: Fraction = 0.05
    """Detections with a lower score are dropped."""
    detections: Count = 100
    """Largest number of detections per image."""


class AdamWConfig(OptimConfig):
    """AdamW with layer-wise learning rates."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Rate = 1e-4
    """Peak learning rate for a global batch of `lr_batch`."""
    lr_batch: Count | None = 64
    """The peak learning rate is lr * train.global_batch / lr_batch. Null does not scale it."""
    weight_decay: NonNegative = 0.1
    """Weight decay of weights with two or more dimensions; norms, biases, and class tokens and positions have none."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_grad: NonNegative = 0.0
    """Gradients whose joint norm is larger are scaled down to this norm. 0 does not clip."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """The learning rate of the block that is n blocks below the pyramid is multiplied by layer_decay^n."""


class StepScheduleConfig(Section):
    """A linear warm-up, then a rate that falls in steps, or a little after each epoch."""

    warmup_steps: Annotated[int, Field(ge=0)] = 250
    """Length of the warm-up in steps."""
    warmup_factor: Fraction = 0.001
    """The warm-up starts at this share of the learning rate."""
    drops: tuple[Fraction, ...] = (0.889, 0.963)
    """The shares of training after which the learning rate falls."""
    drop_factor: Fraction = 0.1
    """The learning rate is multiplied by this at each drop."""
    epoch_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The learning rate is multiplied by this after each epoch."""


class DetectionTrainConfig(TrainConfig):
    """Length of training, batch sizes, precision, EMA and evaluation. As for a classifier, with ViTDet's defaults."""

    epochs: Count = 100
    """Number of epochs."""
    global_batch: Count = 64
    """Images in one optimizer step, over all ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` keeps fp32 weights and computes under autocast."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the exponential moving average (EMA) of the weights. 0 turns it off."""
    eval_every_epochs: Annotated[Count, Effect.NOTHING] = 5
    """Number of epochs from one evaluation to the next."""
    eval_batch: Annotated[Count, Effect.SPEED] = 8
    """Images in one forward pass of evaluation."""

    def _refusals(self) -> Iterator[str]:
        yield from super()._refusals()
        if self.compile:
            yield f"train.compile = {self.compile} has no meaning in detection; remove it"


class DetectionRecipe(RunRecipe):
    """The recipe of a run of `karat detect`. `model` is the backbone, and its `num_classes` are the categories."""

    shipped = Path(__file__).parent / "recipes"

    model: BackboneConfig = BackboneConfig()
    """The backbone."""
    data: CocoConfig
    """Images and annotations in COCO's format."""
    augment: JitterConfig = JitterConfig()
    """Large-scale jitter."""
    detector: DetectorConfig = DetectorConfig()
    """Windows, pyramid, heads, and the detections to keep."""
    optim: AdamWConfig = AdamWConfig()
    """The optimizer."""
    schedule: StepScheduleConfig = StepScheduleConfig()
    """The learning rate schedule."""
    train: DetectionTrainConfig = DetectionTrainConfig()
    """Length, batch sizes, precision, EMA and evaluation."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels. A detection recipe must set it."""
        return self.model.patch_size or 0

    @property
    def window_model(self) -> ModelConfig:
        """The backbone on one window, for which the attention is built."""
        return self.model.changed(image_size=self.detector.window * self.patch_size)

    def _refusals(self) -> Iterator[str]:
        yield from super()._refusals()
        if self.model.patch_size is None:
            yield "model.patch_size is unset, but windows are counted in patches; set it, such as model.patch_size=16"
        if self.model.pool is not None:
            yield f"model.pool = {self.model.pool} has no meaning in detection; remove it"
        window = self.detector.window * self.patch_size
        if self.model.image_size % window:
            nearest = max(round(self.model.image_size / window), 1) * window
            yield (
                f"model.image_size = {self.model.image_size} is not a multiple of the attention window, {window} px: "
                f"detector.window = {self.detector.window} patches of {self.patch_size} px; use {nearest}"
            )
        if self.attention.blocks:
            yield "attention.blocks is not supported in detection; use detector.global_blocks for softmax"
        if self.attention.transfer_from:
            yield f"attention.transfer_from = {self.attention.transfer_from} has no meaning in detection; remove it"
