"""Arrays out of MATLAB's files."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from karat_scale.errors import DataError


def mat_array(name: str, data: bytes, variable: str) -> npt.NDArray[Any]:
    """One array of integers out of a .mat file. Raises DataError where it is damaged or has none of that name."""
    try:
        found = loadmat(io.BytesIO(data), variable_names=[variable]).get(variable)
    except Exception as error:  # a damaged file makes scipy raise nearly anything
        raise DataError(f"{name} is no whole file of MATLAB's ({error}); fetch it again") from error
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(f"{name} has no array of integers {variable!r}; fetch it again")
    return found
