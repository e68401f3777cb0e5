import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.decoders import Decoder, make_decoder
from karat_scale.data.decoders.libraries import FfcvDecoder
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import DataConfig
from tests.data.betons import need_ffcv
from tests.data.tars import tar_files

EncodeJpeg = Callable[..., bytes]


def encode_photo(width: int, height: int, seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    """Return a JPEG of coarse shapes under fine noise, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).convert(mode).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


@pytest.fixture(scope="session")
def encode_jpeg() -> EncodeJpeg:
    return encode_photo


@pytest.fixture(scope="session")
def encode_flat() -> EncodeJpeg:
    """Return a function that encodes a JPEG of one grey, 119."""

    def encode(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("L", (width, height), 119).save(buffer, "JPEG", quality=100)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def native_runs() -> None:
    try:
        make_decoder(DataConfig(path="-", decoder="native"), "bicubic")
    except RecipeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def decoder_of(request) -> Callable[..., Decoder]:
    def make(name: str, interpolation: str = "bicubic", max_pixels: int = 80_000_000) -> Decoder:
        if name == "native":
            request.getfixturevalue("native_runs")
        if name == "ffcv":  # a recipe cannot name it, only its backend uses it
            need_ffcv()
            return FfcvDecoder(interpolation, max_pixels)
        return make_decoder(DataConfig(path="-", decoder=name, max_pixels=max_pixels), interpolation)

    return make


@pytest.fixture
def odd_images(sample_data) -> list[tuple[str, bytes]]:
    """Return the names and bytes of the unusual files."""
    return [*tar_files(sample_data / "odd_jpegs.tar").items()]
