"""Losses on a grid of points in a plane of weight space. Ranks share the points; results are saved in between."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karat_scale.attention import KaratOperator
from karat_scale.attention.form_parameters import SECOND
from karat_scale.commands.analyze.trajectory import flatten, trainable
from karat_scale.engine.distributed import ALONE, World
from karat_scale.foundation.files import open_regular, replace_file

Array = npt.NDArray[np.float64]
Directions = npt.NDArray[np.float32]


@dataclass
class _Known:
    """The losses [len(second), len(first)] so far, and a mask of those that are done, for the inputs with `key`."""

    key: str
    losses: Array
    done: npt.NDArray[np.bool_]


def loss_grid(
    model: nn.Module,
    loss: Callable[[], float],
    directions: Directions,
    first: Array,
    second: Array,
    partial: Path,
    identity: str,
    progress: Callable[[int, int], None],
    world: World = ALONE,
) -> Array:
    """Return loss() at weights + a d1 + b d2 for a in `first`, b in `second`: [len(second), len(first)]. Collective.

    The ranks share the points. Each saves its results after every row's worth of points, so a command that was stopped
    resumes from there, on any number of ranks.

    Args:
        model: its weights are the origin; they are restored afterwards.
        loss: the loss of the model with its current weights.
        directions: d1 and d2, [2, P].
        partial: path prefix of files of finished points, removed at the end. Files of other inputs are ignored.
        identity: everything else that the losses depend on, such as checkpoint and images.
    """
    origin = flatten(model)
    known: Any = None
    with world.together():
        if world.is_main:
            key = _fingerprint(identity, origin.numpy(), directions, first, second)
            known = _read(partial, _Known(key, *_nothing((len(second), len(first)))))
    known = world.broadcast(known)
    mine = np.flatnonzero(~known.done)[world.rank :: world.size]
    with world.together():
        try:
            for number, point in enumerate(mine, start=1):
                row, column = divmod(int(point), len(first))
                _move(model, origin, directions, float(first[column]), float(second[row]))
                known.losses[row, column], known.done[row, column] = loss(), True
                progress(number, len(mine))
                if number % len(first) == 0:
                    _write(partial, world.rank, known)
        finally:
            _move(model, origin, directions, 0.0, 0.0)
    for points, values in world.gather((mine, known.losses.flat[mine])):
        known.losses.flat[points] = values
    if world.is_main:
        for path in _files(partial):
            path.unlink()
    return np.asarray(known.losses)


def filter_normalised(model: nn.Module, seed: int) -> Directions:
    """Return two random directions [2, P] whose filters have the norms of the model's own (Li et al., 2018).

    A filter is the weights of one output. In KArAt's parameters an output is a unit p of a head, whose filter is all
    its functions phi_pq, or the token of a row of W. Biases and norms do not move.
    """
    units = _unit_axes(model)
    generator = torch.Generator().manual_seed(seed)
    directions = np.empty((2, len(flatten(model))), dtype=np.float32)
    for direction in torch.from_numpy(directions):
        start = 0
        for name, parameter in trainable(model):
            weights = parameter.detach().float().cpu()
            noise = direction[start : start + weights.numel()].view_as(weights)
            torch.randn(weights.shape, generator=generator, out=noise)
            start += weights.numel()
            if weights.dim() < 2:
                noise.zero_()
            else:
                outputs = {0} if weights.shape[0] > 1 and ".operator." not in name else {0, units.get(name, 1)}
                over = tuple(axis for axis in range(weights.dim()) if axis not in outputs) or (1,)
                size = noise.square().sum(over, keepdim=True).sqrt().clamp(min=1e-12)
                noise *= weights.square().sum(over, keepdim=True).sqrt() / size
    return directions


def _unit_axes(model: nn.Module) -> dict[str, int]:
    """Return the axis of the units p of each parameter of the operators' functions, by the parameter's name."""
    axes: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, KaratOperator):
            own = {name: shape.index(-1) for name, shape in module.basis.shapes(1, -1, 1).items()}
            axes |= {f"{prefix}.{before}{name}": axis for name, axis in own.items() for before in ("", SECOND)}
    return axes


@torch.no_grad()
def _move(model: nn.Module, origin: Tensor, directions: Directions, a: float, b: float) -> None:
    """Set the weights to origin + a d1 + b d2, one parameter at a time."""
    start = 0
    for _, parameter in trainable(model):
        part = slice(start, start + parameter.numel())
        one, two = torch.from_numpy(directions[:, part])
        parameter.copy_((origin[part] + a * one + b * two).view_as(parameter))
        start = part.stop


def _fingerprint(identity: str, *arrays: npt.NDArray[np.floating]) -> str:
    digest = hashlib.sha256(identity.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _nothing(shape: tuple[int, int]) -> tuple[Array, npt.NDArray[np.bool_]]:
    return np.full(shape, np.nan), np.zeros(shape, dtype=bool)


def _files(partial: Path) -> list[Path]:
    return sorted(partial.parent.glob(f"{partial.name}-*.npz"))


def _read(partial: Path, known: _Known) -> _Known:
    """Load what the ranks of an earlier command saved."""
    for path in _files(partial):
        with os.fdopen(open_regular(path), "rb") as file, np.load(file) as content:
            if str(content["key"]) == known.key:
                known.losses[content["done"]] = content["losses"][content["done"]]
                known.done |= content["done"]
    return known


def _write(partial: Path, rank: int, known: _Known) -> None:
    content = io.BytesIO()
    np.savez(content, key=known.key, losses=known.losses, done=known.done)
    replace_file(partial.with_name(f"{partial.name}-{rank}.npz"), content.getvalue())
