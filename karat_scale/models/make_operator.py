"""Make the module that replaces softmax in a layer, from the recipe's `attention` section."""

import functools
from collections.abc import Callable
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
from karat_scale.errors import RecipeError
from karat_scale.recipe import AttentionConfig


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
