"""Decode and resize a part of a JPEG in one call, or shrink a whole one, by C++ on libjpeg."""

import ctypes
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.data.decoders.decode import ChooseView, blank_jpeg, check_pixels, crop_view, result_size
from karat_scale.data.decoders.libraries import PillowDecoder
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.native_build import PACKAGES, LoadError, PerThread, load

DECODER, RECODER = (Path(__file__).parent / "cpp" / name for name in ("native.cpp", "recode.cpp"))
INTERPOLATIONS = {"bilinear": 0, "bicubic": 1}


class NativeDecoder:
    """Reads grey and colour JPEGs; passes all others, and JPEGs with a warning of libjpeg, to Pillow. See Decoder.

    The interpreter's lock is released during the work. Raises RecipeError if it cannot be compiled.
    """

    name = "native"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        try:
            library = load(DECODER, "the native JPEG decoder")
        except LoadError as error:
            raise RecipeError(
                f"data.decoder = native cannot run: {error}; run `apt-get install {PACKAGES}`, or set data.decoder=auto"
            ) from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._library = _declared(
            library,
            karat_decoder_new=(pointer,),
            karat_decoder_free=(None, pointer),
            karat_decoder_open=(integer, pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, pointer),
            karat_decoder_read=(integer, pointer, pointer, pointer),
        )
        self._interpolation = INTERPOLATIONS[interpolation]
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)
        self._decoders = PerThread(self._library.karat_decoder_new, self._library.karat_decoder_free)
        if self._decoded(blank_jpeg(1), lambda *_: crop_view((0, 0, 1, 1), 1)) is None:
            # Pillow would do all the work: correct, but slow.
            reason = "it cannot read JPEGs: the loaded libjpeg does not match the header it was compiled with"
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


# The scales at which libjpeg decodes with a smaller DCT.
SHRINKS = (8, 4, 2, 1)


class NativeRecoder:
    """Re-encodes grey and YCbCr JPEGs without converting their colour planes, as Pillow's encoder does with 4:2:0.

    The bytes do not depend on the instruction set. Several threads may share it. Raises LoadError if it cannot
    be compiled.
    """

    def __init__(self) -> None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._library = _declared(
            load(RECODER, "the native JPEG encoder"),
            karat_recoder_new=(pointer,),
            karat_recoder_free=(None, pointer),
            karat_recoder_open=(integer, pointer, ctypes.c_char_p, size, pointer, pointer),
            karat_recoder_shrink=(size, pointer, integer, integer, integer, integer, pointer),
        )
        self._recoders = PerThread(self._library.karat_recoder_new, self._library.karat_recoder_free)
        if self.shrink(blank_jpeg(1), 1, 90, 1) is None:
            raise LoadError("it cannot read JPEGs: the loaded libjpeg does not match the header it was compiled with")

    def shrink(self, data: bytes, short_side: int, quality: int, margin: int) -> bytes | None:
        """Return a JPEG of at most this short side in pixels; None if the image is doubtful or not for libjpeg.

        The DCT may scale a large image while it stays `margin` times larger than the result.
        """
        handle = self._recoders.handle()
        width, height = ctypes.c_int32(), ctypes.c_int32()
        if not self._library.karat_recoder_open(handle, data, len(data), ctypes.byref(width), ctypes.byref(height)):
            return None
        enough = margin * short_side
        shrink = next((part for part in SHRINKS if min(width.value, height.value) >= part * enough), 1)
        size = result_size(width.value, height.value, short_side)
        found = ctypes.c_void_p()
        length = self._library.karat_recoder_shrink(handle, 8 // shrink, *size, quality, ctypes.byref(found))
        return ctypes.string_at(found, length) if length else None


def _declared(library: Any, **functions: tuple[Any, ...]) -> Any:
    """Set the types of a library's functions, of the result and then of the arguments; returns the library."""
    for name, (result, *arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
