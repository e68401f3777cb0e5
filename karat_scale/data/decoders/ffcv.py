"""Decoders from FFCV's compiled library, without the rest of FFCV.

FFCV's Loader cannot be seeded, returns views of a ring buffer, shows damaged JPEGs as black pixels, changes torch's
thread count, compiles for seconds, and can hang or crash in several ways. Its decoder is one C function, which is
called here directly. The order, the draws, the processes and the errors are those of the other backends.
"""

import re

import numpy as np
import numpy.typing as npt

from karat_scale.data.decoders.decode import ChooseView, check_pixels
from karat_scale.data.decoders.jpeg_header import Frame, read_frame
from karat_scale.data.decoders.pillow import PillowDecoder, resize_region
from karat_scale.foundation.errors import RecipeError
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"FFCV cannot be imported ({reason}); {how_to_install('ffcv')}") from error


class FfcvDecoder:
    """Reads grey and colour JPEGs with FFCV's library, and PPM, the form of raw pixels; passes all others to Pillow.

    The resize is that of the other decoders, antialiased with the recipe's interpolation. OpenCV's INTER_AREA, FFCV's
    only method, is slower and repeats pixels when a crop is enlarged. If FFCV's library reports a problem with a JPEG,
    Pillow reads it and decides whether it is readable. See Decoder. Raises RecipeError if FFCV is not installed.
    """

    name = "ffcv"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        require_ffcv()
        self._interpolation = interpolation
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)
        self._decode = JpegDecoder()

    def read(self, data: bytes, choose: ChooseView) -> Pixels:
        pixels = self._pixels(data)
        if pixels is None:
            return self._pillow.read(data, choose)
        view = choose(pixels.shape[1], pixels.shape[0])
        left, top, right, bottom = view.region
        return resize_region(pixels[top:bottom, left:right], view, self._interpolation)

    def _pixels(self, data: bytes) -> Pixels | None:
        """Return the whole image, in a buffer that the next call may reuse; None if Pillow must read it."""
        if header := PPM_HEADER.match(data):
            width, height = int(header[1]), int(header[2])
            check_pixels(width, height, self._max_pixels)
            whole = len(data) == header.end() + 3 * width * height
            return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3) if whole else None
        frame = read_frame(data)
        if frame is None or not frame.is_grey_or_colour:
            return None
        check_pixels(frame.width, frame.height, self._max_pixels)
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
