"""What a recipe may say: every section, field, default and impossible combination.

A recipe is data. It is validated whole, here, before anything is built; `recipe_io` reads and writes it.
Defaults are the paper's training recipe (arXiv 2503.10632, which follows DeiT).
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from karat_scale.recipe_attention import AttentionConfig
from karat_scale.recipe_base import Count, Fraction, NonNegative, Positive, Section, Triple


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = ""
    dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


class ModelConfig(Section):
    """A timm vision transformer. `embed_dim`, `depth` and `num_heads` override the named model's own."""

    name: str = "vit_tiny_patch16_224"
    image_size: Count = 224
    patch_size: Count = 16
    num_classes: Annotated[int, Field(ge=2)] = 1000
    embed_dim: Count | None = None
    depth: Count | None = None
    num_heads: Count | None = None
    drop_path: Fraction = 0.0
    proj_drop: Fraction = 0.0

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> "ModelConfig":
        if self.image_size % self.patch_size:
            nearest = max(self.image_size // self.patch_size, 1) * self.patch_size
            raise ValueError(
                f"model.image_size = {self.image_size} is not a multiple of model.patch_size = "
                f"{self.patch_size}; use {nearest}"
            )
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.embed_dim = {self.embed_dim} is not a multiple of model.num_heads = {self.num_heads}"
            )
        return self


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
    """Training augmentation, label smoothing, and the evaluation crop."""

    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (0.67, 1.5)
    hflip: Fraction = 0.5
    color_jitter: NonNegative = 0.4
    randaugment: str = "rand-m15-n2-mstd1.0-inc1"
    erasing: Fraction = 0.0
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


class OptimConfig(Section):
    """AdamW. The peak learning rate is lr * train.global_batch / lr_batch."""

    lr: Positive = 5e-4
    lr_batch: Count | None = 512
    weight_decay: NonNegative = 0.05
    karat_weight_decay: bool = False
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-6
    clip_grad: NonNegative = 1.0


class ScheduleConfig(Section):
    """Linear warm-up, then cosine to `min_lr`, per step. Rates are absolute, as in the paper."""

    warmup_epochs: NonNegative = 5.0
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5


class TrainConfig(Section):
    """How long and in what pieces. `micro_batch` null means the largest that the world allows."""

    epochs: Count = 100
    max_steps: Count | None = None
    global_batch: Count = 128
    micro_batch: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99992
    ema_warmup: bool = True
    eval_every_epochs: Count = 1
    eval_batch: Count = 128
    eval_weights: Literal["auto", "raw", "ema"] = "auto"


class DeepSpeedConfig(Section):
    """The DeepSpeed file: a name in `ds_configs/` or the path of your own.

    `cpu_adam` steps what is offloaded to the CPU: torch's AdamW, or DeepSpeed's, which is compiled for minutes at its
    first use; auto takes DeepSpeed's beside a GPU and torch's elsewhere.
    """

    config: str = "zero0"
    cpu_adam: Literal["auto", "torch", "deepspeed"] = "auto"


class CheckpointConfig(Section):
    """When to save and what to keep. A last checkpoint is always written at the end."""

    every_steps: Count | None = None
    every_minutes: Positive | None = 15.0
    # One kept checkpoint leaves nothing to fall back on when it turns out damaged.
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_best: bool = True


class ResumeConfig(Section):
    """How to go on from an earlier run: `from` is a checkpoint directory, `allow` names keys that may differ."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    mode: Literal["auto", "never"] = "auto"
    from_: str = Field("", alias="from")
    allow: tuple[str, ...] = ()

    @field_validator("allow", mode="before")
    @classmethod
    def _one_key_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class LogConfig(Section):
    """What to report, and how often."""

    every_steps: Count = 50
    tensorboard: bool = True


class Recipe(Section):
    """A whole run, as data."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Recipe":
        if self.augment.mixes and self.train.global_batch % 2:
            raise ValueError(
                f"train.global_batch = {self.train.global_batch} is odd, but mixup and cutmix mix pairs; "
                "use an even number or set augment.mix_prob=0"
            )
        if self.augment.mixes and self.train.micro_batch and self.train.micro_batch % 2:
            raise ValueError(
                f"train.micro_batch = {self.train.micro_batch} is odd, but mixup and cutmix mix pairs; "
                "use an even number or set augment.mix_prob=0"
            )
        if self.train.micro_batch and self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch = {self.train.global_batch} is not a multiple of train.micro_batch = "
                f"{self.train.micro_batch}"
            )
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs:g} is longer than train.epochs = "
                f"{self.train.epochs}; shorten the warm-up"
            )
        if self.train.eval_weights == "ema" and self.train.ema_decay == 0:
            raise ValueError("train.eval_weights = ema, but train.ema_decay = 0 keeps none; use auto or raw")
        return self
