"""Attention maps of images, the regions of the dominant head, and attention rollout (paper, section 5.4).

Maps and rollout are those of the class token. `LastBlock` keeps the attention that the patches of a batch get in the
last block, and shows that of the dominant head.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import interpolate

from karat_scale.commands.analyze.result import NothingToShowError, Result, Settings, Table, note_bad_images
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.figures import new_figure, show_map
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models.attention_matrices import can_be_watched, watched
from karat_scale.models.factory import layer_sizes
from karat_scale.models.layers import attention_layers
from karat_scale.recipe import ModelConfig

MAX_HEADS = 12
REGION_SHARE = 0.6


def rollout_step(learned: Tensor) -> Tensor:
    """Return one block's factor of attention rollout (Abnar and Zuidema, 2020), [B, N, N] with rows that sum to one.

    Heads are averaged, negative weights are set to zero, and the residual path counts half.
    """
    mean = learned.clamp(min=0).mean(1)
    mean = mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)
    joint = mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    return joint / joint.sum(-1, keepdim=True)


def _with_prefix(joint: Tensor, tokens: int) -> Tensor:
    """Extend the factor [B, M, M] of a block that has only the last M of N tokens; the others attend to themselves."""
    missing = tokens - joint.shape[-1]
    wider = torch.eye(tokens, dtype=joint.dtype, device=joint.device).repeat(len(joint), 1, 1)
    wider[:, missing:, missing:] = joint
    return wider


def dominant_head(scores: Tensor) -> int:
    """Return the head whose scores of the patches [h, patches] have the largest positive sum.

    It compares scores, as the paper does: learned weights of different heads have no common scale.
    """
    return int(scores.clamp(min=0).sum(-1).argmax())


def region(weights: Tensor, share: float = REGION_SHARE) -> Tensor:
    """Return the smallest set of patches that holds `share` of the positive weight, as a mask [patches]."""
    positive = weights.clamp(min=0)
    order = positive.argsort(descending=True)
    before = positive[order].cumsum(0) - positive[order]
    mask = torch.zeros_like(positive, dtype=torch.bool)
    mask[order] = (before < share * positive.sum()) & (positive[order] > 0)
    return mask


@torch.no_grad()
def analyze_maps(run: TrainedRun, settings: Settings) -> Result:
    """Plot maps of `settings.block` for the images of `settings.image_ids`.

    Raises:
        NothingToShowError: the model has no class token.
        UserError: the block or image does not exist.
    """
    model: Any = run.model()
    images = run.images(4, settings.image_ids)
    host, sizes = run.recipe.model.name, layer_sizes(run.recipe.model)
    depth = len(sizes)
    if not -depth <= settings.block < depth:
        raise RunDirectoryError(f"{run.path}: --block {settings.block}: it has blocks 0 to {depth - 1}")
    if getattr(model, "cls_token", None) is None or not hasattr(model, "num_prefix_tokens"):
        raise NothingToShowError(f"{host} has no class token with a single patch grid")
    block, prefix, grid = settings.block % depth, model.num_prefix_tokens, model.patch_embed.grid_size
    with_token = [number for number, size in enumerate(sizes) if size.tokens == prefix + grid[0] * grid[1]]
    if block not in with_token:
        first = with_token[0]
        raise RunDirectoryError(
            f"{run.path}: --block {block}: {host} adds the class token in block {first}; use that or a later one"
        )
    pictures, labels, ids = [], [], []
    # The class token's rows: raw, learned [images, h, patches] of one block, rollout [images, patches] over all.
    rows_of: dict[str, list[Tensor]] = {"raw": [], "learned": [], "rollout": []}
    joint = torch.empty(0)

    def visit(number: int, raw: Tensor, learned: Tensor) -> None:
        nonlocal joint
        if number == block:
            rows_of["raw"].append(raw[:, :, 0, prefix:].cpu())
            rows_of["learned"].append(learned[:, :, 0, prefix:].cpu())
        step = rollout_step(learned)
        joint = step if number == 0 else step @ _with_prefix(joint, step.shape[-1])

    with watched(model, visit):
        for batch in images.raw(settings.batch):
            pictures.append(batch.images)
            labels += batch.labels.tolist()
            ids += batch.sample_ids.tolist()
            model(images.normalized(batch, run.device))
            rows_of["rollout"].append(joint[:, 0, prefix:].cpu())  # only now it covers all blocks
            settings.progress("maps", len(ids), len(images))
    raw, learned, rollout = (torch.cat(parts) for parts in rows_of.values())
    result = Result()
    result.arrays = {"raw": raw.numpy(), "learned": learned.numpy(), "rollout": rollout.numpy()}
    result.arrays["sample_ids"] = np.array(ids)
    what = run.matrix_name
    rows = []
    for index, picture in enumerate(torch.cat(pictures)):
        name = images.classes[labels[index]]
        head = dominant_head(raw[index])
        negative = float((learned[index] < 0).double().mean())
        rows.append([ids[index], name, head, 100 * negative, float(learned[index].sum(-1).mean())])
        figure = partial(_draw, picture, raw[index], learned[index], rollout[index], head, grid, what)
        caption = (
            f"Image {ids[index]} ({name}), block {block}. Top: the scores A of the class token; below: {what}; "
            "negatives as 0, each map from 0 (dark) to its largest value. Left: the image, the region with "
            f"{REGION_SHARE:.0%} of the dominant head's positive scores (head {head}), and the rollout over all blocks."
        )
        result.figures[f"image_{ids[index]}"] = figure, caption
    names = ("id", "class", "dominant_head", "negative_percent")
    result.numbers = {"block": block, "images": [dict(zip(names, row, strict=False)) for row in rows]}
    columns = ["image", "class", "dominant head", "weights below zero, %", "sum over patches, mean of heads"]
    result.tables.append(Table(f"Class token of block {block}", columns, rows))
    note_bad_images(result, images.bad)
    return result


def _draw(
    picture: Tensor, raw: Tensor, learned: Tensor, rollout: Tensor, head: int, grid: tuple[int, int], what: str
) -> Figure:
    heads = min(len(raw), MAX_HEADS)
    figure = new_figure(1.35 * (heads + 2), 3.3)
    axes = figure.subplots(2, heads + 2, squeeze=False)
    pixels = picture.permute(1, 2, 0).numpy()
    show_map(axes[0, 0], pixels, "image")
    mask = _enlarged(region(raw[head]).double().view(grid), pixels.shape[:2])
    show_map(axes[1, 0], (pixels * (0.25 + 0.75 * mask[..., None].numpy())).astype(np.uint8), f"head {head}'s region")
    show_map(axes[0, 1], rollout.view(grid).numpy(), "rollout", **_from_zero(rollout))
    show_map(axes[1, 1], pixels)
    overlay = _enlarged(rollout.view(grid).double(), pixels.shape[:2])
    show_map(axes[1, 1], overlay.numpy(), "rollout on it", alpha=0.55, cmap="magma", **_from_zero(rollout))
    shown = [*range(heads - 1), max(head, heads - 1)]  # the dominant head in any case
    for column, number in enumerate(shown, 2):
        mark = " *" if number == head else ""
        for row, values, of in ((0, raw, "A"), (1, learned, what)):
            weights = values[number].clamp(min=0)
            title = f"{of}, head {number}{mark}\nup to {weights.max():.2g}"
            show_map(axes[row, column], weights.view(grid).numpy(), title, **_from_zero(weights))
    return figure


def _from_zero(weights: Tensor) -> dict[str, float]:
    """Return the limits of a map's colours, from 0 to its largest value."""
    return {"vmin": 0.0, "vmax": max(float(weights.max()), 1e-12)}


def _enlarged(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a map of patches [rows, columns] in the image's own pixels."""
    return interpolate(values[None, None], size=size, mode="nearest")[0, 0]


class NoMapError(Exception):
    """The model has no attention map of an image; the message is the reason."""


@dataclass
class LastBlock:
    """The attention that each patch of the last block gets in a batch: from the class token, else from all patches.

    scores, weights: A and S, [B, h, patches], of the latest forward pass.
    """

    block: int
    prefix: int
    grid: tuple[int, int]
    has_class_token: bool
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, model: nn.Module, config: ModelConfig) -> "LastBlock":
        """Return the place of the map in a model. Raises NoMapError if there is none."""
        if not attention_layers(model) or not can_be_watched(model):
            raise NoMapError(f"the attention matrices of {config.name} cannot be read")
        sizes = layer_sizes(config)
        last = sizes[-1]
        if last.sets != 1:
            raise NoMapError(f"the last block of {config.name} attends within {last.sets} windows, not over the image")
        grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        prefix = last.tokens - grid[0] * grid[1] if grid else -1
        if prefix < 0 or prefix != getattr(model, "num_prefix_tokens", 0):
            side = math.isqrt(last.tokens)  # of the last of several stages
            if side**2 != last.tokens:
                raise NoMapError(f"the {last.tokens} tokens of {config.name}'s last block are not a square grid")
            prefix, grid = 0, (side, side)
        has_class_token = prefix > 0 and getattr(model, "cls_token", None) is not None
        return cls(len(sizes) - 1, prefix, grid, has_class_token)

    def overlay(self, row: int, size: tuple[int, int]) -> tuple[int, Tensor]:
        """Return the dominant head of an image of the batch, and its weights S over the image's own pixels, [H, W].

        Negative weights are shown as 0. The head is chosen by the scores, as in `karat analyze`.
        """
        head = dominant_head(self.scores[row])
        return head, _enlarged(self.weights[row, head].clamp(min=0).view(self.grid), size)

    def visit(self, number: int, raw: Tensor, learned: Tensor) -> None:
        """Keep what the last block of a forward pass computes, given A and S [B, h, N, N]. See `watched`."""
        if number == self.block:
            both = torch.stack((raw, learned))
            rows = both[..., 0, :] if self.has_class_token else both[..., self.prefix :, :].mean(-2)
            self.scores, self.weights = rows[..., self.prefix :].cpu()
