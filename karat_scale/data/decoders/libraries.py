"""The decoders of image libraries, Pillow, torch's and FFCV's, and the resize of decoded pixels.

Pillow decodes and resizes as ImageFolder does, and its pixels are the reference for the other decoders. The resize of
a decoded region is the same for every decoder that returns whole pixels.

torch's libraries decode whole JPEGs and resize in uint8 with torch: fast, with nothing to compile. torchcodec takes
the place of torchvision's decoder, which is deprecated since torchvision 0.29. On a CPU both decode with
libjpeg-turbo, as Pillow does, so the pixels do not depend on which of the three is there.

FFCV's Loader cannot be seeded, returns views of a ring buffer, shows damaged JPEGs as black pixels, changes torch's
thread count, compiles for seconds, and can hang or crash in several ways. Its decoder is one C function, which is
called here directly. The order, the draws, the processes and the errors are those of the other backends.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from karat_scale.data.decoders.decode import ChooseView, View, blank_jpeg, check_pixels, decode_rgb, opened, to_rgb
from karat_scale.data.decoders.jpeg_header import Frame, hide_exif, read_frame
from karat_scale.foundation.errors import RecipeError, one_line
from karat_scale.foundation.tables import how_to_install

Pixels = npt.NDArray[np.uint8]
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PillowDecoder:
    """Reads every format that Pillow reads. See Decoder."""

    name = "pillow"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        self._resample = RESAMPLE[interpolation]
        self._max_pixels = max_pixels
        if max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or max_pixels):
            Image.MAX_IMAGE_PIXELS = max_pixels  # or Pillow itself would refuse what the user allows

    def read(self, data: bytes, choose: ChooseView) -> Pixels:
        with opened(data) as image:
            check_pixels(*image.size, self._max_pixels)
            view = choose(*image.size)
            return np.asarray(resized(to_rgb(image), view, self._resample))


def resized(image: Image.Image, view: View, resample: Image.Resampling) -> Image.Image:
    """Return the view of a whole image."""
    if view.region != (0, 0, *image.size):
        image = image.crop(view.region)
    if view.box_in_region == (0, 0, *image.size) and image.size == view.size:
        return image
    return image.resize(view.size, resample, box=view.box_in_region)


def resize_region(region: Pixels, view: View, interpolation: str) -> Pixels:
    """Return the view, uint8 [height, width, 3], from its region, uint8 [h, w, 3]; antialiased.

    It uses torch in uint8 for a whole region, and Pillow if the box's ends are within pixels, which torch cannot do.
    """
    width, height = view.size
    if view.box == view.region:
        planes = torch.from_numpy(region).permute(2, 0, 1)[None]
        small = functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
        result: Pixels = small[0].permute(1, 2, 0).numpy()
        return result
    image = Image.fromarray(region)
    return np.asarray(image.resize(view.size, RESAMPLE[interpolation], box=view.box_in_region))


# Modules with a function `decode_jpeg`, the first choice first.
LIBRARIES = {"torchcodec": "torchcodec.decoders", "torchvision": "torchvision.io"}


class WholeDecoder(ABC):
    """Decodes whole grey and colour JPEGs, and passes all else to Pillow, which decides whether it is readable.

    The resize is that of all decoders, antialiased with the recipe's interpolation. See Decoder.
    """

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        self._interpolation, self._max_pixels = interpolation, max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)

    def read(self, data: bytes, choose: ChooseView) -> Pixels:
        pixels = self._pixels(data)
        if pixels is None:
            return self._pillow.read(data, choose)
        view = choose(pixels.shape[1], pixels.shape[0])
        left, top, right, bottom = view.region
        return resize_region(pixels[top:bottom, left:right], view, self._interpolation)

    def _pixels(self, data: bytes) -> Pixels | None:
        """Return the whole image, uint8 [h, w, 3]; None if Pillow must read it. Raises UndecodableImageError."""
        frame = read_frame(data)
        if frame is None:
            return None
        check_pixels(frame.width, frame.height, self._max_pixels)
        return self._decoded(data, frame)

    @abstractmethod
    def _decoded(self, data: bytes, frame: Frame) -> Pixels | None:
        """Return a whole JPEG, in memory that the next call may reuse; None if Pillow must read it."""


class TorchvisionDecoder(WholeDecoder):
    """Decodes with one of LIBRARIES. Where neither decodes, Pillow does, and torch still resizes."""

    name = "torchvision"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        super().__init__(interpolation, max_pixels)
        try:
            self._decode: JpegDecoder | None = find_jpeg_decoder(torch.device("cpu"))
        except RecipeError:
            self._decode = None

    def _decoded(self, data: bytes, frame: Frame) -> Pixels | None:
        if self._decode is None:
            pixels = np.array(decode_rgb(data))
        else:
            copy = bytearray(data)
            if not hide_exif(copy):
                return None
            try:
                pixels = self._decode([copy])[0].permute(1, 2, 0).numpy()
            except RuntimeError:
                return None
        return pixels if pixels.shape == (frame.height, frame.width, 3) else None


@dataclass(frozen=True)
class JpegDecoder:
    """The decoder of a library of LIBRARIES on one device. Several threads may share it."""

    library: str
    device: torch.device
    function: Callable[..., list[torch.Tensor]]

    def __call__(self, encoded: Sequence[bytearray]) -> list[torch.Tensor]:
        """Return whole images, uint8 [3, H, W] RGB each, on the device. torchcodec turns them by EXIF: see hide_exif.

        Raises:
            RuntimeError: the library cannot decode one of them, or the device fails.
        """
        return self.function([torch.frombuffer(one, dtype=torch.uint8) for one in encoded], device=self.device)


def find_jpeg_decoder(device: torch.device) -> JpegDecoder:
    """Return the first decoder of LIBRARIES that decodes on the device.

    Raises:
        RecipeError: none does; the message has their reasons, and what to install.
    """
    # There is nothing that a user could do about a warning in each worker.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of Torch", DeprecationWarning)
    reasons = []
    for library, module in LIBRARIES.items():
        try:
            decoder = JpegDecoder(library, device, partial(import_module(module).decode_jpeg, mode="RGB"))
            decoder([bytearray(blank_jpeg(8))])
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            reasons.append(f"{library}: {str(error).partition(chr(10))[0]}")
        else:
            return decoder
    where = "the GPU" if device.type == "cuda" else "the CPU"
    raise RecipeError(
        f"no library decodes JPEGs on {where} ({'; '.join(reasons)}); install torchcodec for this torch, "
        "`pip install 'torchcodec>=0.16'`, with the --index-url that torch came from"
    )


# A buffer for larger images is freed after use.
KEPT_BYTES = 32 << 20
# The header that karat_scale.data.shards.beton puts before raw pixels.
PPM_HEADER = re.compile(rb"P6 (\d+) (\d+) 255\n")


def require_ffcv() -> None:
    """Raise RecipeError, with what to install, if FFCV or a library that it needs is missing."""
    try:
        import ffcv.libffcv  # noqa: F401
    except (ImportError, OSError) as error:
        raise RecipeError(f"FFCV cannot be imported ({one_line(error)}); {how_to_install('ffcv')}") from error


class FfcvDecoder(WholeDecoder):
    """Decodes JPEGs with FFCV's library, and reads PPM, the form of raw pixels.

    FFCV's only resize, OpenCV's INTER_AREA, is slower and repeats pixels when a crop is enlarged; it is not used. If
    the library reports a problem with a JPEG, Pillow reads it. Raises RecipeError if FFCV is not installed.
    """

    name = "ffcv"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        require_ffcv()
        super().__init__(interpolation, max_pixels)
        self._decode = FfcvJpegs()

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


class FfcvJpegs:
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
