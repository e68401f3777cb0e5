"""The recipe's activation checkpointing, applied to the model that an engine is about to take."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from karat_scale.engine.deepspeed_internals import deepspeed_checkpoint
from karat_scale.engine.distributed import World
from karat_scale.engine.precision import PRECISIONS
from karat_scale.errors import RecipeError
from karat_scale.models.flops import flops_by_block
from karat_scale.models.layers import blocks_of
from karat_scale.models.recompute import (
    Choice,
    cheapest_choices,
    choices_by_rule,
    least_budget,
    peak_saved_bytes,
    recompute,
    torch_checkpoint,
)
from karat_scale.models.saved_tensors import ActivationBytes, activation_bytes
from karat_scale.recipe import RunRecipe


def apply_recompute(model: nn.Module, recipe: RunRecipe, world: World, micro_batch: int) -> str:
    """Let `model` recompute what the recipe's `train.recompute` says; returns what that is, in words, or "".

    Raises:
        RecipeError: the budget is below what any choice needs, or the policy does not suit the model.
    """
    config = recipe.train.recompute
    if config.policy == "none":
        return ""
    by = torch_checkpoint if config.method == "torch" else deepspeed_checkpoint()
    if config.budget_gb is None:
        choices = choices_by_rule(config, len(blocks_of(model)))
        words = _in_words(choices)
    else:
        activations = _measure(model, recipe, world, micro_batch)
        choices = _within(activations, config.budget_gb, recipe)
        words = f"{_in_words(choices)}; saved activations peak at {peak_saved_bytes(activations, choices) / 1e9:.3g} GB"
    recompute(model, choices, by)
    return words


def _measure(model: nn.Module, recipe: RunRecipe, world: World, micro_batch: int) -> ActivationBytes:
    """What a copy of the model keeps of one micro batch, in the precision it trains in."""
    precision = PRECISIONS[recipe.train.precision]
    measured = copy.deepcopy(model).to(world.device, precision.weights)
    size = recipe.model.image_size
    images = torch.zeros(micro_batch, 3, size, size, device=world.device, dtype=precision.weights)
    with precision.autocast(world.device.type):
        return activation_bytes(measured, images)


def _within(activations: ActivationBytes, budget_gb: float, recipe: RunRecipe) -> tuple[Choice, ...]:
    choices = cheapest_choices(activations, flops_by_block(recipe.model, recipe.attention), int(budget_gb * 1e9))
    if choices is None:
        least = least_budget(activations) / 1e9
        raise RecipeError(
            f"train.recompute.budget_gb = {budget_gb:g}: with every block recomputed it takes {least:.4g}; raise it to "
            "that, or lower train.micro_batch"
        )
    return choices


def _in_words(choices: Sequence[Choice]) -> str:
    blocks, attentions = choices.count("block"), choices.count("attention")
    return f"recomputes {blocks} of {len(choices)} blocks, and the attention of {attentions} more"
