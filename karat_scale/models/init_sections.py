"""Differences between models that do not show in weights, only in recipes: heads, and functions without parameters."""

from karat_scale.errors import RecipeError
from karat_scale.models.factory import layer_sizes
from karat_scale.recipe import AttentionConfig, ModelConfig

# Keys of an operator that can differ while all parameters have the same names and shapes.
_OF_OPERATORS = ("basis", "form", "simplex", "base", "range")


def check_heads(there: ModelConfig, here: ModelConfig) -> None:
    """Raise RecipeError if weights of the same widths have another number of heads."""
    for theirs, ours in zip(layer_sizes(there), layer_sizes(here), strict=False):
        if theirs.heads != ours.heads:
            same_width = (there.name, there.embed_dim) == (here.name, here.embed_dim)
            fix = f"model.num_heads={theirs.heads}" if same_width else "the model section they were trained with"
            raise RecipeError(
                f"the weights are of {there.name} with {theirs.heads} heads per layer, the model has {ours.heads}; "
                f"use {fix}"
            )


def differences(there: tuple[ModelConfig, AttentionConfig], here: tuple[ModelConfig, AttentionConfig]) -> list[str]:
    """Return the differences in how the same parameters are used: `attention.base = silu in the weights, zero here`."""
    pairs = [("model.name", there[0].name, here[0].name)]
    if there[1].kind == here[1].kind == "karat":
        pairs += [(f"attention.{key}", getattr(there[1], key), getattr(here[1], key)) for key in _OF_OPERATORS]
    return [
        f"{key} = {_text(theirs)} in the weights, {_text(ours)} here" for key, theirs, ours in pairs if theirs != ours
    ]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
