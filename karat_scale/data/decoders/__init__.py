"""Decoders, from encoded images to pixels: one interface, one module per library."""

from karat_scale.data.decoders.base import ChooseView, Decoder
from karat_scale.errors import RecipeError
from karat_scale.recipe import DataConfig

__all__ = ["ChooseView", "Decoder", "make_decoder"]

# The order in which `data.decoder = auto` tries them; the last one always runs.
FASTEST_FIRST = ("native", "torchvision", "pillow")


def make_decoder(data: DataConfig, interpolation: str) -> Decoder:
    """Return the decoder of `data.decoder`; for auto, the fastest that runs here.

    Call it before workers are forked. Raises RecipeError if the named decoder cannot run.
    """
    if data.decoder != "auto":
        return _make(data.decoder, interpolation, data.max_pixels)
    for name in FASTEST_FIRST[:-1]:
        try:
            return _make(name, interpolation, data.max_pixels)
        except RecipeError:
            continue
    return _make(FASTEST_FIRST[-1], interpolation, data.max_pixels)


def _make(name: str, interpolation: str, max_pixels: int) -> Decoder:
    # A decoder's library is imported only if it is used.
    if name == "native":
        from karat_scale.data.decoders.native import NativeDecoder

        return NativeDecoder(interpolation, max_pixels)
    if name == "torchvision":
        from karat_scale.data.decoders.torchvision import TorchvisionDecoder

        return TorchvisionDecoder(interpolation, max_pixels)
    from karat_scale.data.decoders.pillow import PillowDecoder

    return PillowDecoder(interpolation, max_pixels)
