"""Decode whole JPEGs with torch's image libraries and resize in uint8 with torch: fast, with nothing to compile.

torchcodec takes the place of torchvision's decoder, which is deprecated since torchvision 0.29. On a CPU both decode
with libjpeg-turbo, as Pillow does, so the pixels do not depend on which of the three is there.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.decoders.base import ChooseView, check_pixels
from karat_scale.data.decoders.decode import blank_jpeg, decode_rgb
from karat_scale.data.decoders.jpeg_header import hide_exif, read_frame
from karat_scale.data.decoders.pillow import PillowDecoder, resize_region
from karat_scale.foundation.errors import RecipeError

# Modules with a function `decode_jpeg`, the first choice first.
LIBRARIES = {"torchcodec": "torchcodec.decoders", "torchvision": "torchvision.io"}


class TorchvisionDecoder:
    """Reads grey and colour JPEGs; passes all others to Pillow, which decides whether they are readable. See Decoder.

    Where neither library decodes, Pillow decodes these, too, and torch still resizes.
    """

    name = "torchvision"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        try:
            self._decode: JpegDecoder | None = find_jpeg_decoder(torch.device("cpu"))
        except RecipeError:
            self._decode = None
        self._interpolation = interpolation
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        frame = read_frame(data)
        if frame is None or not frame.is_grey_or_colour:
            return self._pillow.read(data, choose)
        check_pixels(frame.width, frame.height, self._max_pixels)
        pixels = np.array(decode_rgb(data)) if self._decode is None else _whole(self._decode, data)
        if pixels is None or pixels.shape != (frame.height, frame.width, 3):
            return self._pillow.read(data, choose)
        view = choose(frame.width, frame.height)
        left, top, right, bottom = view.region
        return resize_region(pixels[top:bottom, left:right], view, self._interpolation)


def _whole(decode: "JpegDecoder", data: bytes) -> npt.NDArray[np.uint8] | None:
    """Return the image, uint8 [h, w, 3]; None if the library does not read it as Pillow would."""
    copy = bytearray(data)
    if not hide_exif(copy):
        return None
    try:
        (pixels,) = decode([copy])
    except RuntimeError:
        return None
    rows: npt.NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return rows


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
        "`pip install 'torchcodec>=0.16'`"
    )
