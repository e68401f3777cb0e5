"""Losses on a grid of points in a plane of weight space, kept after every row so that a killed command goes on."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karat_scale.analysis.trajectory import flatten, unflatten_into
from karat_scale.files import write_atomically

Array = npt.NDArray[np.float64]
Directions = npt.NDArray[np.float32]


def loss_grid(
    model: nn.Module,
    loss: Callable[[], float],
    directions: Directions,
    first: Array,
    second: Array,
    partial: Path,
    identity: str,
    progress: Callable[[int, int], None],
) -> Array:
    """loss() at weights + a d1 + b d2 for a in `first` and b in `second`: [len(second), len(first)].

    Args:
        model: whose weights are the origin; they are as before afterwards.
        loss: of the model as it stands.
        directions: d1 and d2, [2, P].
        partial: a file of the rows done, removed at the end. One of other inputs is not used.
        identity: what else the losses depend on, such as checkpoint and images.
    """
    origin = flatten(model)
    key = _fingerprint(identity, origin.numpy(), directions, first, second)
    losses = _done(partial, key, (len(second), len(first)))
    one, two = torch.from_numpy(directions)
    try:
        for row in np.flatnonzero(np.isnan(losses).any(1)):
            for column, a in enumerate(first):
                unflatten_into(model, _point(origin, one, float(a), two, float(second[row])))
                losses[row, column] = loss()
                progress(int(row) * len(first) + column + 1, losses.size)
            content = io.BytesIO()
            np.savez(content, key=key, losses=losses)
            write_atomically(partial, content.getvalue())
    finally:
        unflatten_into(model, origin)
    partial.unlink(missing_ok=True)
    return losses


def filter_normalised(model: nn.Module, seed: int) -> Directions:
    """Two random directions [2, P] whose filters have the norms of the model's own (Li et al., 2018).

    A filter is one output's weights; of KArAt's parameters, one function's row (p) or token's row of W. Biases and
    norms do not move.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        parts = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            weights = parameter.detach().float().cpu()
            noise = torch.randn(weights.shape, generator=generator)
            if weights.dim() < 2:
                noise.zero_()
            else:
                kept = 2 if ".operator." in name or weights.shape[0] == 1 else 1
                over = tuple(range(min(kept, weights.dim() - 1), weights.dim()))
                size = noise.square().sum(over, keepdim=True).sqrt().clamp(min=1e-12)
                noise *= weights.square().sum(over, keepdim=True).sqrt() / size
            parts.append(noise.flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows).numpy()


def _point(origin: Tensor, one: Tensor, a: float, two: Tensor, b: float) -> Tensor:
    return origin.add(one, alpha=a).add_(two, alpha=b)


def _fingerprint(identity: str, *arrays: npt.NDArray[np.floating]) -> str:
    digest = hashlib.sha256(identity.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _done(partial: Path, key: str, shape: tuple[int, int]) -> Array:
    """The rows that an earlier command finished; nan elsewhere."""
    if partial.is_file():
        with np.load(partial) as content:
            if str(content["key"]) == key:
                losses: Array = content["losses"]
                return losses
    return np.full(shape, np.nan)
