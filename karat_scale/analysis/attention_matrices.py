"""The attention matrices of a model, block by block, while it runs: scores before the operator and weights after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from karat_scale.models.transfer import Teacher, TransferredAttention

Visit = Callable[[int, Tensor, Tensor], None]
"""Given the block's index, A [B, h, N, N] before the operator, and S (or softmax(A)) [B, h, N, N] after it."""


@contextmanager
def watched(model: VisionTransformer, visit: Visit) -> Iterator[None]:
    """Calls `visit` for each block of each forward pass inside the `with`, in order; nothing is kept.

    Both are float32. A has the scale 1 / sqrt(d), after the norms of query and key where the model has them.
    """
    blocks: Any = model.blocks
    hooks = [block.attn.register_forward_pre_hook(_hook(number, visit)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(number: int, visit: Visit) -> Callable[[Any, tuple[Tensor, ...]], None]:
    @torch.no_grad()
    def before(attention: Any, inputs: tuple[Tensor, ...]) -> None:
        query, key, operator = _source(attention, inputs[0])
        raw = query @ key.mT / query.shape[-1] ** 0.5
        learned = raw.softmax(-1) if operator is None else operator.scores(query, key)
        visit(number, raw, learned)

    return before


def _source(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Query and key [B, h, N, d] as the layer itself has them, and its operator; None for softmax."""
    if isinstance(attention, TransferredAttention):
        assert isinstance(attention.teacher, Teacher)
        return *attention.teacher.query_and_key(attention.block), attention.teacher.operator(attention.block)
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    return attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), getattr(attention, "operator", None)
