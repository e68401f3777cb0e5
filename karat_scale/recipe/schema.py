"""The schema of a recipe: every section, field and default, and the combinations that are refused.

A recipe is data. This module validates it as a whole before anything is built; `loading` reads and writes it.
The defaults are the paper's training recipe (arXiv 2503.10632, which follows DeiT). The larger sections have their own
modules beside this one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from karat_scale.foundation.stores import is_url
from karat_scale.recipe.attention import AttentionConfig
from karat_scale.recipe.base import (
    CheckpointConfig,
    Count,
    Duration,
    Effect,
    Fraction,
    LogConfig,
    ResumeConfig,
    SaveConfig,
    Section,
)
from karat_scale.recipe.data import AugmentConfig, DataConfig
from karat_scale.recipe.files import RECIPES
from karat_scale.recipe.train import (
    ConvertConfig,
    DeepSpeedConfig,
    DistillConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


class RunConfig(Section):
    """Name, directory, seed and device of a run."""

    name: Annotated[str, Field(max_length=255), Effect.NOTHING] = ""
    """The name of the run. The default is the name of the recipe."""
    dir: Annotated[str, Effect.NOTHING] = ""
    """The run directory, which holds everything that the run writes. The default is `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of initial weights, data order, augmentation and mixing."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Effect.ROUNDING] = "auto"
    """The device to train on. `auto` uses CUDA if there is a GPU."""

    peer_timeout_minutes: Annotated[Duration, Effect.NOTHING] = 30.0
    """Minutes that a rank waits for another one, at the start and in training, before the run ends."""

    @field_validator("name")
    @classmethod
    def _names_a_file_and_a_cell(cls, value: str) -> str:
        if not value.isprintable() or set(value) & set("/|") or value in (".", ".."):
            raise ValueError("is used in file names and tables; remove /, | and control characters, and use no . or ..")
        return value


class ModelConfig(Section):
    """A timm vision transformer.

    `patch_size`, `embed_dim`, `depth` and `num_heads` override the named model's own, if it has a single one of each.
    `pool`, `pos_embed` and `weight_init` exist in plain ViTs only.
    """

    name: Annotated[str, Effect.SHAPES] = "vit_tiny_patch16_224"
    """The name of a timm model, or of one of our small models. docs/models.md lists them."""
    image_size: Annotated[Count, Effect.SHAPES] = 224
    """Side of the square input in pixels."""
    patch_size: Annotated[Count | None, Effect.SHAPES] = None
    """Side of a patch in pixels. Null keeps the model's own."""
    num_classes: Annotated[int, Field(ge=2), Effect.SHAPES] = 1000
    """Number of classes."""
    embed_dim: Annotated[Count | None, Effect.SHAPES] = None
    """Width of the model, all heads together. Null keeps the model's own."""
    depth: Annotated[Count | None, Effect.SHAPES] = None
    """Number of blocks. Null keeps the model's own."""
    num_heads: Annotated[Count | None, Effect.SHAPES] = None
    """Number of attention heads in each block. Null keeps the model's own."""
    pool: Annotated[Literal["token", "avg"] | None, Effect.SHAPES] = None
    """Input of the head of a plain ViT: the class `token`, or the average (`avg`) of all patches after the last
    norm, in a model without a class token. Null keeps the model's own."""
    pos_embed: Annotated[Literal["sincos2d"] | None, Effect.SHAPES] = None
    """`sincos2d` uses a fixed position embedding in a plain ViT. Null keeps the model's own, which is learned."""
    weight_init: Literal["jax", "mimetic"] | None = None
    """`jax` initialises a plain ViT like JAX's ViTs: Xavier's matrices, and a head of zeros. `mimetic` starts its
    attention like that of trained ViTs (arXiv 2305.09828): a query asks for tokens like its own, and the output is
    about minus the values; position embeddings start as sines and cosines. Null keeps timm's."""
    drop_path: Fraction = 0.0
    """Highest probability of dropping a residual branch (stochastic depth)."""
    proj_drop: Fraction = 0.0
    """Dropout probability after the projections."""

    @property
    def described(self) -> str:
        """The model, the size of its images, and what the recipe sets instead of timm's own."""
        own = {"patch": self.patch_size, "width": self.embed_dim, "depth": self.depth, "heads": self.num_heads}
        changed = [f"{name} {value}" for name, value in own.items() if value]
        return ", ".join([self.name, f"{self.image_size} px", *changed])

    def _refusals(self) -> Iterator[str]:
        if self.patch_size and self.image_size % self.patch_size:
            nearest = max(self.image_size // self.patch_size, 1) * self.patch_size
            yield (
                f"model.image_size = {self.image_size} is not a multiple of model.patch_size = "
                f"{self.patch_size}; set model.image_size={nearest}"
            )
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            heads, width = fitting(self.num_heads, self.embed_dim)
            yield (
                f"model.embed_dim = {self.embed_dim} is not a multiple of model.num_heads = {self.num_heads}; "
                f"set model.num_heads={heads}, or model.embed_dim={width}"
            )


def fitting(heads: int, width: int) -> tuple[str, int]:
    """Return numbers of heads near `heads` that divide a width, and the nearest width of as many heads, each even."""
    divisors = [number for number in range(1, width + 1) if width % number == 0]
    near = sorted(sorted(divisors, key=lambda number: abs(number - heads))[:2])
    return " or ".join(map(str, near)), max(round(width / (2 * heads)), 1) * 2 * heads


class RunRecipe(Section):
    """The sections that the recipes of `karat train` and `karat detect` share; each has its own data and schedule."""

    shipped: ClassVar[Path]
    """The directory of the recipes that are shipped with the package."""

    run: RunConfig = RunConfig()
    """Name, directory, seed and device."""
    model: ModelConfig = ModelConfig()
    """The vision transformer."""
    attention: AttentionConfig = AttentionConfig()
    """Softmax or KArAt."""
    init_from: str = ""
    """The source of a new run's first weights: a run directory, a checkpoint in one, a file or folder of `karat export`
    or of timm, a model of the package, or `timm:NAME`. Everything else starts from the beginning."""
    resume: Annotated[ResumeConfig, Effect.NOTHING] = ResumeConfig()
    """Resume, or branch from, an earlier run."""
    data: Section
    """The images and how they become batches."""
    augment: Section
    """Augmentation."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    schedule: Section
    """The learning rate schedule."""
    train: TrainConfig = TrainConfig()
    """Length, batch sizes, precision, EMA and evaluation."""
    deepspeed: Annotated[DeepSpeedConfig, Effect.ROUNDING] = DeepSpeedConfig()
    """The DeepSpeed file."""
    checkpoint: Annotated[SaveConfig, Effect.NOTHING] = SaveConfig()
    """When to save, and what to keep."""
    log: Annotated[LogConfig, Effect.NOTHING] = LogConfig()
    """What to report, and how often."""

    def _refusals(self) -> Iterator[str]:
        for key, value in {"init_from": self.init_from, "resume.from": self.resume.from_}.items():
            if is_url(value):
                yield f"{key} is a URL; get a run there by `karat fetch URL DIR`, or download a file of weights"
        if is_url(self.run.dir):
            yield "run.dir is a URL; use a directory, and checkpoint.url for a copy of the run"
        if self.init_from and self.resume.from_:
            yield (
                f"init_from = {self.init_from} and resume.from = {self.resume.from_} both set the start of the run; "
                "unset one of them, such as init_from="
            )
        if self.train.micro_batch and self.train.global_batch % self.train.micro_batch:
            whole, micro = self.train.global_batch, self.train.micro_batch
            unit = 2 if isinstance(self, Recipe) and self.augment.mixes and whole % 2 == 0 else 1
            fits = next(size for size in range(max(micro, unit), 0, -1) if whole % size == 0 and size % unit == 0)
            yield (
                f"train.global_batch = {whole} is not a multiple of train.micro_batch = {micro}; "
                f"set train.micro_batch={fits}"
            )
        if self.train.eval_weights == "ema" and self.train.ema_decay == 0:
            yield "train.eval_weights = ema, but with train.ema_decay = 0 there is no EMA; use auto or raw"


class Recipe(RunRecipe):
    """The recipe of a run of `karat train`."""

    shipped = RECIPES

    data: DataConfig
    """The images and how they become batches."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation, label smoothing and the evaluation crop."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""
    checkpoint: Annotated[CheckpointConfig, Effect.NOTHING] = CheckpointConfig()
    """When to save, and what to keep."""
    distill: DistillConfig = DistillConfig()
    """Learning from a trained teacher beside the labels."""
    convert: ConvertConfig = ConvertConfig()
    """Replacing the attention of a trained model."""

    def _refusals(self) -> Iterator[str]:
        yield from super()._refusals()
        for key, value in self.convert.model_dump(exclude_defaults=True).items():
            if not self.convert.images:
                yield f"convert.{key} = {value} has no effect without convert.images; set both or none"
        if self.convert.images:
            if not self.init_from:
                yield f"convert.images = {self.convert.images} needs the trained model; name it by init_from"
            if not self.attention.learns:
                yield (
                    "attention.kind = softmax learns nothing, so a model cannot be converted to it; set "
                    "attention.kind=karat, or another kind"
                )
            if self.data.is_stream:
                yield "convert.images counts images, which data.order = stream cannot; use data.order=full"

        for key, value in self.distill.model_dump(by_alias=True, exclude_defaults=True).items():
            if not self.distill.from_:
                fix = f"set distill.from, or distill.{key}={getattr(DistillConfig(), key)}"
                yield f"distill.{key} = {value} has no effect without distill.from; {fix}"
        if self.optim.row.whole_matrices and self.train.holds_16_bits:
            yield (
                f"train.precision = {self.train.precision} needs ZeRO stage 1 or higher, where optim.name = "
                f"{self.optim.name} is not possible; use train.precision=bf16"
            )

        if sizes := self.schedule.image_sizes:
            name, (last, largest) = "schedule.image_sizes", sizes[-1]
            if largest != self.model.image_size:
                yield f"{name} ends with {largest}, but model.image_size = {self.model.image_size}; make them equal"
            if last >= self.train.epochs:
                yield (
                    f"{name}: the last size begins at epoch {last}, but train.epochs = {self.train.epochs}; begin it "
                    "earlier, or train longer"
                )
            if self.checkpoint.snapshots and len(sizes) > 1:
                yield f"checkpoint.snapshots needs one image size, but {name} has several; use checkpoint.snapshots=0"
            if self.attention.transfer_from:
                yield f"attention.transfer_from needs one image size, and {name} has several; remove one of the two"
            for _, size in sizes:
                if self.model.patch_size and size % self.model.patch_size:
                    fits = max(size // self.model.patch_size, 1) * self.model.patch_size
                    yield f"{name}: {size} is not a multiple of model.patch_size = {self.model.patch_size}; use {fits}"

        for key in ("global_batch", "micro_batch"):
            if self.augment.mixes and (size := getattr(self.train, key)) and size % 2:
                yield (
                    f"train.{key} = {size} is odd, but mixup and cutmix mix pairs; "
                    "use an even number or set augment.mix_prob=0"
                )
        if self.schedule.warmup_steps is None and self.schedule.warmup_epochs > self.train.epochs:
            yield (
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs:g} is longer than train.epochs = "
                f"{self.train.epochs}; shorten the warm-up, such as schedule.warmup_epochs={self.train.epochs / 10:g}"
            )

        # A batch far below lr_batch scales the peak below these defaults. So compare with the unscaled lr, too.
        scale = self.train.global_batch / self.optim.lr_batch if self.optim.lr_batch else 1.0
        highest = self.optim.lr * max(scale, 1.0)
        for name, rate in (("warmup_lr", self.schedule.warmup_lr), ("min_lr", self.schedule.min_lr)):
            if rate > highest:
                yield (
                    f"schedule.{name} = {rate:g} is above the peak learning rate, {self.optim.lr * scale:g}, which "
                    f"follows from optim.lr = {self.optim.lr:g}; set schedule.{name}=0, or raise optim.lr"
                )
