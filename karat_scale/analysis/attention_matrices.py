"""The attention matrices of a model, block by block, while it runs: scores before the operator and weights after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from karat_scale.analysis.result import Settings
from karat_scale.analysis.trained_run import TrainedRun
from karat_scale.analysis.validation_images import ValidationImages
from karat_scale.models import convit, swin
from karat_scale.models.layers import attention_layers
from karat_scale.models.transfer import Teacher, TransferredAttention

Visit = Callable[[int, Tensor, Tensor], None]
"""A function that receives the block's index, A [B, h, N, N] before the operator, and S (or softmax(A)) after it.

In a Swin, each window is an item of the batch, A includes the position bias, and masked pairs are 0 in both.
"""
Matrices = tuple[Tensor, Tensor]


@contextmanager
def watched(model: nn.Module, visit: Visit) -> Iterator[None]:
    """Call `visit` for each block of each forward pass inside the `with`, in order; nothing is kept.

    Both are float32. A includes the scale 1 / sqrt(d), and the norms of query and key if the model has them.
    """
    hooks = [
        layer.attention.register_forward_pre_hook(_hook(number, visit), with_kwargs=True)
        for number, layer in enumerate(attention_layers(model))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def visit_images(
    model: nn.Module, run: TrainedRun, images: ValidationImages, settings: Settings, what: str, visit: Visit
) -> int:
    """Call `visit` for each block on each batch of images, and show the progress as `what`; return their number."""
    done = 0
    with watched(model, visit):
        for batch, _ in images.batches(settings.batch, run.device):
            model(batch)
            done += len(batch)
            settings.progress(what, done, len(images))
    return done


def _hook(number: int, visit: Visit) -> Callable[[Any, tuple[Tensor, ...], dict[str, Any]], None]:
    @torch.no_grad()
    def before(attention: Any, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        matrices = next(read for kind, read in _READERS.items() if isinstance(attention, kind))
        visit(number, *matrices(attention, inputs[0], settings.get("mask")))

    return before


def _of_transferred(attention: Any, *_: Any) -> Matrices:
    assert isinstance(attention.teacher, Teacher)
    teacher = attention.teacher
    query, key = teacher.query_and_key(attention.block)
    raw, learned = _of_pair(query, key, teacher.operator(attention.block))
    return teacher.matrices(raw), teacher.matrices(learned)


def _of_plain(attention: Any, x: Tensor, _: None) -> Matrices:
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    return _of_pair(attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), getattr(attention, "operator", None))


def _of_mhsa(attention: Any, x: Tensor, _: None) -> Matrices:
    query, key = convit.query_key_value(attention, x)[:2]
    return _of_pair(query, key, getattr(attention, "operator", None))


def _of_gated(attention: Any, x: Tensor, _: None) -> Matrices:
    """Return A of the patches' contents only; the layer mixes its softmax with that of the positions."""
    query, key = attention.qk(x).unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query @ key.mT * attention.scale, attention.get_attention(x)


def _of_window(attention: Any, x: Tensor, mask: Tensor | None) -> Matrices:
    query, key, _, bias, keep = swin.parts_of(attention, x, mask)
    raw = query @ key.mT / query.shape[-1] ** 0.5 + bias
    operator = getattr(attention, "operator", None)
    if operator is not None:
        learned = operator.scores(query, key, bias=bias, mask=keep)
    else:
        learned = (raw if keep is None else raw.masked_fill(~keep, -torch.inf)).softmax(-1)
    return raw if keep is None else raw.masked_fill(~keep, 0), learned


def _of_pair(query: Tensor, key: Tensor, operator: Any) -> Matrices:
    """Return query and key [B, h, N, d] of the layer, and its operator, or None for softmax."""
    raw = query @ key.mT / query.shape[-1] ** 0.5
    return raw, raw.softmax(-1) if operator is None else operator.scores(query, key)


# By class, the most specific first. Each function receives the layer, its tokens and a Swin's mask.
_READERS: dict[type[nn.Module], Callable[..., Matrices]] = {
    TransferredAttention: _of_transferred,
    Attention: _of_plain,
    MHSA: _of_mhsa,
    GPSA: _of_gated,
    WindowAttention: _of_window,
}
