"""The eigenvalues of a symmetric operator that are largest in size, from products with vectors: block Lanczos."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOLERANCE = 1e-3
ROUNDING = 1e-6
KEPT, ROWS = 2, 5
"""Size of the basis, as a multiple of the number of eigenvalues: after a restart, and at most."""
CHUNK = 1 << 18
Vector = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Eigenvalue:
    """`converged`: True if ||H v - value v|| is at most TOLERANCE |value| for its unit vector v."""

    value: float
    converged: bool


def largest_eigenvalues(
    times: Callable[[Vector], Vector], length: int, count: int, products: int, seed: int, file: Path
) -> list[Eigenvalue]:
    """Return the `count` eigenvalues largest in size, with sign, largest first; all of them if there are fewer.

    The Krylov space starts with `count` random vectors, so that equal eigenvalues are all found. Its basis is fully
    orthogonalised. When it reaches its greatest size, the method restarts with the best of its eigenvectors.

    Args:
        times: returns H v for v [length].
        products: most products, at least `count`; an eigenvalue that has not converged by then is marked.
        file: the file for the basis, ROWS * count vectors; in memory it would take as much as many models.

    Raises:
        OSError: there is no space for the basis.
    """
    count = min(count, length)
    basis = _Basis(file, ROWS * count, length)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        basis.append(generator.standard_normal(length, dtype=np.float32))
    projected = np.zeros((ROWS * count, ROWS * count))  # H in the basis; its first `done` vectors are multiplied
    done, found = 0, [Eigenvalue(float("nan"), False)] * count
    for _ in range(products):
        column = basis.append(times(basis.row(done)), np.abs(projected).max())
        if not np.isfinite(column).all():
            break
        projected[: len(column), done] = projected[done, : len(column)] = column
        done += 1
        values, vectors = np.linalg.eigh(projected[:done, :done])
        outside = projected[done : basis.filled, :done] @ vectors
        settled = np.linalg.norm(outside, axis=0) <= TOLERANCE * np.abs(values)
        order = np.argsort(-np.abs(values))
        found = [Eigenvalue(float(values[i]), bool(settled[i])) for i in order[:count]]
        if done == basis.filled or (done >= count and all(one.converged for one in found)):
            break
        if done == (ROWS - 1) * count:
            best = order[: KEPT * count]
            basis.restart(vectors[:, best])
            projected = _restarted(values[best], outside[:, best], ROWS * count)
            done = len(best)
    return found


def _restarted(values: Array, outside: Array, rows: int) -> Array:
    """H [rows, rows] in a basis of its vectors of these `values`, and of those with what they have outside."""
    known = np.vstack((np.diag(values), outside))
    projected = np.zeros((rows, rows))
    projected[: len(known), : len(values)] = known
    projected[: len(values), : len(known)] = known.T
    return projected


class _Basis:
    """Orthonormal vectors, float32 [filled, length], in a file of `rows` of them."""

    def __init__(self, path: Path, rows: int, length: int) -> None:
        self._path, self._shape, self.filled = path, (rows, length), 0
        with path.open("wb") as file:  # allocate now: a mapped file that finds no space later kills the process
            os.posix_fallocate(file.fileno(), 0, 4 * rows * length)

    def _pieces(self) -> Iterator[tuple[slice, Vector]]:
        """Yield all rows, in pieces. Each is a new mapping, since the pages of one would add up in memory."""
        for start in range(0, self._shape[1], CHUNK):
            piece = slice(start, start + CHUNK)
            yield piece, np.memmap(self._path, np.float32, "r+", shape=self._shape)[:, piece]

    def row(self, number: int) -> Vector:
        """Return a copy of one vector."""
        row = np.empty(self._shape[1], np.float32)
        for piece, rows in self._pieces():
            row[piece] = rows[number]
        return row

    def append(self, vector: Vector, scale: float = 0.0) -> Array:
        """Add the part of a vector that is not in the span yet, if it exceeds rounding of numbers as large as `scale`.

        Args:
            vector: is overwritten.

        Returns:
            The vector's coordinates in the extended basis.
        """
        along = np.zeros(self.filled)
        for _ in range(2):  # once leaves the rounding errors of the part that was subtracted
            change, square = np.zeros(self.filled), 0.0
            for piece, rows in self._pieces():
                change += rows[: self.filled].astype(np.float64) @ vector[piece]
            for piece, rows in self._pieces():
                vector[piece] -= (change @ rows[: self.filled]).astype(np.float32)
                square += float(np.square(vector[piece], dtype=np.float64).sum())
            along += change
        if square**0.5 <= ROUNDING * max(scale, np.abs(along).max(initial=0)):
            return along
        for piece, rows in self._pieces():
            rows[self.filled] = vector[piece] / square**0.5
        self.filled += 1
        return np.append(along, square**0.5)

    def restart(self, mixing: Array) -> None:
        """Replace the first `used` vectors by combinations [used, kept] of them; the vectors after them follow."""
        used, kept = mixing.shape
        rest = self.filled - used
        for _, rows in self._pieces():
            rows[: kept + rest] = np.concatenate((mixing.T @ rows[:used], rows[used : self.filled]))
        self.filled = kept + rest
