"""What a recipe may say: every section, field, default and impossible combination.

A recipe is data. It is validated whole, here, before anything is built; `loading` reads and writes it.
Defaults are the paper's training recipe (arXiv 2503.10632, which follows DeiT). The larger sections have modules of
their own beside this one.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from karat_scale.recipe.attention import AttentionConfig
from karat_scale.recipe.base import Count, Fraction, Section
from karat_scale.recipe.data import AugmentConfig, DataConfig
from karat_scale.recipe.files import RECIPES
from karat_scale.recipe.keep import CheckpointConfig, LogConfig, ResumeConfig
from karat_scale.recipe.train import DeepSpeedConfig, OptimConfig, ScheduleConfig, TrainConfig


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    name: str = ""
    dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("name")
    @classmethod
    def _names_a_file_and_a_cell(cls, value: str) -> str:
        if not value.isprintable() or set(value) & set("/|"):
            raise ValueError("names files and stands in tables; leave out /, | and control characters")
        return value


class ModelConfig(Section):
    """A timm vision transformer (docs/models.md has which). `patch_size`, `embed_dim`, `depth` and `num_heads` override
    the named model's own, where it has one of each.

    So do, in a plain ViT, `pool`: the head sees the class token, or the average of all patches after the last norm,
    without a class token; `pos_embed: sincos2d`, which does not learn; and `weight_init: jax`, that of JAX's ViTs, with
    Xavier's matrices and a head of zeros.
    """

    name: str = "vit_tiny_patch16_224"
    image_size: Count = 224
    patch_size: Count | None = None
    num_classes: Annotated[int, Field(ge=2)] = 1000
    embed_dim: Count | None = None
    depth: Count | None = None
    num_heads: Count | None = None
    pool: Literal["token", "avg"] | None = None
    pos_embed: Literal["sincos2d"] | None = None
    weight_init: Literal["jax"] | None = None
    drop_path: Fraction = 0.0
    proj_drop: Fraction = 0.0

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> "ModelConfig":
        if self.patch_size and self.image_size % self.patch_size:
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


class RunRecipe(Section):
    """What the recipes of all kinds of runs say.

    `init_from` gives the weights that a new run begins with: a run's directory, a checkpoint in one, a file of `karat
    export` or timm, or `timm:NAME`. Everything else begins anew.
    """

    shipped: ClassVar[Path]
    """The directory of the recipes that come with the package."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    init_from: str = ""
    resume: ResumeConfig = ResumeConfig()

    @model_validator(mode="after")
    def _begins_with_one_thing(self) -> "RunRecipe":
        if self.init_from and self.resume.from_:
            raise ValueError(
                f"init_from = {self.init_from} and resume.from = {self.resume.from_} both say what to begin with; "
                "unset one of them, such as init_from="
            )
        return self


class Recipe(RunRecipe):
    """A whole run of `karat train`, as data."""

    shipped = RECIPES

    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
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
        if self.schedule.warmup_steps is None and self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs:g} is longer than train.epochs = "
                f"{self.train.epochs}; shorten the warm-up"
            )
        # A batch far below lr_batch scales the peak below the defaults, so that what was asked for counts, too.
        scale = self.train.global_batch / self.optim.lr_batch if self.optim.lr_batch else 1.0
        highest = self.optim.lr * max(scale, 1.0)
        for name, rate in (("warmup_lr", self.schedule.warmup_lr), ("min_lr", self.schedule.min_lr)):
            if rate > highest:
                raise ValueError(
                    f"schedule.{name} = {rate:g} is above the peak that optim.lr = {self.optim.lr:g} gives, "
                    f"{self.optim.lr * scale:g}; lower it, such as schedule.{name}=0"
                )
        if self.train.eval_weights == "ema" and self.train.ema_decay == 0:
            raise ValueError("train.eval_weights = ema, but train.ema_decay = 0 keeps none; use auto or raw")
        return self
