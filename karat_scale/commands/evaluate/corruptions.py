"""Corrupted copies of images as in ImageNet-C (arXiv 1903.12261): 15 corruptions at five severities.

`imagecorruptions` computes them on what the model sees, after the crop. An image is corrupted in the same way on any
number of ranks and in each run: its random numbers depend on the image, the corruption and the severity.
"""

import inspect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karat_scale.data.loading.assemble import Pixels
from karat_scale.foundation.errors import RecipeError, UserError
from karat_scale.foundation.tables import CORRUPTIONS, how_to_install

LEAST_PIXELS = 32


def chosen_corruptions(names: Sequence[str]) -> tuple[str, ...]:
    """Return the corruptions of these names; all of them for no name, or for `all`."""
    return CORRUPTIONS if not names or "all" in names else tuple(name for name in CORRUPTIONS if name in names)


def check_corruptible(image_size: int) -> None:
    """Raise UserError if the library is not installed, or the images are too small for it."""
    _library()
    if image_size < LEAST_PIXELS:
        raise UserError(f"--corrupt needs images of at least {LEAST_PIXELS} px, and the run's have {image_size}")


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity, from 1 to 5."""

    name: str
    severity: int

    def __call__(self, pixels: Pixels, sample_id: int) -> Pixels:
        """Return the corrupted pixels [H, W, 3] of a sample."""
        library = _library()
        seed = zlib.crc32(f"{self.name} {self.severity} {sample_id}".encode())
        before = np.random.get_state()  # the library draws from it, where it takes no seed
        np.random.seed(seed)
        try:
            corruption = library.corruption_dict[self.name]
            seeded = {"seed": seed} if "seed" in inspect.signature(corruption).parameters else {}
            changed: Pixels = library.corrupt(pixels, self.severity, self.name, **seeded)
        finally:
            np.random.set_state(before)
        return changed


def _library() -> Any:
    try:
        import imagecorruptions
    except ImportError:
        raise RecipeError(f"--corrupt needs the library imagecorruptions: {how_to_install('corruptions')}") from None
    return imagecorruptions
