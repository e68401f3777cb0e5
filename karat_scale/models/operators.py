"""The learned operators of a model, and their parameters by block."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from karat_scale.attention import HybridHeads, KaratOperator, ResidualHeads
from karat_scale.attention.functional import KERNELS_OF
from karat_scale.attention.heads import AttentionHeads
from karat_scale.attention.variants import SmoothOperator
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.layers import BIASED, attention_layers


def operators(model: nn.Module) -> list[KaratOperator | None]:
    """Return each attention layer's operator with functions phi; None if it has none. All are one in universal mode.

    That of `smooth` heads is a plain operator with a copy of their functions.
    """
    return [operator_of(layer.attention) for layer in attention_layers(model)]


def operator_of(attention: nn.Module) -> KaratOperator | None:
    """Return the operator with functions phi of an attention layer, also if it is combined with something else."""
    found: Any = heads_of(attention)
    while found is not None and not isinstance(found, KaratOperator):
        found = found.plain() if isinstance(found, SmoothOperator) else getattr(found, "operator", None)
    operator: KaratOperator | None = found
    return operator


def heads_of(attention: nn.Module) -> AttentionHeads | None:
    """Return what learns in an attention layer, also beside softmax heads or a softmax part; None for softmax alone."""
    found: Any = getattr(attention, "operator", None)
    while isinstance(found, HybridHeads | ResidualHeads):
        found = found.operator
    heads: AttentionHeads | None = found
    return heads


def check_implementation(model: nn.Module, device: torch.device) -> None:
    """Raise RecipeError if the recipe's implementation of attention cannot run on a device."""
    for operator, sizes in _operators_and_sizes(model):
        why = operator.refusal(device=device, **sizes)
        if why is not None:
            raise RecipeError(
                f"attention.implementation = {getattr(operator, 'implementation', 'auto')} cannot run here: {why}; "
                "use attention.implementation=auto"
            )


def describe_implementation(model: nn.Module, device: torch.device) -> str | None:
    """One line that says by what implementation learned attention runs on a device, and why not by a faster one.

    None where no layer is learned. `check_implementation` must have passed.
    """
    layers = Counter(operator.chosen(device=device, **sizes) for operator, sizes in _operators_and_sizes(model))
    if not layers:
        return None
    parts = [
        f"{name} in {count} layer{'s' * (count > 1)}" + (f" ({KERNELS_OF[device.type]} cannot: {why})" if why else "")
        for (name, why), count in layers.items()
    ]
    return f"learned attention runs by {', '.join(parts)}"


def _operators_and_sizes(model: nn.Module) -> Iterator[tuple[AttentionHeads, dict[str, Any]]]:
    """What learns in each attention layer where something does, and what the layer gives it."""
    for layer in attention_layers(model):
        operator = heads_of(layer.attention)
        if operator is not None:
            yield (
                operator,
                {
                    "width": round(layer.attention.scale**-2),  # d: timm scales scores by d^-1/2
                    "biased": isinstance(layer.attention, BIASED),
                    "masked": getattr(layer.block, "attn_mask", None) is not None,
                },
            )


def gates(model: nn.Module) -> list[nn.Parameter | None]:
    """Return each layer's gates [h] of residual attention; None for other layers."""
    layers = attention_layers(model)
    found = [[m for m in layer.attention.modules() if isinstance(m, ResidualHeads)] for layer in layers]
    return [residual[0].gate if residual else None for residual in found]


def head_parameters(model: nn.Module) -> Iterator[tuple[str, int, nn.Parameter]]:
    """Yield (name, block, parameter [h, ...]) of all that an attention learns by head; the projector is "W".

    A universal operator counts as that of block 0.
    """
    seen: set[int] = set()
    for block, layer in enumerate(attention_layers(model)):
        heads = heads_of(layer.attention)
        if heads is None or id(heads) in seen:
            continue
        seen.add(id(heads))
        for path, parameter in heads.named_parameters():
            name = path.rpartition(".")[2]
            yield "W" if name == "proj" else name, block, parameter
