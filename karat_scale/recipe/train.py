"""The sections of a recipe that say how weights change: `optim`, `schedule`, `train` and `deepspeed`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from karat_scale.recipe.base import Count, NonNegative, Positive, Section
from karat_scale.recipe.recompute import RecomputeConfig

# None in use is as large; beyond it stand typing errors.
Rate = Annotated[float, Field(gt=0.0, le=1e3)]


class OptimConfig(Section):
    """AdamW, or Muon. The peak learning rate is lr * train.global_batch / lr_batch.

    With `layer_decay` d the rate of the layer n layers below the head is multiplied by d^n.

    `name: muon`, at ZeRO stage 0, orthogonalises the updates of the linear layers' weights inside blocks; all else,
    what KArAt learns included, is AdamW's. Both go by the same learning rate and weight decay.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 5e-4
    lr_batch: Count | None = 512
    weight_decay: NonNegative = 0.05
    karat_weight_decay: bool = False
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-6
    clip_grad: NonNegative = 1.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


class ScheduleConfig(Section):
    """Linear warm-up, then cosine to `min_lr`, per step. Rates are absolute, as in the paper.

    `warmup_steps` goes before `warmup_epochs` where it is given. The cosine begins with training, so that the warm-up
    hides its first part (DeiT), or with `cosine_after_warmup` at the peak (big_vision).
    """

    warmup_epochs: NonNegative = 5.0
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    cosine_after_warmup: bool = False
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5


class TrainConfig(Section):
    """How long and in what pieces. `micro_batch` null means the largest that the world allows.

    No step is ever taken on a loss or gradients that are not finite. `on_nonfinite` says what then: skip the step,
    until `max_skipped_steps` were skipped in a row, or stop. `freeze` lists patterns of names of parameters that do not
    learn, such as `blocks.0.*`.

    `precision: bf16` keeps fp32 weights and computes under autocast, at every ZeRO stage. `bf16_weights` holds the
    weights in 16 bits from stage 1 on, beside fp32 master weights, for models that need the memory. `fp16`, with a loss
    scale, is for GPUs from stage 1 on. `tf32` lets fp32 matrix products round their inputs to TF32 (10 bits of mantissa)
    on GPUs that have it. `compile` is torch.compile's mode; `true` means "default".
    """

    epochs: Count = 100
    max_steps: Count | None = None
    global_batch: Count = 128
    micro_batch: Count | None = None
    precision: Literal["fp32", "bf16", "bf16_weights", "fp16"] = "fp32"
    tf32: bool = True
    compile: Literal[False, "default", "reduce-overhead", "max-autotune"] = False
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99992
    ema_warmup: bool = True
    eval_every_epochs: Count = 1
    eval_batch: Count = 128
    eval_weights: Literal["auto", "raw", "ema"] = "auto"
    freeze: tuple[str, ...] = ()
    recompute: RecomputeConfig = RecomputeConfig()
    on_nonfinite: Literal["skip", "stop"] = "skip"
    max_skipped_steps: Count = 20

    @property
    def is_16_bit(self) -> bool:
        """Whether the forward pass computes in bf16 or fp16."""
        return self.precision != "fp32"

    @field_validator("compile", mode="before")
    @classmethod
    def _true_is_the_default_mode(cls, value: Any) -> Any:
        return "default" if value is True else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_pattern_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _skips_overflows(self) -> "TrainConfig":
        if self.precision == "fp16" and self.on_nonfinite == "stop":
            raise ValueError(
                "train.on_nonfinite = stop with train.precision = fp16 would end at the first overflow of the loss "
                "scale; use skip, which train.max_skipped_steps bounds"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> "TrainConfig":
        if self.compile and self.recompute.policy != "none" and self.recompute.method == "deepspeed":
            raise ValueError(
                f"train.compile = {self.compile} cannot trace DeepSpeed's checkpoint; use train.recompute.method=torch"
            )
        return self


class DeepSpeedConfig(Section):
    """The DeepSpeed file: a name in `ds_configs/` or the path of your own.

    `cpu_adam` steps what is offloaded to the CPU: torch's AdamW, or DeepSpeed's, which is compiled for minutes at its
    first use; auto takes DeepSpeed's beside a GPU and torch's elsewhere.
    """

    config: str = "zero0"
    cpu_adam: Literal["auto", "torch", "deepspeed"] = "auto"
