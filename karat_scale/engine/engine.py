"""The DeepSpeed engine and its precision, and what DeepSpeed leaves to its caller at ZeRO stage 0.

The model is built whole and partitioned by `deepspeed.initialize`: `deepspeed.zero.Init` would silently skip timm's
initialisation.

Only this module says what `train.precision` and `train.tf32` mean: dtypes, autocast, and torch's switches. Optimizer
states, master weights, the EMA and sums of gradients are float32 in every precision.
"""

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from karat_scale.engine import deepspeed_internals as internals
from karat_scale.engine import optimizers
from karat_scale.engine.deepspeed_config import load_ds_config, offloads_optimizer, zero_stage
from karat_scale.engine.distributed import World
from karat_scale.engine.optimizers import Groups
from karat_scale.engine.shards import Fragment, Pieces
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.machine import cpu_has_bf16
from karat_scale.models import parameter_count
from karat_scale.models.layers import repeated_blocks
from karat_scale.recipe import RunRecipe, TrainConfig


@dataclass(frozen=True)
class Precision:
    """The dtype that the forward pass computes in, and the dtype of the module's parameters and inputs."""

    compute: torch.dtype
    weights: torch.dtype

    @property
    def autocasts(self) -> bool:
        """Return whether autocast rounds the weights in the forward pass, since they are held in more bits."""
        return self.compute != self.weights

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the autocast context that this precision needs, for code outside a DeepSpeed engine."""
        return torch.autocast(device_type, self.compute if self.autocasts else None, enabled=self.autocasts)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.float32),
    "bf16_weights": Precision(torch.bfloat16, torch.bfloat16),
    "fp16": Precision(torch.float16, torch.float16),
}
"""The precisions by `train.precision`, at every ZeRO stage that supports them."""


def pixel_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of images for a model that is trained on the device.

    On a GPU it is the compute dtype, to which the model would round them first. On a CPU it is float32.
    """
    return torch.float32 if device.type == "cpu" else PRECISIONS[train.precision].compute


def cast_images(images: Any, precision: Precision) -> Any:
    """A batch in the dtype of the weights: one tensor [b, 3, H, W], or a list of tensors [3, h, w].

    A tensor that already has the compute dtype keeps it: autocast would round it to that dtype anyway.
    """
    if not isinstance(images, torch.Tensor):
        return [cast_images(image, precision) for image in images]
    return images if images.dtype == precision.compute else images.to(precision.weights)


def forward_for_evaluation(model: nn.Module, train: TrainConfig, device: torch.device) -> Callable[[Any], Any]:
    """Move a model to a device, in evaluation mode and its precision; return its forward pass without gradients.

    A recipe's fp16 is computed in fp32 on a CPU. torch's switches for TF32 are set only during the forward pass: other
    results of a command must not depend on whether it has evaluated.
    """
    slow = train.precision == "fp16" and device.type == "cpu"
    precision = PRECISIONS["fp32" if slow else train.precision]
    model.to(device, precision.weights).eval()

    @torch.no_grad()
    def forward(images: Any) -> Any:
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        before = products.allow_tf32, convolutions.allow_tf32
        allow_tf32(train.tf32)
        try:
            with precision.autocast(device.type):
                return model(cast_images(images, precision))
        finally:
            products.allow_tf32, convolutions.allow_tf32 = before

    return forward


def check_precision(precision: str, device: torch.device) -> None:
    """Raises RecipeError for fp16 on a CPU, which has few instructions for it."""
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError("train.precision = fp16 needs a GPU; on a CPU use fp32 or bf16")


def slow_precision(precision: str, device: torch.device) -> str:
    """Return a line of advice where the device computes in this precision slowly; "" elsewhere."""
    if device.type == "cpu" and precision.startswith("bf16") and not cpu_has_bf16():
        return (
            f"train.precision = {precision} is several times slower than fp32 on this processor, which has no bf16 "
            "instructions; use train.precision=fp32"
        )
    return ""


def autocast_inside(model: nn.Module, precision: Precision, device_type: str) -> None:
    """Let autocast begin inside the model's own forward pass.

    Inside its engine, DeepSpeed switches off an autocast of CUDA that began outside.
    """
    if not precision.autocasts:
        return
    forward = model.forward

    @wraps(forward)
    def cast(*inputs: Any, **options: Any) -> Any:
        with precision.autocast(device_type):
            return forward(*inputs, **options)

    model.forward = cast


def matrix_peak(train: TrainConfig, peaks: Mapping[str, float]) -> float | None:
    """Return FLOP/s of a GPU for a recipe's matrix products, from `hardware.Gpu.peaks`; None if it has no such units.

    A GPU without TF32 computes in fp32 whatever `train.tf32` says.
    """
    if train.precision == "fp32":
        return peaks.get("tf32" if train.tf32 else "fp32", peaks["fp32"])
    return peaks.get("fp16" if train.precision == "fp16" else "bf16")


def allow_tf32(allowed: bool) -> None:
    """Set torch's switches for fp32 matrix products and convolutions on GPUs; the attention kernels read them."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Engine:
    """Forward, backward and step of one model on one rank.

    Args:
        groups: the optimizer's parameter groups, if they are not those of `parameter_groups`.

    Raises:
        RecipeError: the device or the DeepSpeed file cannot do what the recipe asks for.
    """

    def __init__(
        self, model: nn.Module, recipe: RunRecipe, world: World, micro_batch: int, groups: Groups | None = None
    ) -> None:
        check_precision(recipe.train.precision, world.device)
        allow_tf32(recipe.train.tf32)
        # Use no algorithm that adds in no fixed order: a run that resumes must end with the same bits. Only patch
        # embeddings and stems are convolutions.
        torch.backends.cudnn.deterministic = True
        self._precision = PRECISIONS[recipe.train.precision]
        config = load_ds_config(recipe, world.size, micro_batch)
        internals.quieten_and_skip_builds()
        import deepspeed

        self.stage = zero_stage(config)
        # At stage 3 the partitioned module's parameters look empty.
        self.parameters = parameter_count(model)
        self.optimizer_states = optimizers.state_names(model, recipe.optim)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        # The frozen parameters, as they were before a lower precision or partitioning.
        self.frozen = {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in model.named_parameters()
            if not p.requires_grad
        }
        self.all_shapes = self.shapes | {name: tuple(x.shape) for name, x in self.frozen.items()}
        self._offloads = offloads_optimizer(config)
        choice = recipe.deepspeed.cpu_adam if recipe.optim.row.on_cpu and self._offloads else "torch"
        on_gpu = choice == "auto" and world.device.type == "cuda"
        cpu_adam = choice == "deepspeed" or (on_gpu and optimizers.cpu_adam_can_be_built())
        config["zero_force_ds_cpu_optimizer"] = cpu_adam
        internals.use_torchs_own_linear()
        initial = Pieces()
        for name, p in model.named_parameters():
            initial.add([Fragment.whole(name, p)], p.detach().to("cpu", torch.float32, copy=True))
        model = model.to(world.device)
        autocast_inside(model, self._precision, world.device.type)
        if cpu_adam:
            optimizers.build_cpu_adam()
        optimizer = optimizers.build_optimizer(model, recipe.optim, world.device, cpu_adam, groups)
        internals.share_world_group(world.size, world.patience)
        internals.patch_modules()
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.module: nn.Module = self.deepspeed.module
        """The model in training, its parameters as `train.precision` holds them; at stage 3 only this rank's part."""
        if self.stage > 0:  # DeepSpeed's master weights start from weights rounded to 16 bits
            for fragments, master in zip(
                internals.shard_layout(self.deepspeed), internals.master_weights(self.deepspeed), strict=True
            ):
                initial.fill(fragments, master)
            for buffer in self.module.buffers():  # DeepSpeed casts only parameters, which meet these
                if buffer.is_floating_point():
                    buffer.data = buffer.to(self._precision.weights)
        norms = [one for one in self.module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        """The running statistics of BatchNorm, which forward passes in training change."""
        self._statistics_before: list[torch.Tensor] = []
        self._device = world.device
        self._skipped_steps = torch.zeros((), device=world.device)
        self._clip = recipe.optim.clip_grad
        # An offloaded step would read `found_inf` on the CPU before it has come there from the GPU.
        reads_norms = recipe.train.precision == "fp16" or self._offloads
        self._skips_on_device = optimizers.heeds_found_inf(self.deepspeed.basic_optimizer) and not reads_norms
        if self.stage == 0:
            internals.average_gradients_in_few_copies(self.deepspeed)
        else:
            internals.check_by_the_norm(self.deepspeed)
            internals.reduce_in_few_operations(self.deepspeed)
            if recipe.train.precision == "fp16":
                internals.grow_loss_scale_after_the_step(self.deepspeed)
        internals.keep_least_loss_scale(self.deepspeed)
        self._records_graphs, self._is_compiled = recipe.train.records_graphs, False

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step, which each parameter group scales."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def share_statistics(self) -> None:
        """Give all ranks rank 0's running statistics of BatchNorm, which checkpoints hold. Collective."""
        if not dist.is_initialized():
            return
        for buffer in self.statistics:
            dist.broadcast(buffer, 0)

    def release(self) -> None:
        """Let go of weights, gradients and optimizer states; the engine cannot be used afterwards."""
        self.statistics = self._statistics_before = []
        self.deepspeed.destroy()
        for parameter in self.module.parameters():  # DeepSpeed's attributes of it would keep the optimizer alive
            vars(parameter).clear()
        del self.deepspeed, self.module
        if self._is_compiled:  # its graphs would count against the next model's, of which there may be few
            torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def compile(self, mode: str) -> None:
        """Let torch.compile compile the model, in one of its modes, at the first step.

        If blocks repeat, each is compiled separately, so one compilation serves all. CUDA graphs are of the whole
        model: a graph for each pass of each block would leave the rest to be launched. At stage 3 DeepSpeed's hooks
        differ between blocks.
        """
        self._is_compiled = True
        blocks = [] if self._records_graphs or self.stage == 3 else repeated_blocks(self.module)
        for block in blocks:
            block.compile(mode=mode)
        if not blocks:
            self.deepspeed.compile(compile_kwargs={"mode": mode})

    def forward(self, images: Any, *targets: Any) -> Any:
        """Return the model's output for a batch. A single tensor, such as logits, is returned as float32.

        Args:
            images: one float tensor [b, 3, H, W], or a list of tensors [3, h, w].
            targets: the model's other arguments.
        """
        if self._records_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last graph returned is not needed any more
        if self.module.training and not self._statistics_before:  # the first micro batch of a step
            self._statistics_before = [buffer.clone() for buffer in self.statistics]
        output = self.deepspeed(cast_images(images, self._precision), *targets)
        return output.float() if isinstance(output, torch.Tensor) else output

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro batch's mean loss; the last of a step reduces them over ranks.

        A loss that is not finite makes all gradients NaN, even those that would be finite; after the reduction, on all
        ranks.
        """
        with internals.device_waits_for_itself(self.deepspeed):
            self.deepspeed.backward(loss * (0 * loss.detach() + 1))  # 0 * x is NaN where x is not finite

    def step(self) -> torch.Tensor | None:
        """Finish a micro batch. At the end of an accumulation: clip, step, and return the gradient norm.

        The norm is a 0-dim tensor on the device, which is not read. A step whose gradients are not finite is skipped
        and counted, and its norm is not finite: the same on all ranks. Fused AdamW skips on the device; for other
        optimizers, for fp16's loss scale and with offload, the norm is read once. A skipped step leaves the statistics
        of BatchNorm as they were before it.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return None
        norm = self._step_at_stage_0() if self.stage == 0 else self._step_at_stages_1_to_3()
        for buffer, before in zip(self.statistics, self._statistics_before, strict=True):
            buffer.copy_(torch.where(norm < math.inf, buffer, before))
        self._statistics_before = []
        return norm

    @property
    def loss_scale(self) -> float | None:
        """Return the factor of losses before the backward pass in fp16; None in another precision."""
        return internals.loss_scale(self.deepspeed) if self._precision.weights == torch.float16 else None

    def take_skipped_steps(self) -> int:
        """Return the number of steps skipped since the last call. Reads the device."""
        taken = int(self._skipped_steps)
        self._skipped_steps.zero_()
        return taken

    def _step_at_stage_0(self) -> torch.Tensor:
        parameters: list[Any] = [p for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip or math.inf)
        if self._must_skip(norm):
            for parameter in parameters:
                parameter.grad = None  # the optimizer skips parameters without a gradient
        self.deepspeed.step()
        return norm

    def _step_at_stages_1_to_3(self) -> torch.Tensor:
        norms: list[torch.Tensor] = []

        def is_invalid(scaled: torch.Tensor) -> bool:
            norm = (scaled / self.loss_scale if self.loss_scale else scaled).to(self._device)
            norm = 0 * norm + norm  # 0 * inf is not a number
            # Offloaded shards have -1 for what is not finite.
            norms.append(torch.where(norm < 0, math.nan, norm) if self._offloads else norm)
            return self._must_skip(norms[0])

        with internals.step_judged_by(is_invalid), internals.device_waits_for_itself(self.deepspeed):
            self.deepspeed.step()
        internals.gathers_wait_for_the_weights(self.deepspeed)
        if not self.deepspeed.was_step_applied():
            internals.forget_gradients(self.deepspeed)
        return norms[0]

    def _must_skip(self, norm: torch.Tensor) -> bool:
        """Count a step to skip; return whether the caller must skip it: False if the optimizer does, on the device."""
        is_skipped = (0 * norm != 0).float()
        self._skipped_steps += is_skipped
        if self._skips_on_device:
            self.deepspeed.basic_optimizer.found_inf = is_skipped
            return False
        return bool(is_skipped)
