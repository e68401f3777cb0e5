"""Decode with torchvision's libjpeg-turbo and resize in uint8 with torch: fast, with nothing to install."""

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.data.decoders.base import ChooseView, check_pixels
from karat_scale.data.decoders.jpeg_header import read_frame
from karat_scale.data.decoders.pillow import PillowDecoder, resize_region
from karat_scale.errors import RecipeError


class TorchvisionDecoder:
    """Reads grey and colour JPEGs; passes all others to Pillow, which decides whether they are readable. See Decoder.

    Raises RecipeError if torchvision was built without JPEG.
    """

    name = "torchvision"

    def __init__(self, interpolation: str, max_pixels: int) -> None:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

            encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))
        except (ImportError, OSError, RuntimeError) as error:
            raise RecipeError(
                "data.decoder = torchvision: this torchvision was built without JPEG; reinstall it with `pip install "
                "--force-reinstall torchvision`, or set data.decoder=pillow"
            ) from error
        self._decode, self._mode = decode_jpeg, ImageReadMode.RGB
        self._interpolation = interpolation
        self._max_pixels = max_pixels
        self._pillow = PillowDecoder(interpolation, max_pixels)

    def read(self, data: bytes, choose: ChooseView) -> npt.NDArray[np.uint8]:
        frame = read_frame(data)
        if frame is None or not frame.is_grey_or_colour:
            return self._pillow.read(data, choose)
        check_pixels(frame.width, frame.height, self._max_pixels)
        try:
            pixels = self._decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=self._mode)
        except RuntimeError:
            return self._pillow.read(data, choose)
        if pixels.shape != (3, frame.height, frame.width):
            return self._pillow.read(data, choose)
        view = choose(frame.width, frame.height)
        left, top, right, bottom = view.region
        region = pixels[:, top:bottom, left:right].permute(1, 2, 0).numpy()
        return resize_region(region, view, self._interpolation)
