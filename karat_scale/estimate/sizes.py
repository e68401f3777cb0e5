"""How many elements a model's parameters have, as the engine's optimizer takes them."""

from dataclasses import dataclass

from torch import nn

from karat_scale.engine.optimizers import own_matrices
from karat_scale.engine.parameter_groups import parameter_groups
from karat_scale.models import parameter_count
from karat_scale.recipe import OptimConfig


@dataclass(frozen=True)
class ParameterSizes:
    """Elements: of all that learns, of each optimizer group, of each parameter, and of all that is frozen.

    `matrices`: of each parameter that has the optimizer's `matrix_states`.
    """

    total: int
    groups: tuple[int, ...]
    each: tuple[int, ...]
    frozen: int
    matrices: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, optim: OptimConfig) -> "ParameterSizes":
        """Of a model, in the groups of the engine's optimizer."""
        parameters = list(model.parameters())
        own = own_matrices(model, optim)
        return cls(
            total=parameter_count(model),
            groups=tuple(sum(p.numel() for p in group["params"]) for group in parameter_groups(model, optim)),
            each=tuple(p.numel() for p in parameters if p.requires_grad),
            frozen=sum(p.numel() for p in parameters if not p.requires_grad),
            matrices=tuple(p.numel() for name, p in model.named_parameters() if name in own and p.requires_grad),
        )
