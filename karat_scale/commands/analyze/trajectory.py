"""The path of the weights through training: PCA of their changes over checkpoints (paper, sections 5.1 and 5.2)."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.foundation.errors import RunDirectoryError

CHUNK = 1 << 20
NEEDED = 3


@dataclass(frozen=True)
class Plane:
    """Two orthonormal directions through a point of weight space.

    names: the checkpoints, oldest first; the last is the origin. coordinates: [n, 2], their positions in the plane.
    shares: [2], the share along each of the squared distances from the last checkpoint (the changes are not centred, so
    this is not variance). directions: [2, P], float32.
    """

    names: list[str]
    coordinates: npt.NDArray[np.float64]
    shares: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float32]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that make up a point of weight space, in the order of its coordinates."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def flatten(model: nn.Module) -> Tensor:
    """Return all trainable weights as one vector [P], float32, on the CPU."""
    return torch.cat([parameter.detach().flatten().float().cpu() for _, parameter in trainable(model)])


class _OnDisk:
    """Float32 [n, P] in a file. Each piece is a new mapping, since the pages of one mapping would add up in memory."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path, self.shape = path, shape

    def __getitem__(self, where: tuple[slice, slice]) -> npt.NDArray[np.float32]:
        return np.array(np.memmap(self._path, dtype=np.float32, mode="r", shape=self.shape)[where])


def principal_plane(changes: "npt.NDArray[np.float32] | _OnDisk", names: list[str]) -> Plane:
    """Return the PCA of changes [n, P] from the last checkpoint, not centred, so that the plane contains the origin.

    Only the n x n matrix of inner products is decomposed, and P is processed in pieces.
    """
    gram = np.zeros((changes.shape[0], changes.shape[0]))
    for start in range(0, changes.shape[1], CHUNK):
        piece = changes[:, start : start + CHUNK].astype(np.float64)
        gram += piece @ piece.T
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2].clip(min=1e-30), vectors[:, ::-1][:, :2]
    # Signs that do not depend on the machine: all ranks need the same plane.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), [0, 1]])
    directions = np.empty((2, changes.shape[1]), dtype=np.float32)
    for start in range(0, changes.shape[1], CHUNK):
        piece = changes[:, start : start + CHUNK].astype(np.float64)
        directions[:, start : start + CHUNK] = (vectors / np.sqrt(values)).T @ piece
    coordinates = vectors * np.sqrt(values)
    return Plane(names, coordinates, values / max(float(np.trace(gram)), 1e-30), directions)


def plane_of_run(
    run: TrainedRun, notes: list[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> Plane:
    """Return the plane of a run's raw weights. Raises RunDirectoryError if too few checkpoints can be loaded.

    Args:
        notes: receives a line for each damaged checkpoint that is left out.
        progress: hears how many checkpoints are read, and of how many.
    """
    names = []
    model = run.new_model()
    run.load_newest(model)
    last = flatten(model).numpy()
    # On disk, since all checkpoints' weights together may not fit in memory.
    with tempfile.TemporaryDirectory(prefix="karat-analysis-") as directory:
        path = Path(directory) / "changes"
        with path.open("wb") as file:
            for number, name in enumerate(run.in_order, start=1):
                progress(number, len(run.in_order))
                try:
                    run.load(model, name, "raw")
                except RunDirectoryError as error:
                    notes.append(f"left out: {error}")
                    continue
                file.write((flatten(model).numpy() - last).data)
                names.append(name)
        if len(names) < NEEDED:
            raise RunDirectoryError(
                f"{run.path}: {len(names)} checkpoints and snapshots, but PCA of the path needs {NEEDED}; "
                "train with checkpoint.snapshots=10"
            )
        return principal_plane(_OnDisk(path, (len(names), len(last))), names)
