"""Decoders from FFCV's compiled library, without the rest of FFCV.

FFCV's Loader cannot be seeded, returns views of a ring buffer, shows damaged JPEGs as black pixels, changes torch's
thread count, compiles for seconds, and can hang or crash in several ways. Its decoder is one C function, which is
called here directly. The order, the draws, the processes and the errors are those of the other backends.
"""

import re

import numpy as np
import numpy.typing as npt

from karat_scale.data.decoders.decode import check_pixels
from karat_scale.data.decoders.jpeg_header import Frame
from karat_scale.data.decoders.pillow import WholeDecoder
from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.foundation.tables import how_to_install

# A buffer for larger images is freed after use.
KEPT_BYTES = 32 << 20
# The header that karat_scale.data.shards.beton puts before raw pixels.
PPM_HEADER = re.compile(rb"P6 (\d+) (\d+) 255\n")

Pixels = npt.NDArray[np.uint8]


def require_ffcv() -> None:
    """Raise RecipeError, with what to install, if FFCV or a library that it needs is missing."""
    try:
        import ffcv.libffcv  # noqa: F401
    except (ImportError, OSError) as error:
        raise RecipeError(f"FFCV cannot be imported ({one_line(error)}); {how_to_install('ffcv')}") from error


class FfcvDecoder(WholeDecoder):
    """Decodes with FFCV's library, and PPM, the form of raw pixels.

    FFCV's only resize, OpenCV's INTER_AREA, is slower and repeats pixels when a crop is enlarged; it is not used. If
    the library reports a problem with a JPEG, Pillow reads it. Raises RecipeError if FFCV is not installed.
    """

    name = "ffcv"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        require_ffcv()
        super().__init__(interpolation, max_pixels)
        self._decode = JpegDecoder()

    def _pixels(self, data: bytes) -> Pixels | None:
        header = PPM_HEADER.match(data)
        if header is None:
            return super()._pixels(data)
        width, height = int(header[1]), int(header[2])
        check_pixels(width, height, self._max_pixels)
        whole = len(data) == header.end() + 3 * width * height
        return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3) if whole else None

    def _decoded(self, data: bytes, frame: Frame) -> Pixels | None:
        return self._decode(data, frame)


class JpegDecoder:
    """FFCV's `imdecode` on a buffer that every call reuses. It uses FFCV's fast, less exact DCT."""

    def __init__(self) -> None:
        from ffcv.libffcv import ctypes_imdecode

        self._imdecode = ctypes_imdecode
        self._buffer = np.empty(0, dtype=np.uint8)

    def __call__(self, data: bytes, frame: Frame) -> Pixels | None:
        """Return RGB, uint8 [height, width, 3]; None if the library reports any problem with the data."""
        width, height = frame.width, frame.height
        size = 3 * width * height
        buffer = self._buffer if size <= len(self._buffer) else np.empty(size, dtype=np.uint8)
        if len(self._buffer) < size <= KEPT_BYTES:
            self._buffer = buffer
        whole = (height, width, 0, 0, 1, 1, False, False)  # no crop, no offset, full scale, no flip
        fault = self._imdecode(data, len(data), height, width, buffer.ctypes.data, *whole)
        return None if fault else buffer[:size].reshape(height, width, 3)
