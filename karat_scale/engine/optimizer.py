"""The recipe's optimizer over a model's parameters: AdamW, or Muon for hidden matrices and AdamW for the rest."""

from typing import Any

import torch
from torch import nn

from karat_scale.engine.parameter_groups import Groups, parameter_groups
from karat_scale.errors import RecipeError
from karat_scale.models.layers import blocks_of
from karat_scale.recipe import OptimConfig


def build_optimizer(
    model: nn.Module,
    optim: OptimConfig,
    device: torch.device,
    cpu_adam: bool = False,
    groups: Groups | None = None,
) -> torch.optim.Optimizer:
    """AdamW over `groups`, by default `parameter_groups`; fused on CUDA, DeepSpeed's for CPUs with `cpu_adam`.

    With `optim.name` "muon" hidden matrices are Muon's, in groups of their own.

    Raises:
        RecipeError: this torch has no Muon.
    """
    hidden = hidden_matrices(model) if optim.name == "muon" else set()
    groups = groups or parameter_groups(model, optim, apart=hidden)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        built: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **settings)
        return built
    adamw = torch.optim.AdamW(groups, **settings, fused=steps_fused(device))
    others = {name for name, _ in model.named_parameters()} - hidden
    matrices = parameter_groups(model, optim, apart=others) if hidden else []
    if not matrices:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise RecipeError(f"optim.name = muon: torch {torch.__version__} has no Muon; install torch 2.9 or newer")
    # Updates of the size of AdamW's (arXiv 2502.16982): one learning rate and one weight decay are right for both.
    return MuonWithAdamW(torch.optim.Muon(matrices, lr=optim.lr, adjust_lr_fn="match_rms_adamw"), adamw)


def steps_fused(device: torch.device) -> bool:
    """Whether AdamW steps by few operations. A CPU would gain little, and its runs would round in other places."""
    return device.type == "cuda"


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` changes nothing where the tensor `optimizer.found_inf` is 1, without anyone reading it."""
    return isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Weights of the linear layers inside blocks.

    The patch embedding and the head are AdamW's, as Muon's authors advise. So is what KArAt learns: its coefficients
    are many small functions and its W a stack for heads, none of them a matrix that maps one activation to the next.
    """
    inside = {module for block in blocks_of(model) for module in block.modules()}
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and torch's AdamW as one optimizer: one list of groups, one state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        groups = [{**group, "part": number} for number, part in enumerate(parts) for group in part.param_groups]
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:
        """Step both; a closure is not supported."""
        assert closure is None
        for number, part in enumerate(self._parts):
            # Loading a state replaces the lists of groups and states, so they are handed over each time.
            part.param_groups = [group for group in self.param_groups if group["part"] == number]
            part.state = self.state
            part.step()
