"""The attention matrices of a model, block by block, while it runs: how to watch, replace and measure them.

Watching shows the scores before the operator and the weights after it. A plain ViT also runs with attention matrices
other than its own: what it then loses shows what it used them for.

The measures say what S depends on: how much of it changes with the query and with the image, and how large it is.
Attention that gives each query the same row, or each image the same matrix, mixes positions as a constant would. So
these shares show whether a comparison with softmax can say anything about learned functions of the scores.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import Attention
from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from karat_scale.attention.operator import layer_input
from karat_scale.foundation.errors import UserError
from karat_scale.models import hosts
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import heads_of
from karat_scale.models.transfer import Teacher, TransferredAttention

Visit = Callable[[int, Tensor, Tensor], None]
"""A function that receives the block's index, A [B, h, N, N] before the operator, and S (or softmax(A)) after it.

In a Swin, each window is an item of the batch, A includes the position bias, and masked pairs are 0 in both.
"""
Matrices = tuple[Tensor, Tensor]


@contextmanager
def watched(model: nn.Module, visit: Visit) -> Iterator[None]:
    """Call `visit` for each block of each forward pass inside the `with`, in order; nothing is kept.

    A and S are computed in the precision of the forward pass, and are float32 or better. A includes the scale
    1 / sqrt(d), and the norms of query and key if the model has them. For controls that do not read A (`static`,
    `scores: false`), A is computed from their layer's query and key.
    """
    with ExitStack() as hooks:
        for number, layer in enumerate(attention_layers(model)):
            show = partial(_show, number, visit)
            hooks.enter_context(layer.attention.register_forward_pre_hook(show, with_kwargs=True))
        yield


@torch.no_grad()
def _show(number: int, visit: Visit, attention: Any, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
    matrices = next((read for kind, read in _READERS.items() if isinstance(attention, kind)), None)
    if matrices is None:
        raise UserError(f"the attention matrices of {type(attention).__name__} cannot be read; add it to _READERS")
    raw, learned = matrices(attention, inputs[0], settings.get("mask"))
    visit(number, *(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (raw, learned)))


def _of_transferred(attention: Any, *_: Any) -> Matrices:
    assert isinstance(attention.teacher, Teacher)
    teacher = attention.teacher
    query, key = teacher.query_and_key(attention.block)
    raw, learned = scores_and_matrix(query, key, teacher.operator(attention.block))
    return teacher.matrices(raw), teacher.matrices(learned)


def _of_gated(attention: Any, x: Tensor, _: None) -> Matrices:
    """Return A of the patches' contents only; the layer mixes its softmax with that of the positions."""
    query, key = attention.qk(x).unflatten(-1, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query @ key.mT * attention.scale, attention.get_attention(x)


def _of_query_and_key(attention: Any, x: Tensor, mask: Tensor | None) -> Matrices:
    query, key, bias, keep = _inputs(attention, x, mask)
    operator = getattr(attention, "operator", None)
    raw = scores_of(query, key, operator)
    raw = raw if bias is None else raw + bias
    if operator is not None:
        learned = operator.scores(query, key, bias=bias, mask=keep, **layer_input(operator, x))
    else:
        learned = (raw if keep is None else raw.masked_fill(~keep, -torch.inf)).softmax(-1)
    return raw if keep is None else raw.masked_fill(~keep, 0), learned


def _inputs(attention: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return query and key, and a Swin's bias and the pairs that take part."""
    if isinstance(attention, WindowAttention):
        query, key, _, bias, keep = hosts.parts_of(attention, x, mask)
        return query, key, bias, keep
    query, key, _ = hosts.query_key_value(attention, x)
    return query, key, None, None


def scores_of(query: Tensor, key: Tensor, operator: Any) -> Tensor:
    """Return A of query and key [B, h, N, d] as the layer's operator gets it; None for softmax."""
    if operator is not None:
        query, key = operator.bounded(query, key)
    scores: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    return scores


def scores_and_matrix(query: Tensor, key: Tensor, operator: Any, x: Tensor | None = None) -> Matrices:
    """Return A and S of query and key [B, h, N, d] and a layer's input x, for its operator, or None for softmax."""
    raw = scores_of(query, key, operator)
    return raw, raw.softmax(-1) if operator is None else operator.scores(query, key, **layer_input(operator, x))


# By class, the most specific first. Each function receives the layer, its tokens and a Swin's mask.
_READERS: dict[type[nn.Module], Callable[..., Matrices]] = {
    TransferredAttention: _of_transferred,
    Attention: _of_query_and_key,
    MHSA: _of_query_and_key,
    GPSA: _of_gated,
    WindowAttention: _of_query_and_key,
}


def can_be_watched(model: nn.Module) -> bool:
    """Return whether `watched` can read every attention layer; layers of your own model family may be unknown."""
    return all(isinstance(layer.attention, tuple(_READERS)) for layer in attention_layers(model))


Replace = Callable[[int, Tensor], Tensor]
"""A function of the block's index and S [B, h, N, N] that returns the matrix to use as S, with or without axis B."""


def can_be_replaced(model: nn.Module) -> bool:
    """Return whether `replaced` supports all attention layers: plain ViTs with O = S V and without transfer."""
    layers = [layer.attention for layer in attention_layers(model)]
    return all(
        isinstance(layer, Attention)
        and not isinstance(layer, TransferredAttention)
        and getattr(heads_of(layer), "is_linear", True)
        for layer in layers
    )


@contextmanager
def replaced(model: nn.Module, replace: Replace) -> Iterator[None]:
    """Run each attention layer inside the `with` as O = S' V with S' = replace(block, S)."""
    with ExitStack() as hooks:
        for number, layer in enumerate(attention_layers(model)):
            hooks.enter_context(layer.attention.register_forward_hook(partial(_join, number, replace)))
        yield


@torch.no_grad()
def _join(number: int, replace: Replace, attention: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    query, key, value = hosts.query_key_value(attention, inputs[0])
    learned = scores_and_matrix(query, key, getattr(attention, "operator", None), inputs[0])[1]
    return hosts.join_heads(attention, inputs[0], replace(number, learned).to(value.dtype) @ value)


def mean_over_queries(_: int, learned: Tensor) -> Tensor:
    """Give each query the mean of all queries' rows."""
    return learned.mean(2, keepdim=True).expand_as(learned)


FIGURES = ("by_query", "by_image", "beyond_pi", "frobenius_norm")
"""The figures of a block: the shares of S's energy that depend on the query and on the image, the share of scores with
|A| > pi among those that are not masked, and the mean Frobenius norm of S."""


class Content:
    """Sums over images of one model's S and A, by block; of the matrices, only the sum over images is kept, by head."""

    def __init__(self, blocks: int) -> None:
        self._matrices: list[Tensor | float] = [0.0] * blocks
        self._sums = np.zeros((blocks, 5))
        self._images, self._count = np.zeros(blocks), np.zeros(blocks)

    def add(self, block: int, raw: Tensor, learned: Tensor, images: int | None = None) -> None:
        """Add A and S [B, h, N, N] of one block.

        `images` is the number of images, by default B; B is a multiple of it. Windows of one image differ by what they
        may see, so a window is compared with the same window of the other images.
        """
        learned = learned.double()
        queries, images = learned.shape[2], images or len(learned)
        self._matrices[block] = self._matrices[block] + learned.unflatten(0, (images, -1)).sum(0)
        energy = learned.square().sum()
        # The part of each column of S that all queries share.
        shared = queries * learned.mean(2).square().sum()
        norms = torch.linalg.matrix_norm(learned).sum()
        beyond, pairs = (raw.abs() > math.pi).sum(), raw.count_nonzero()  # masked pairs are 0
        self._sums[block] += torch.stack((energy, shared, norms, beyond.double(), pairs.double())).cpu().numpy()
        self._images[block] += images
        self._count[block] += learned.shape[:2].numel()

    def means(self) -> list[Tensor | float]:
        """Return the mean of S over images [B / images, h, N, N] of each block, float64."""
        return [matrix / n for matrix, n in zip(self._matrices, self._images, strict=True)]

    def figures(self) -> npt.NDArray[np.float64]:
        """Return `FIGURES` of each block [L, 4]."""
        energy, shared, norms, beyond, pairs = self._sums.T
        same = [float(torch.as_tensor(x).square().sum()) / n for x, n in zip(self._matrices, self._images, strict=True)]
        parts = (shared, np.array(same))
        kept = (np.divide(part, energy, out=np.ones_like(energy), where=energy > 0) for part in parts)  # S may be 0
        depends = ((1 - one).round(12) + 0.0 for one in kept)  # no -2e-16, no -0
        return np.stack((*depends, beyond / np.maximum(pairs, 1), norms / self._count), 1)


@torch.no_grad()
def content_of(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor) -> dict[str, list[float]]:
    """Return `FIGURES`, each as a list over blocks, of normalised images [B, 3, H, W].

    `forward` calls the model, and perhaps more. The forward pass is not compiled.
    """
    content = Content(len(attention_layers(model)))
    with torch.compiler.set_stance("force_eager"), watched(model, partial(content.add, images=len(images))):
        forward(images)
    values = content.figures().round(6).T.tolist()
    return dict(zip(FIGURES, values, strict=True))


# The largest number of queries of an image that are looked at.
_QUERIES = 64


def reaches(model: nn.Module) -> dict[int, float]:
    """Return the `reach` of each block whose functions have one, by the block's number."""
    heads = {number: heads_of(layer.attention) for number, layer in enumerate(attention_layers(model))}
    found = {number: one.reach for number, one in heads.items() if one is not None}
    return {number: reach for number, reach in found.items() if reach < math.inf} if can_be_watched(model) else {}


@torch.no_grad()
def beyond_reach(model: nn.Module, forward: Callable[[Tensor], object], images: Tensor) -> Tensor:
    """Return the share of scores beyond each of `reaches` [blocks], from a sample of the queries of normalised images.

    `forward` calls the model, and perhaps more. The forward pass is not compiled.
    """
    shares: list[Tensor] = []

    def look(reach: float, attention: Any, inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
        query, key, bias, keep = _inputs(attention, inputs[0], settings.get("mask"))
        rows = slice(None, None, math.ceil(query.shape[2] / _QUERIES))
        heads = heads_of(attention)
        assert heads is not None
        scores = scores_of(query[:, -heads.num_heads :, rows], key[:, -heads.num_heads :], heads)
        if bias is not None:
            scores = scores + bias[:, -heads.num_heads :, rows]
        beyond = scores.abs() > reach
        if keep is None:
            shares.append(beyond.float().mean())
        else:
            kept = keep[:, :, rows].expand_as(beyond)
            shares.append((beyond & kept).sum() / kept.sum())

    layers = attention_layers(model)
    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for number, reach in reaches(model).items():
            attention = layers[number].attention
            hooks.enter_context(attention.register_forward_pre_hook(partial(look, reach), with_kwargs=True))
        forward(images)
    return torch.stack(shares)
