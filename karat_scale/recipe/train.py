"""The sections `optim`, `schedule`, `train` and `deepspeed`: how the weights are trained.

Two more say what a run learns from a trained classifier: `distill`, in addition to the labels, and `convert`, before
the first step.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from karat_scale.foundation.tables import OPTIMIZERS, OptimizerRow
from karat_scale.recipe.base import ONE_IS_A_LIST, Count, Effect, NonNegative, OneOf, Positive, Section

# No useful rate is larger; beyond it are typing errors.
Rate = Annotated[float, Field(gt=0.0, le=1e3)]


class OptimConfig(Section):
    """AdamW, or Muon.

    Muon orthogonalises the updates of the weights of linear layers inside blocks. AdamW updates all other parameters,
    including KArAt's. Both use the same learning rate and weight decay.
    """

    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    """`adamw`, or `muon` at ZeRO stage 0."""
    lr: Rate = 5e-4
    """Peak learning rate for a global batch of `lr_batch`."""
    lr_batch: Count | None = 512
    """The peak learning rate is lr * train.global_batch / lr_batch. Null does not scale it."""
    weight_decay: NonNegative = 0.05
    """Weight decay of weights with two or more dimensions; norms, biases, and class tokens and positions have none."""
    karat_weight_decay: bool | Literal["all"] = False
    """Whether KArAt's parameters have weight decay. `true`: those with two or more dimensions, as in timm and DeiT for
    all parameters. `all`: also its gates with one dimension."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's beta 1 and beta 2."""
    eps: Positive = 1e-6
    """AdamW's epsilon."""
    clip_grad: NonNegative = 1.0
    """Gradients whose joint norm is larger are scaled down to this norm. 0 does not clip."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The learning rate of the layer that is n layers below the head is multiplied by layer_decay^n."""

    @property
    def row(self) -> OptimizerRow:
        """The optimizer's row in the table."""
        return OPTIMIZERS[self.name]


class ScheduleConfig(Section):
    """A linear warm-up, then a cosine to `min_lr`, per step. `optim.lr_batch` scales neither `warmup_lr` nor
    `min_lr`."""

    warmup_epochs: NonNegative = 5.0
    """Length of the warm-up in epochs."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Length of the warm-up in steps. If set, it overrides `warmup_epochs`."""
    cosine_after_warmup: bool = False
    """Start the cosine at the peak (big_vision). By default it starts with training, so the warm-up replaces its
    first part (DeiT)."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of training."""
    image_sizes: tuple[tuple[Annotated[int, Field(ge=0)], Count], ...] = ()
    """Train on smaller images first: pairs of an epoch, counted from 0, and the side in pixels from there on, such as
    `[[0, 128], [34, 160], [67, 224]]`. The last side is model.image_size. Empty means one size."""

    @field_validator("image_sizes")
    @classmethod
    def _epochs_follow_each_other(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        epochs = [epoch for epoch, _ in value]
        if value and (epochs[0] != 0 or epochs != sorted(set(epochs))):
            raise ValueError("should begin with epoch 0, and its epochs should increase")
        return value


class RecomputeConfig(Section):
    """The activations that are recomputed in the backward pass instead of being kept."""

    policy: Literal["none", "attention", "every", "all"] = "none"
    """The parts to recompute: nothing, the `attention` of each block, `every` n-th block, or `all` blocks."""
    every: Count = 2
    """n of `policy: every`."""
    method: Literal["torch", "deepspeed"] = "torch"
    """torch's non-reentrant checkpoint, or DeepSpeed's."""


class TrainConfig(Section):
    """Length of training, batch sizes, precision, EMA and evaluation.

    A step whose loss or gradients are not finite never changes the weights. The run notices it at the next log line,
    evaluation or save, or about a second later. With `on_nonfinite: stop`, steps taken until then are not saved.
    """

    epochs: Count = 100
    """Number of epochs."""
    max_steps: Annotated[Count | None, Effect.NOTHING] = None
    """Stop after this many steps. The schedule still uses `epochs`."""
    global_batch: Count = 128
    """Images in one optimizer step, over all ranks."""
    micro_batch: Annotated[Count | None, Effect.ROUNDING] = None
    """Images in one forward pass of a rank. Null means its whole part of a global batch."""
    precision: Literal["fp32", "bf16", "bf16_weights", "fp16"] = "fp32"
    """`bf16` keeps fp32 weights and computes under autocast, at every ZeRO stage. `bf16_weights` holds the weights
    in 16 bits from stage 1 on, with fp32 master weights, for models that need the memory. `fp16` has a loss
    scale and needs a GPU and stage 1 or higher."""
    tf32: Annotated[bool, Effect.ROUNDING] = True
    """Allow fp32 matrix products to round their inputs to TF32 (10 bits of mantissa) on GPUs that have it."""
    compile: Annotated[Literal[False, "default", "reduce-overhead", "max-autotune"], Effect.ROUNDING] = False
    """The mode of torch.compile; `true` means `default`. `reduce-overhead` and `max-autotune` record CUDA
    graphs."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99992
    """Decay of the exponential moving average (EMA) of the weights. 0 turns it off."""
    ema_warmup: bool = True
    """Use a smaller EMA decay at first: at most 1 - step^(-2/3)."""
    eval_every_epochs: Annotated[Count, Effect.NOTHING] = 1
    """Number of epochs from one evaluation to the next."""
    eval_batch: Annotated[Count, Effect.SPEED] = 128
    """Images in one forward pass of evaluation."""
    eval_weights: Literal["auto", "raw", "ema"] = "auto"
    """The weights to evaluate. `auto` means the EMA if there is one."""
    freeze: Annotated[tuple[str, ...], ONE_IS_A_LIST] = ()
    """Patterns of the names of parameters that do not learn, such as `blocks.0.*`."""
    recompute: Annotated[RecomputeConfig, Effect.SPEED] = RecomputeConfig()
    """Activation checkpointing."""
    on_nonfinite: Annotated[Literal["skip", "stop"], Effect.NOTHING] = "skip"
    """Skip a step whose loss or gradients are not finite, or stop the run."""
    max_skipped_steps: Annotated[Count, Effect.NOTHING] = 20
    """Stop the run after this many skipped steps in a row."""
    detect_spikes: Annotated[Positive | None, Effect.NOTHING] = None
    """Note a step whose loss is this many standard deviations above the mean of the last 100, such as 6, so that
    `karat replay` can look into it. Null turns this off."""

    @property
    def is_16_bit(self) -> bool:
        """True if the forward pass computes in bf16 or fp16."""
        return self.precision != "fp32"

    @property
    def holds_16_bits(self) -> bool:
        """Whether the module's weights are bf16 or fp16, beside fp32 masters, which only ZeRO stages 1 to 3 keep."""
        return self.precision in ("bf16_weights", "fp16")

    @property
    def records_graphs(self) -> bool:
        """True if the compiler records CUDA graphs, which need weights and gradients to stay in place."""
        return self.compile in ("reduce-overhead", "max-autotune")

    @field_validator("compile", mode="before")
    @classmethod
    def _true_is_the_default_mode(cls, value: Any) -> Any:
        return "default" if value is True else value

    def _refusals(self) -> Iterator[str]:
        if self.precision == "fp16" and self.on_nonfinite == "stop":
            yield (
                "train.on_nonfinite = stop with train.precision = fp16 would end the run at the first overflow of the "
                "loss scale; use skip, which train.max_skipped_steps limits"
            )
        if self.compile and self.recompute.policy != "none" and self.recompute.method == "deepspeed":
            yield (
                f"train.compile = {self.compile} cannot trace DeepSpeed's checkpoint; use train.recompute.method=torch"
            )


class DeepSpeedConfig(Section):
    """The DeepSpeed file, and the optimizer for offloaded parameters."""

    config: str = "zero0"
    """The name of a file in `ds_configs/`, or the path of your own."""
    cpu_adam: Literal["auto", "torch", "deepspeed"] = "auto"
    """The optimizer for what is offloaded to the CPU: torch's AdamW, or DeepSpeed's, which takes minutes to compile
    on first use. `auto` uses DeepSpeed's on a machine with a GPU, ninja and a C++ compiler, and torch's elsewhere."""


class DistillConfig(Section):
    """Knowledge distillation from a frozen teacher, which sees the same augmented and mixed images as the student.

    A student with DeiT's distillation token learns from the teacher by that token, and from the labels by the class
    token.
    """

    model_config = ConfigDict(populate_by_name=True)

    from_: str = Field("", alias="from")
    """The teacher: a run directory, a checkpoint in one, a file or folder of `karat export`, `timm:NAME`, or a file of
    weights of the recipe's model with softmax. Empty means no distillation. A run keeps a copy of its teacher."""
    kind: Literal["soft", "hard"] = "soft"
    """`soft`: the divergence from the teacher's probabilities (Hinton et al.). `hard`: the cross-entropy with the
    teacher's most probable class (DeiT)."""
    temperature: Positive = 3.0
    """The logits are divided by it before the soft probabilities are taken."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The teacher's share of the loss; the labels have the rest."""


class ConvertConfig(Section):
    """How the attention of a trained model is replaced, as `karat convert` does it.

    Before the first step, the attention of each block learns to reproduce the output of the original
    (`init_from`), from training images without their labels: by least squares where it is linear in its parameters, and
    then by gradient descent.
    """

    images: Annotated[int, Field(ge=0)] = 0
    """Number of training images to learn from, the first ones in the order of training. 0 converts nothing: attention
    that `init_from` lacks keeps its initial values."""
    rounds: Annotated[int, Field(ge=0)] = 2
    """Rounds of least squares; each solves for the coefficients, and then for W."""
    steps: Annotated[int, Field(ge=0)] = 500
    """Steps of gradient descent."""
    rate: Rate = 1e-3
    """Learning rate of the first of these steps; a cosine takes it to 0."""
    scores: NonNegative = 0.0
    """Weight of the error of the matrices S in these steps; the error of the outputs O has weight 1."""
