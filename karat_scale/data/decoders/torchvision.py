"""Decoding by torchvision's libjpeg-turbo and resizing in uint8 by torch: fast, with nothing to install."""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from karat_scale.data.decoders.base import ChooseView, check_pixels
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.pillow import RESAMPLE, PillowDecoder, resized
from karat_scale.data.view import View
from karat_scale.errors import RecipeError

GREY, COLOUR = 1, 3


class TorchvisionDecoder:
    """Reads grey and colour JPEGs; hands all else to Pillow, which says what is readable. See Decoder.

    Raises RecipeError where torchvision was built without JPEG.
    """

    name = "torchvision"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

            encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))
        except (ImportError, OSError, RuntimeError) as error:
            raise RecipeError(
                "data.decoder = torchvision: this torchvision reads no JPEG; reinstall it with `pip install "
                "--force-reinstall torchvision`, or set data.decoder=pillow"
            ) from error
        self._decode, self._mode = decode_jpeg, ImageReadMode.RGB
        self._interpolation = interpolation
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        frame = read_frame(data)
        if frame is None or frame.components not in (GREY, COLOUR):
            return self._pillow.read(data, choose)
        check_pixels(frame.width, frame.height, self._max_pixels)
        try:
            pixels = self._decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=self._mode)
        except RuntimeError:
            return self._pillow.read(data, choose)
        if pixels.shape != (3, frame.height, frame.width):
            return self._pillow.read(data, choose)
        return self._resized(pixels, choose(frame.width, frame.height))

    def _resized(self, pixels: torch.Tensor, view: View) -> npt.NDArray[np.uint8]:
        if view.box != view.region:
            # torch resizes whole pixels only.
            image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            return np.asarray(resized(image, view, RESAMPLE[self._interpolation]))
        left, top, right, bottom = view.region
        width, height = view.size
        cropped = pixels[None, :, top:bottom, left:right]
        small = functional.interpolate(cropped, (height, width), mode=self._interpolation, antialias=True)
        result: npt.NDArray[np.uint8] = small[0].permute(1, 2, 0).numpy()
        return result
