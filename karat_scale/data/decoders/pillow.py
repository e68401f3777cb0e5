"""The decoders of Pillow and of torch's image libraries, and the resize of decoded pixels.

Pillow decodes and resizes as ImageFolder does, and its pixels are the reference for the other decoders. The resize of
a decoded region is the same for every decoder that returns whole pixels.

torch's libraries decode whole JPEGs and resize in uint8 with torch: fast, with nothing to compile. torchcodec takes
the place of torchvision's decoder, which is deprecated since torchvision 0.29. On a CPU both decode with
libjpeg-turbo, as Pillow does, so the pixels do not depend on which of the three is there.
"""

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
from karat_scale.foundation.errors import RecipeError

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class PillowDecoder:
    """Reads every format that Pillow reads. See Decoder."""

    name = "pillow"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        self._resample = RESAMPLE[interpolation]
        self._max_pixels = max_pixels

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
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


def resize_region(region: npt.NDArray[np.uint8], view: View, interpolation: str) -> npt.NDArray[np.uint8]:
    """Return the view, uint8 [height, width, 3], from its region, uint8 [h, w, 3]; antialiased.

    It uses torch in uint8 for a whole region, and Pillow if the box's ends are within pixels, which torch cannot do.
    """
    width, height = view.size
    if view.box == view.region:
        planes = torch.from_numpy(region).permute(2, 0, 1)[None]
        small = functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
        result: npt.NDArray[np.uint8] = small[0].permute(1, 2, 0).numpy()
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

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        pixels = self._pixels(data)
        if pixels is None:
            return self._pillow.read(data, choose)
        view = choose(pixels.shape[1], pixels.shape[0])
        left, top, right, bottom = view.region
        return resize_region(pixels[top:bottom, left:right], view, self._interpolation)

    def _pixels(self, data: bytes) -> npt.NDArray[np.uint8] | None:
        """Return the whole image, uint8 [h, w, 3]; None if Pillow must read it. Raises UndecodableImageError."""
        frame = read_frame(data)
        if frame is None or not frame.is_grey_or_colour:
            return None
        check_pixels(frame.width, frame.height, self._max_pixels)
        return self._decoded(data, frame)

    @abstractmethod
    def _decoded(self, data: bytes, frame: Frame) -> npt.NDArray[np.uint8] | None:
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

    def _decoded(self, data: bytes, frame: Frame) -> npt.NDArray[np.uint8] | None:
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
        "`pip install 'torchcodec>=0.16'`"
    )
