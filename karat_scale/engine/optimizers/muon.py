"""torch's Muon for the linear layers inside blocks, and AdamW for all other parameters."""

from typing import Any

import torch
from torch import nn

from karat_scale.engine.optimizers import hidden_matrices
from karat_scale.engine.optimizers.adamw import build_adamw
from karat_scale.engine.parameter_groups import Groups, parameter_groups
from karat_scale.errors import RecipeError
from karat_scale.recipe import OptimConfig


def build_muon(
    model: nn.Module, optim: OptimConfig, device: torch.device, groups: Groups | None = None
) -> torch.optim.Optimizer:
    """Return both as one optimizer; AdamW alone if no matrix learns.

    Raises:
        RecipeError: this torch has no Muon, or the task has groups of its own.
    """
    if groups is not None:
        raise RecipeError("optim.name = muon: this task groups its parameters in another way; use optim.name=adamw")
    hidden = hidden_matrices(model)
    adamw = build_adamw(model, optim, device, parameter_groups(model, optim, apart=hidden))
    matrices = parameter_groups(model, optim, apart={name for name, _ in model.named_parameters()} - hidden)
    if not matrices:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise RecipeError(f"optim.name = muon: torch {torch.__version__} has no Muon; install torch 2.9 or newer")
    # Updates of the size of AdamW's (arXiv 2502.16982): one learning rate and one weight decay are right for both.
    return MuonWithAdamW(torch.optim.Muon(matrices, lr=optim.lr, adjust_lr_fn="match_rms_adamw"), adamw)


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
