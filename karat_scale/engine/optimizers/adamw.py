"""torch's AdamW, fused on a GPU."""

import torch
from torch import nn

from karat_scale.engine.parameter_groups import Groups, parameter_groups
from karat_scale.recipe import OptimConfig


def build_adamw(
    model: nn.Module, optim: OptimConfig, device: torch.device, groups: Groups | None = None
) -> torch.optim.AdamW:
    """Return AdamW over `groups`, by default all that learns."""
    groups = groups or parameter_groups(model, optim)
    fused = steps_fused(device)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def steps_fused(device: torch.device) -> bool:
    """True if a step takes few operations. A CPU would gain little, and its runs would round in other places."""
    return device.type == "cuda"
