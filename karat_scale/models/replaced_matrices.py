"""A plain ViT that runs with other attention matrices than its own: what it loses is what it used them for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from karat_scale.models.attention_matrices import query_key_value, scores_and_matrix
from karat_scale.models.layers import attention_layers
from karat_scale.models.transfer import TransferredAttention
from karat_scale.models.vit import join_heads

Replace = Callable[[int, Tensor], Tensor]
"""A function of the block's index and S [B, h, N, N] that returns what to use as S, with or without B."""


def can_be_replaced(model: nn.Module) -> bool:
    """Return whether `replaced` knows all attention layers: those of plain ViTs, without attention transfer."""
    layers = [layer.attention for layer in attention_layers(model)]
    return all(isinstance(layer, Attention) and not isinstance(layer, TransferredAttention) for layer in layers)


@contextmanager
def replaced(model: nn.Module, replace: Replace) -> Iterator[None]:
    """Run each attention layer inside the `with` as O = S' V with S' = replace(block, S)."""
    with ExitStack() as hooks:
        for number, layer in enumerate(attention_layers(model)):
            hooks.enter_context(layer.attention.register_forward_hook(_hook(number, replace)))
        yield


def mean_over_queries(_: int, learned: Tensor) -> Tensor:
    """Give each query the mean of all queries' rows."""
    return learned.mean(2, keepdim=True).expand_as(learned)


def _hook(number: int, replace: Replace) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    @torch.no_grad()
    def after(attention: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        query, key, value = query_key_value(attention, inputs[0])
        learned = scores_and_matrix(query, key, getattr(attention, "operator", None))[1]
        return join_heads(attention, inputs[0], replace(number, learned).to(value.dtype) @ value)

    return after
