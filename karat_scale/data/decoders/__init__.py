"""Decoders, from encoded images to pixels: one interface, one row each in `karat_scale.foundation.tables.DECODERS`."""

from karat_scale.data.decoders.decode import ChooseView, Decoder
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.tables import DECODERS, load
from karat_scale.recipe import DataConfig

__all__ = ["ChooseView", "Decoder", "make_decoder"]


def make_decoder(data: DataConfig, interpolation: str) -> Decoder:
    """Return the decoder of `data.decoder`; for auto, the fastest that runs here.

    Call it before workers are forked. Raises RecipeError if the named decoder cannot run.
    """
    names = list(DECODERS) if data.decoder == "auto" else [data.decoder]
    while True:
        try:
            decoder: Decoder = load(DECODERS[names.pop(0)])(interpolation, data.max_pixels)
            return decoder
        except RecipeError:
            if not names:
                raise
