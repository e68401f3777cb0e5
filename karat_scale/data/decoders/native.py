"""Decode only the wanted part of a JPEG, and resize it in the same call: C++ on libjpeg, compiled on first use."""

import ctypes
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.data.decoders.decode import ChooseView, blank_jpeg, check_pixels, crop_view
from karat_scale.data.decoders.pillow import PillowDecoder
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.native_build import PACKAGES, LoadError, PerThread, load

SOURCE = Path(__file__).parent / "cpp" / "native.cpp"
# Without contraction, so that the resize's weights have the same bits on any instruction set.
COMPILER_ARGUMENTS = ("-ljpeg", "-ffp-contract=off")
INTERPOLATIONS = {"bilinear": 0, "bicubic": 1}


class NativeDecoder:
    """Reads grey and colour JPEGs; passes all others, and JPEGs with a warning of libjpeg, to Pillow. See Decoder.

    The interpreter's lock is released during the work. Raises RecipeError if it cannot be compiled.
    """

    name = "native"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        try:
            library = load(SOURCE, "the native JPEG decoder", COMPILER_ARGUMENTS, portable=True)
        except LoadError as error:
            raise RecipeError(
                f"data.decoder = native cannot run: {error}; run `apt-get install {PACKAGES}`, or set data.decoder=auto"
            ) from error
        self._library = _declared(library)
        self._interpolation = INTERPOLATIONS[interpolation]
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)
        self._decoders = PerThread(self._library.karat_decoder_new, self._library.karat_decoder_free)
        if self._decoded(blank_jpeg(1), lambda *_: crop_view((0, 0, 1, 1), 1)) is None:
            # Pillow would do all the work: correct, but slow.
            reason = "it reads no JPEG: the loaded libjpeg does not match the header it was compiled with"
            warnings.warn(f"the native JPEG decoder is not available: {reason}", stacklevel=2)
            raise RecipeError(f"data.decoder = native cannot run: {reason}; set data.decoder=auto")

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        pixels = self._decoded(data, choose)
        return self._pillow.read(data, choose) if pixels is None else pixels

    def _decoded(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8] | None:
        """Return the view; None if Pillow must read it."""
        handle = self._decoders.handle()
        width, height = ctypes.c_int32(), ctypes.c_int32()
        if not self._library.karat_decoder_open(handle, data, len(data), ctypes.byref(width), ctypes.byref(height)):
            return None
        check_pixels(width.value, height.value, self._max_pixels)
        view = choose(width.value, height.value)
        # Planes, since a batch stores them so; returned as rows of pixels.
        planes = np.empty((3, view.size[1], view.size[0]), dtype=np.uint8)
        asked = _View(*view.region, *view.box, *view.size, self._interpolation)
        if not self._library.karat_decoder_read(handle, ctypes.byref(asked), planes.ctypes.data):
            return None
        pixels: npt.NDArray[np.uint8] = planes.transpose(1, 2, 0)
        return pixels


class _View(ctypes.Structure):
    """The struct of native.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("left", "top", "right", "bottom")),
        *((name, ctypes.c_double) for name in ("box_left", "box_top", "box_right", "box_bottom")),
        *((name, ctypes.c_int32) for name in ("width", "height", "interpolation")),
    )


def _declared(library: Any) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.karat_decoder_new.restype, library.karat_decoder_new.argtypes = pointer, ()
    library.karat_decoder_free.restype, library.karat_decoder_free.argtypes = None, (pointer,)
    library.karat_decoder_open.restype = integer
    library.karat_decoder_open.argtypes = pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, pointer
    library.karat_decoder_read.restype = integer
    library.karat_decoder_read.argtypes = pointer, pointer, pointer
    return library
