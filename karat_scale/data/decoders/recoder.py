"""Shrink a JPEG in one native call: C++ on libjpeg, compiled on first use."""

import ctypes
from pathlib import Path
from typing import Any

from karat_scale.data.decoders.decode import blank_jpeg
from karat_scale.foundation.native_build import LoadError, PerThread, load

SOURCE = Path(__file__).parent / "cpp" / "recode.cpp"
# Without contraction, so that the resize's weights have the same bits on any instruction set.
COMPILER_ARGUMENTS = ("-ljpeg", "-ffp-contract=off")
# The scales at which libjpeg decodes with a smaller DCT.
SHRINKS = (8, 4, 2, 1)


def result_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height with a short side of at most this many pixels, in proportion."""
    scale = short_side / min(width, height)
    if scale >= 1:
        return width, height
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


class NativeRecoder:
    """Re-encodes grey and YCbCr JPEGs without converting their colour planes, as Pillow's encoder does with 4:2:0.

    The bytes do not depend on the instruction set. Several threads may share it. Raises LoadError if it cannot
    be compiled.
    """

    def __init__(self) -> None:
        self._library = _declared(load(SOURCE, "the native JPEG encoder", COMPILER_ARGUMENTS, portable=True))
        self._recoders = PerThread(self._library.karat_recoder_new, self._library.karat_recoder_free)
        if self.shrink(blank_jpeg(1), 1, 90, 1) is None:
            raise LoadError("it reads no JPEG: the loaded libjpeg does not match the header it was compiled with")

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


def _declared(library: Any) -> Any:
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.karat_recoder_new.restype, library.karat_recoder_new.argtypes = pointer, ()
    library.karat_recoder_free.restype, library.karat_recoder_free.argtypes = None, (pointer,)
    library.karat_recoder_open.restype = integer
    library.karat_recoder_open.argtypes = pointer, ctypes.c_char_p, size, pointer, pointer
    library.karat_recoder_shrink.restype = size
    library.karat_recoder_shrink.argtypes = pointer, integer, integer, integer, integer, pointer
    return library
