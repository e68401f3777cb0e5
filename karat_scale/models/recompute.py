"""Activation checkpointing: parts of a model whose activations are recomputed in the backward pass.

A part that recomputes keeps only its input. Names of parameters and state dicts do not change, nor do results: random
generators and autocast are restored to their state of the first pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karat_scale.models.layers import attention_layers, blocks_of
from karat_scale.recipe import RecomputeConfig

# The part of a block that is recomputed.
Choice = Literal["nothing", "attention", "block"]
# Calls the function with the tensors, keeps only the tensors, and calls it again when backward needs the rest.
Checkpoint = Callable[..., Any]


def choices_by_rule(config: RecomputeConfig, depth: int) -> tuple[Choice, ...]:
    """Return what each of `depth` blocks recomputes."""
    if config.policy == "every":
        return tuple("block" if number % config.every == 0 else "nothing" for number in range(1, depth + 1))
    by_policy: dict[str, Choice] = {"none": "nothing", "attention": "attention", "all": "block"}
    return (by_policy[config.policy],) * depth


def recompute(model: nn.Module, choices: Sequence[Choice], by: Checkpoint | None = None) -> None:
    """Make each block recompute its choice, with `by` (default: `torch_checkpoint`). Call it once for a model."""
    layers = attention_layers(model)
    for block, choice in zip(blocks_of(model), choices, strict=True):
        attentions = [layer.attention for layer in layers if layer.block is block]
        parts: dict[Choice, list[Any]] = {"nothing": [], "attention": attentions, "block": [block]}
        for part in parts[choice]:
            # A new class, as in torch's parametrizations: unlike a new attribute, it is also right for a copy.
            part.__class__ = _recomputing(type(part), by or torch_checkpoint)  # type: ignore[arg-type]  # a class has a hash


def torch_checkpoint(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """torch's non-reentrant checkpoint.

    It stops recomputing at the last tensor that backward needs. ZeRO stage 3 relies on that: if it ran to the end, the
    last layer would release the weight that its backward pass needs next.
    """
    return checkpoint(function, *tensors, use_reentrant=False)


class _Recomputing:
    """A base class that is inserted before a module's own class: runs its forward pass through a checkpoint."""

    checkpoint: Checkpoint

    def forward(self, *tensors: Tensor, **settings: Any) -> Any:
        """Return the module's own result."""
        forward = functools.partial(super().forward, **settings)  # type: ignore[misc]
        return self.checkpoint(forward, *tensors) if torch.is_grad_enabled() else forward(*tensors)


@functools.cache  # equal blocks stay equal, so that they run the same compiled code
def _recomputing(own: type[nn.Module], by: Checkpoint) -> type[nn.Module]:
    return type(own.__name__, (_Recomputing, own), {"checkpoint": staticmethod(by)})
