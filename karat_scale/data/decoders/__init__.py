"""Encoded images to pixels: one interface, one module per library."""

from karat_scale.data.decoders.base import ChooseView, Decoder
from karat_scale.recipe import DataConfig

__all__ = ["ChooseView", "Decoder", "make_decoder"]


def make_decoder(data: DataConfig, interpolation: str) -> Decoder:
    """The decoder that `data.decoder` names."""
    from karat_scale.data.decoders.pillow import PillowDecoder

    return PillowDecoder(interpolation, data.max_pixels)
