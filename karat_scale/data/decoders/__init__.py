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
    for name in names[:-1]:
        try:
            return _make(name, interpolation, data.max_pixels)
        except RecipeError:
            continue
    return _make(names[-1], interpolation, data.max_pixels)


def _make(name: str, interpolation: str, max_pixels: int) -> Decoder:
    decoder: Decoder = load(DECODERS[name])(interpolation, max_pixels)
    return decoder
