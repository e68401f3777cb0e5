"""Convert layers of a built model to KArAt, for models whose constructor in timm takes no attention class."""

from collections.abc import Mapping

from torch import nn

from karat_scale.errors import RecipeError
from karat_scale.models.host import cannot_be_built
from karat_scale.models.layers import LayerSize, attention_layers, refuse_dropout
from karat_scale.models.make_operator import operator_maker
from karat_scale.recipe import AttentionConfig, ModelConfig


def learn(
    network: nn.Module,
    model: ModelConfig,
    attention: AttentionConfig,
    sizes: tuple[LayerSize, ...],
    classes: Mapping[type[nn.Module], type[nn.Module]],
) -> nn.Module:
    """Give an `operator` to each attention layer whose class is in `classes`, and set its class to the one there.

    Other layers and all parameters do not change. `sizes` are those of all the model's layers.

    Raises:
        RecipeError: a layer has too few heads or dropout of its attention matrix, or layers that would share an
            operator differ in size. No layer has changed then.
    """
    found = zip(attention_layers(network), sizes, strict=True)
    turned = [(layer.attention, size) for layer, size in found if type(layer.attention) in classes]
    shapes = {(size.tokens, size.heads) for _, size in turned}
    if attention.mode == "universal" and len(shapes) > 1:
        raise RecipeError(
            f"attention.mode = universal: the layers of {model.name} differ in tokens or heads and cannot share "
            "functions; use attention.mode=blockwise"
        )
    fewest = min(heads for _, heads in shapes)
    if attention.softmax_heads >= fewest:
        raise RecipeError(
            f"attention.softmax_heads = {attention.softmax_heads} leaves no head for KArAt in a layer of {model.name} "
            f"with {fewest} heads; use fewer"
        )
    make = operator_maker(attention)
    try:
        for layer, _ in turned:
            refuse_dropout(layer)
        operators = [make(size.tokens, size.heads) for _, size in turned]
    except ValueError as error:
        raise cannot_be_built(model, error) from error
    for (layer, _), operator in zip(turned, operators, strict=True):
        # A new class, as in torch's parametrizations: names and weights stay timm's.
        layer.__class__ = classes[type(layer)]
        layer.operator = operator
    return network
