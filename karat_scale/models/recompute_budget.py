"""The cheapest choice of what to recompute that holds saved activations to a budget."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models import VisionTransformer
from torch import nn

from karat_scale.attention import KaratOperator, ResidualHeads
from karat_scale.models.flops import operator_flops
from karat_scale.models.recompute import Choice
from karat_scale.models.saved_tensors import ActivationBytes, BlockBytes
from karat_scale.models.vit import num_tokens


class RecomputeCost(NamedTuple):
    """Operations that one block's recomputation takes for an image: of its attention, of all."""

    attention: int
    block: int

    def of(self, choices: Sequence[Choice]) -> int:
        """The cost of recomputing what is chosen."""
        return choices.count("attention") * self.attention + choices.count("block") * self.block


def kept_bytes(block: BlockBytes, choice: Choice) -> int:
    """What of a block's activations is kept until its backward pass begins."""
    if choice == "block":
        return block.input
    return block.saved - block.attention * (choice == "attention")


def peak_saved_bytes(activations: ActivationBytes, choices: Sequence[Choice]) -> int:
    """The most saved activations that live at one moment of forward and backward.

    In a block's backward pass its own are there again, those of later blocks are gone. For a block that recomputes its
    attention this is an upper bound: what the rest of it kept has been used by then.
    """
    kept = peak = activations.outside
    for block, choice in zip(activations.blocks, choices, strict=True):
        peak = max(peak, kept + block.saved)
        kept += kept_bytes(block, choice)
    return peak


def cheapest_choices(activations: ActivationBytes, cost: RecomputeCost, budget: int) -> tuple[Choice, ...] | None:
    """Of the choices whose `peak_saved_bytes` fit the budget, those of the least cost; None if none fit."""
    # The useful beginnings, over the blocks so far: none is both costlier and larger than another.
    useful: list[tuple[int, int, tuple[Choice, ...]]] = [(0, activations.outside, ())]
    for block in activations.blocks:
        options: list[Choice] = ["nothing", "attention", "block"] if block.attention else ["nothing", "block"]
        longer = sorted(
            (
                (spent + cost.of((choice,)), kept + kept_bytes(block, choice), (*chosen, choice))
                for spent, kept, chosen in useful
                if kept + block.saved <= budget
                for choice in options
            ),
            key=lambda beginning: beginning[:2],
        )
        useful = []
        for beginning in longer:
            if not useful or beginning[1] < useful[-1][1]:
                useful.append(beginning)
    return useful[0][2] if useful else None


def least_budget(activations: ActivationBytes) -> int:
    """The smallest budget that any choices fit."""
    return peak_saved_bytes(activations, ["block"] * len(activations.blocks))


def recompute_cost(model: VisionTransformer) -> RecomputeCost:
    """The cost of one of the model's blocks, which are alike: matrix products and the attention's operator."""
    tokens = num_tokens(model)
    attention = getattr(model.blocks[0], "attn", None)
    operator = 0 if attention is None else _operator_flops(attention, tokens)
    linear = 0 if attention is None else _linear_flops(attention, tokens)
    return RecomputeCost(linear + operator, _linear_flops(model.blocks[0], tokens) + operator)


def _linear_flops(module: nn.Module, tokens: int) -> int:
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(2 * tokens * layer.in_features * layer.out_features for layer in layers)


def _operator_flops(attention: Any, tokens: int) -> int:
    learned = [module for module in attention.modules() if isinstance(module, KaratOperator)]
    both = sum(module.num_heads for module in attention.modules() if isinstance(module, ResidualHeads))
    softmax_heads = attention.num_heads - sum(operator.num_heads for operator in learned) + both
    softmax = 4 * tokens**2 * attention.head_dim * softmax_heads
    return softmax + sum(operator_flops(operator, tokens, attention.head_dim) for operator in learned)
