"""Make the module that replaces softmax in a layer, from the recipe's `attention` section.

Layers of a built model are converted to KArAt where the model's constructor in timm takes no attention class.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from karat_scale.attention import FourierKaratOperator, HybridHeads, KaratOperator, ResidualHeads, make_basis
from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.variants import (
    ContentOperator,
    ScaledSoftmax,
    SmoothOperator,
    StaticHeads,
    WithoutScores,
)
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.host import cannot_be_built
from karat_scale.models.layers import LayerSize, attention_layers, refuse_dropout
from karat_scale.recipe import AttentionConfig, ModelConfig


def operator_maker(attention: AttentionConfig) -> Callable[[int, int], nn.Module]:
    """Return a function that makes the operator of a layer with N tokens and h heads, given as (N, h).

    Blockwise (B): a new one each time. Universal (U): all layers of the same N and h share one, so its
    parameters are counted and stepped once (paper, the modular operator).

    Raises:
        RecipeError: the basis cannot be built, or by the returned function, the operator.
    """
    _check_basis(attention)

    def make(num_tokens: int, num_heads: int) -> nn.Module:
        softmax_heads = attention.softmax_heads
        if softmax_heads >= num_heads:
            raise ValueError(f"attention.softmax_heads = {softmax_heads} leaves none of {num_heads} heads for KArAt")
        try:
            operator = _make_heads(attention, num_tokens, num_heads - softmax_heads)
        except ValueError as error:
            raise RecipeError(f"attention.{error}") from error
        learned = ResidualHeads(operator) if attention.residual or attention.kind == "static_softmax" else operator
        return HybridHeads(learned, softmax_heads) if softmax_heads else learned

    return functools.cache(make) if attention.mode == "universal" else make


def _check_basis(attention: AttentionConfig) -> None:
    try:
        make_basis(attention.basis, **_basis_settings(attention))
    except ValueError as error:
        raise RecipeError(f"attention.{error}") from error


def _basis_settings(attention: AttentionConfig) -> dict[str, Any]:
    return {name: getattr(attention, name) for name in ("grid", "degree", "range", "orders", "gains")}


def _make_heads(attention: AttentionConfig, num_tokens: int, num_heads: int) -> AttentionHeads:
    if attention.kind in ("static", "static_softmax"):
        return StaticHeads(num_tokens, num_heads)
    if attention.kind == "scaled_softmax":
        return ScaledSoftmax(num_tokens, num_heads)
    operator = _make_operator(attention, num_tokens, num_heads)
    return operator if attention.scores else WithoutScores(operator)


def _make_operator(attention: AttentionConfig, num_tokens: int, num_heads: int) -> AttentionHeads:
    sizes: dict[str, Any] = {"num_tokens": num_tokens, "num_heads": num_heads, "rank": attention.rank}
    if attention.form == "smooth":
        more: dict[str, Any] = {"modes": attention.modes, "implementation": attention.implementation}
        return SmoothOperator(**sizes, grid=attention.grid, **more)
    named: dict[str, Any] = {"base": attention.base, "init": attention.init, "implementation": attention.implementation}
    if attention.is_modular_series:
        operator = FourierKaratOperator(**sizes, **named, grid=attention.grid, gains=attention.gains)
        return ContentOperator(operator) if attention.form == "content" else operator
    basis = make_basis(attention.basis, **_basis_settings(attention))
    return KaratOperator(**sizes, **named, basis=basis, form=attention.form, simplex=attention.simplex)


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
