"""The eigenvalues of a symmetric operator that are largest in size, from products with vectors: scipy's Lanczos."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

TOLERANCE = 1e-3
ROWS = 4
"""Size of the basis, as a multiple of the number of eigenvalues."""
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Eigenvalue:
    """`converged`: True if ||H v - value v|| is at most TOLERANCE |value| for its unit vector v."""

    value: float
    converged: bool


def basis_size(count: int, length: int) -> int:
    """Return how many vectors of the operator's length are held in memory."""
    return min(ROWS * (count + 1), length)


def largest_eigenvalues(
    times: Callable[[Vector], Vector], length: int, count: int, products: int, seed: int
) -> list[Eigenvalue]:
    """Return the `count` eigenvalues largest in size, with sign, largest first; all of them if there are fewer.

    One more is computed: of two equal eigenvalues, the last would often be missed. If not all have converged, the
    values that were found are marked, since a larger one may be missing; those that were not found are NaN.

    Args:
        times: returns H v for v [length].
        products: most products.
    """
    count, rows = min(count, length), basis_size(count, length)

    def product(vector: Vector) -> Vector:
        found = times(vector.ravel())
        if not np.isfinite(found).all():
            raise FloatingPointError
        return found

    values, converged = np.zeros(0), False
    restarts = (products - 1 - rows) // max(rows - count - 1, 1)  # ARPACK begins with a product more than rows
    try:
        if rows == length <= products:  # the whole matrix takes no more products
            matrix = np.stack([product(row) for row in np.eye(length, dtype=np.float32)])
            values, converged = np.linalg.eigvalsh((matrix + matrix.T) / 2), True
        elif rows < length and restarts > 0:
            start = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
            operator = LinearOperator((length, length), matvec=product, dtype=np.float32)
            more = {"v0": start, "ncv": rows, "maxiter": restarts, "tol": TOLERANCE, "return_eigenvectors": False}
            values, converged = eigsh(operator, count + 1, which="LM", **more), True
    except ArpackNoConvergence as error:
        values = error.eigenvalues
    except (ArpackError, FloatingPointError):
        pass
    ordered = [*sorted(map(float, values), key=abs, reverse=True), *[float("nan")] * count]
    return [Eigenvalue(value, converged) for value in ordered[:count]]
