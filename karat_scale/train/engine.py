"""The DeepSpeed engine, and what it leaves to its caller at ZeRO stage 0."""

import math
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from karat_scale.models import no_weight_decay_names
from karat_scale.recipe import OptimConfig, Recipe
from karat_scale.train.distributed import World
from karat_scale.train.ds_config import load_ds_config, zero_stage
from karat_scale.train.ds_internals import quieten_and_skip_builds


def build_optimizer(model: VisionTransformer, optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW in two groups, with and without weight decay; fused on CUDA."""
    exempt = no_weight_decay_names(model, optim.karat_weight_decay)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in exempt], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in trainable if name in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type == "cuda",
    )


class Engine:
    """Forward, backward and step of one model on one rank."""

    def __init__(self, model: VisionTransformer, recipe: Recipe, world: World, micro_batch: int) -> None:
        config = load_ds_config(recipe, world.size, micro_batch)
        quieten_and_skip_builds()
        import deepspeed

        model = model.to(world.device)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, recipe.optim, world.device),
            config=config,
        )
        self.stage = zero_stage(config)
        self._skipped_steps = 0
        self._clip = recipe.optim.clip_grad
        self._dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32

    @property
    def module(self) -> nn.Module:
        """The model as it trains: bf16 parameters where the recipe says bf16."""
        return self.deepspeed.module

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step, for every parameter group."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float32 [b, classes] for normalised images [b, 3, H, W]."""
        return self.deepspeed(images.to(self._dtype)).float()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of a micro batch's mean loss; the last of a step reduces them over ranks."""
        self.deepspeed.backward(loss)

    def step(self) -> float | None:
        """Finish a micro batch. At the end of an accumulation: clip, step, and return the gradient norm.

        A step whose gradients are not finite is skipped and counted.
        """
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return None
        norm = self._clip_at_stage_0() if self.stage == 0 else math.nan
        self.deepspeed.step()
        if self.stage > 0 and self.deepspeed.was_step_applied():
            norm = float(self.deepspeed.get_global_grad_norm())
        self._skipped_steps += not math.isfinite(norm)
        return norm

    def take_skipped_steps(self) -> int:
        """Steps skipped since they were last taken."""
        taken, self._skipped_steps = self._skipped_steps, 0
        return taken

    def _clip_at_stage_0(self) -> float:
        parameters: list[Any] = [p for p in self.module.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, self._clip or math.inf))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over parameters without a gradient
        return norm
