"""Read arrays from MATLAB's files."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from karat_scale.errors import DataError


def mat_array(name: str, data: bytes, variable: str) -> npt.NDArray[Any]:
    """Return one array of integers from a .mat file. Raises DataError if it is damaged or has no such array."""
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable]).get(variable)
    except Exception as error:  # a damaged file makes scipy raise nearly any error
        raise DataError(f"{name} is not a complete MATLAB file ({error}); fetch it again") from error
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{name} has no array of integers {variable!r}; fetch it again")
    return found
