"""What a rank keeps: elements of a model's parameters, and bytes that DeepSpeed and the engine hold for them."""

from dataclasses import dataclass

from torch import nn

from karat_scale.engine.optimizers import own_matrices
from karat_scale.engine.parameter_groups import parameter_groups
from karat_scale.models import parameter_count
from karat_scale.recipe import OptimConfig


@dataclass(frozen=True)
class Kept:
    """What a rank holds, in bytes.

    weights: what the forward pass reads; masters: fp32 weights beside them. moments: of the optimizer. ema: fp32.
    held_gradients: alive before a backward pass begins, in the worst micro batch of a step.
    keeps_gradients: how many times the bytes of each gradient that backward makes stay: 1 where it stays itself, 2
    where it is widened to fp32, 0 where it is copied away at once.
    bucket: DeepSpeed's buffers while gradients come. gathered: stage 3's whole weights between forward and backward.
    fetched: stage 3's weights that an evaluation has fetched ahead, in one buffer and each by itself.
    partition: allocated for gradients when `flush_after` bytes of them have come.
    final_gradients: alive when the step begins. reducing: more than that, at its most, between backward and step.
    resting: gradients and their buffers that are kept when no step is under way.
    stepping: temporaries of the step. starting: all that is alive at the worst moment of `deepspeed.initialize`.
    host: of it all, what offload moves to the CPU's memory beside a GPU.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    held_gradients: int
    keeps_gradients: int
    bucket: int
    gathered: int
    fetched: int
    partition: int
    flush_after: int
    final_gradients: int
    resting: int
    reducing: int
    stepping: int
    starting: int
    host: int


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
