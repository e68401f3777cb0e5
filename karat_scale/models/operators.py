"""The learned operators of a model, and their parameters by block."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from karat_scale.attention import HybridHeads, KaratOperator


def operators(model: nn.Module) -> list[KaratOperator | None]:
    """Each block's learned operator; None where the block has softmax. In universal mode all are one object."""
    blocks: Any = model.blocks
    return [operator_of(block.attn) for block in blocks]


def operator_of(attention: nn.Module) -> KaratOperator | None:
    """The learned operator of an attention layer, also beside softmax heads."""
    operator: Any = getattr(attention, "operator", None)
    return operator.operator if isinstance(operator, HybridHeads) else operator


def head_parameters(model: nn.Module) -> Iterator[tuple[str, int, nn.Parameter]]:
    """(name, block, parameter [h, ...]) of coefficients, by their basis's names, and of the projector, "W".

    A universal operator counts as block 0's.
    """
    seen: set[int] = set()
    for block, operator in enumerate(operators(model)):
        if operator is None or id(operator) in seen:
            continue
        seen.add(id(operator))
        for name, parameter in operator.named_parameters(recurse=False):
            yield "W" if name == "proj" else name, block, parameter
