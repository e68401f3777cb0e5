"""RandAugment's affine operations in C++, with the bits of Pillow, which needs several times as long for them."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from karat_scale.data.decoders.pillow import RESAMPLE
from karat_scale.foundation.native_build import LoadError, load

SOURCE = Path(__file__).parent / "cpp" / "warp.cpp"
# Without contraction, so that the pixels have the same bits on any instruction set.
_COMPILER_ARGUMENTS = ("-ffp-contract=off",)
_BICUBIC = {"bilinear": 0, "bicubic": 1}
Matrix = tuple[float, float, float, float, float, float]
Pixels = npt.NDArray[np.uint8]


class Warp:
    """Affine warps of RGB images by one filter. The interpreter's lock is released during the work."""

    def __init__(self, interpolation: str, fill: Sequence[int]) -> None:
        library = load(SOURCE, "RandAugment in C++", _COMPILER_ARGUMENTS, portable=True)
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        library.karat_warp.restype = integer
        library.karat_warp.argtypes = pointer, integer, integer, pointer, pointer, integer, pointer
        self._warp: Any = library.karat_warp
        self._bicubic = _BICUBIC[interpolation]
        self._fill = np.array(fill, dtype=np.uint8)

    def __call__(self, image: Image.Image, matrix: Matrix) -> Image.Image:
        """Return the image whose pixel (x, y) comes from a x + b y + c, d x + e y + f, as `Image.transform` does it."""
        pixels = np.asarray(image)
        numbers, out = np.array(matrix, dtype=np.float64), np.empty_like(pixels)
        places = pixels.ctypes.data, image.width, image.height, numbers.ctypes.data, self._fill.ctypes.data
        if self._warp(*places, self._bicubic, out.ctypes.data):
            raise MemoryError("out of memory while an image was warped")
        return Image.fromarray(out)


@cache
def find_warp(interpolation: str, fill: tuple[int, ...]) -> Warp | None:
    """Return the warp for a filter; None if it cannot be compiled, or if this machine's Pillow has other bits."""
    try:
        warp = Warp(interpolation, fill)
    except LoadError:
        return None
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8))
    matrices: tuple[Matrix, ...] = (
        (1, 0.3, 0, 0, 1, 0),
        (1, 0, 0, -0.2, 1, 0),
        (1, 0, 3.7, 0, 1, 0),
        rotation(17.0, *noise.size),
    )
    for matrix in matrices:
        theirs = noise.transform(noise.size, Image.Transform.AFFINE, matrix, RESAMPLE[interpolation], fillcolor=fill)
        if not np.array_equal(np.asarray(warp(noise, matrix)), np.asarray(theirs)):
            return None
    return warp


def matrix_of(name: str, arguments: Sequence[float], width: int, height: int) -> Matrix | None:
    """Return the matrix of one of timm's operations; None if it is no warp, or one that Pillow does without filter."""
    if name == "Rotate":
        return rotation(arguments[0], width, height) if arguments[0] % 90 else None
    if name in ("ShearX", "ShearY"):
        slope = arguments[0]
        return (1, slope, 0, 0, 1, 0) if name[-1] == "X" else (1, 0, 0, slope, 1, 0)
    if name in ("TranslateX", "TranslateXRel"):
        return 1, 0, arguments[0] * (width if name.endswith("Rel") else 1), 0, 1, 0
    if name in ("TranslateY", "TranslateYRel"):
        return 1, 0, 0, 0, 1, arguments[0] * (height if name.endswith("Rel") else 1)
    return None


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """Return the matrix of `Image.rotate`, about the centre, with its rounding."""
    radians = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(radians), 15), round(math.sin(radians), 15)
    minus_sine = round(-math.sin(radians), 15)
    x, y = width / 2, height / 2
    return (
        cosine,
        sine,
        cosine * -x + sine * -y + 0.0 + x,
        minus_sine,
        cosine,
        minus_sine * -x + cosine * -y + 0.0 + y,
    )
