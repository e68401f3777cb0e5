"""The recipe's activation checkpointing, applied to the model that an engine is about to take."""

from torch import nn

from karat_scale.engine.deepspeed_internals import deepspeed_checkpoint
from karat_scale.models.layers import blocks_of
from karat_scale.models.recompute import choices_by_rule, recompute, torch_checkpoint
from karat_scale.recipe import RunRecipe


def apply_recompute(model: nn.Module, recipe: RunRecipe) -> str:
    """Let `model` recompute what the recipe's `train.recompute` says; returns what that is, in words, or "".

    Raises RecipeError where the policy does not suit the model.
    """
    config = recipe.train.recompute
    if config.policy == "none":
        return ""
    choices = choices_by_rule(config, len(blocks_of(model)))
    recompute(model, choices, torch_checkpoint if config.method == "torch" else deepspeed_checkpoint())
    blocks, attentions = choices.count("block"), choices.count("attention")
    return f"recomputes {blocks} of {len(choices)} blocks, and the attention of {attentions} more"
