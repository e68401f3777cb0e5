"""The recipe's optimizer over a model's parameters: one module each, and one row in `karat_scale.tables.OPTIMIZERS`."""

import torch
from torch import nn

from karat_scale.engine.parameter_groups import Groups, parameter_groups
from karat_scale.models.layers import blocks_of
from karat_scale.recipe import OptimConfig
from karat_scale.tables import load


def build_optimizer(
    model: nn.Module, optim: OptimConfig, device: torch.device, on_cpu: bool = False, groups: Groups | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.name`; with `on_cpu`, DeepSpeed's version of it for an offloaded step.

    groups: of the parameters that learn, each with its weight decay and its scale of the rate; by default those of
    `parameter_groups`.

    Raises:
        RecipeError: this torch does not have the optimizer.
    """
    if on_cpu:
        offloaded: torch.optim.Optimizer = load(optim.row.on_cpu)(
            groups or parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps
        )
        return offloaded
    built: torch.optim.Optimizer = load(optim.row.place)(model, optim, device, groups)
    return built


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of the linear layers inside blocks.

    The patch embedding and the head are not among them, as Muon's authors advise. Nor is what KArAt learns: its
    coefficients are many small functions and its W a stack for heads, and none of them maps one activation to the next.
    """
    inside = {module for block in blocks_of(model) for module in block.modules()}
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside
    }


def own_matrices(model: nn.Module, optim: OptimConfig) -> set[str]:
    """Return the names of the parameters that have the row's `matrix_states`."""
    return set() if optim.row.matrix_states is None else hidden_matrices(model)


def state_names(model: nn.Module, optim: OptimConfig) -> set[str]:
    """Return the names of all states that the optimizer keeps for the parameters that learn."""
    row, matrices = optim.row, own_matrices(model, optim)
    learning = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {state for name in learning for state in ((row.matrix_states or ()) if name in matrices else row.states)}


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """True if `step` changes nothing where the tensor `optimizer.found_inf` is 1, without a read of it on the host.

    torch's fused optimizers do so, and say it to torch's gradient scaler.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
