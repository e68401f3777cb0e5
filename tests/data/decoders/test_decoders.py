"""What every decoder must do alike, Pillow being the reference."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_scale.data.decoders import make_decoder
from karat_scale.data.decoders import pillow as torchvision
from karat_scale.data.decoders.decode import UndecodableImageError, View, centre_view, crop_view
from karat_scale.data.decoders.jpeg_header import hide_exif
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import DataConfig
from tests.data.conftest import encode

FAST = ["native", "torchvision"]
# FFCV's DCT is fast and less exact.
OTHERS = [*FAST, "ffcv"]
MEAN = {"native": 1, "torchvision": 1, "ffcv": 3}
# Where bicubic weights overshoot, an 8-bit pass clips, and Pillow may resize down before across.
LARGEST = {"bilinear": 2, "bicubic": 24}


def whole(width, height):
    return crop_view((0, 0, width, height), 24)


def outcome(decoder, data, choose=whole):
    try:
        return decoder.read(data, choose)
    except UndecodableImageError as error:
        return str(error)


def difference(one, other):
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(int) - other.astype(int))


@st.composite
def photos(draw):
    """A JPEG's dimensions and how it is encoded."""
    width, height = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    options = {
        "mode": draw(st.sampled_from(["RGB", "RGB", "L"])),
        "subsampling": draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"])),
        "progressive": draw(st.booleans()),
        "restart_marker_blocks": draw(st.sampled_from([0, 1, 3])),
        "seed": draw(st.integers(0, 9)),
    }
    return width, height, options


@st.composite
def crops(draw, width, height):
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top))
    return crop_view(box, draw(st.integers(1, 60)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_crops_are_those_of_pillow(encode_jpeg, decoder_of, name, interpolation, data):
    width, height, options = data.draw(photos())
    encoded = encode_jpeg(width, height, **options)
    view = data.draw(crops(width, height))
    ours, reference = (decoder_of(which, interpolation).read(encoded, lambda *_: view) for which in (name, "pillow"))
    apart = difference(ours, reference)
    assert apart.mean() <= 1
    assert apart.max() <= LARGEST[interpolation]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(photo=photos(), size=st.integers(1, 60), crop=st.floats(0.3, 1.0))
def test_evaluation_views_are_those_of_pillow(encode_jpeg, decoder_of, name, interpolation, photo, size, crop):
    width, height, options = photo
    encoded = encode_jpeg(width, height, **options)
    asked = []

    def choose(found_width, found_height):
        asked.append((found_width, found_height))
        return centre_view(found_width, found_height, int(size / crop), size)

    ours, reference = (decoder_of(which, interpolation).read(encoded, choose) for which in (name, "pillow"))
    apart = difference(ours, reference)
    assert set(asked) == {(width, height)}
    assert apart.mean() <= 1
    assert apart.max() <= LARGEST[interpolation]


@pytest.mark.parametrize("name", FAST)
def test_an_unscaled_view_is_the_image(encode_jpeg, decoder_of, name):
    encoded = encode_jpeg(50, 40)
    view = View((3, 5, 43, 35), (3, 5, 43, 35), (40, 30))
    ours, reference = (decoder_of(which).read(encoded, lambda *_: view) for which in (name, "pillow"))
    assert difference(ours, reference).max() <= 2


@pytest.mark.parametrize("name", OTHERS)
def test_odd_files_are_read_or_refused_as_pillow_does(odd_images, decoder_of, name):
    decoder, pillow = decoder_of(name), decoder_of("pillow")
    for file, data in odd_images:
        ours, reference = outcome(decoder, data), outcome(pillow, data)
        if isinstance(reference, str):
            assert ours == reference, file
        else:
            assert difference(ours, reference).mean() <= MEAN[name], file


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")]
)
def test_other_formats_are_exactly_those_of_pillow(decoder_of, name, mode, kind):
    ramp = np.arange(40 * 30).reshape(30, 40)
    image = Image.fromarray((ramp * 50).astype(np.uint16)) if mode == "I;16" else Image.fromarray(ramp.astype(np.uint8))
    data = encode(image if mode == "I;16" else image.convert(mode), kind)
    assert np.array_equal(decoder_of(name).read(data, whole), decoder_of("pillow").read(data, whole))


@pytest.mark.parametrize("name", OTHERS)
def test_truncated_files_are_refused_with_pillows_reason(encode_jpeg, decoder_of, name):
    encoded = encode_jpeg(100, 80)
    decoder, pillow = decoder_of(name), decoder_of("pillow")
    for end in range(0, len(encoded) - 50, 97):
        assert outcome(decoder, encoded[:end]) == outcome(pillow, encoded[:end])


def bomb(width, height):
    """A small PNG of many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["pillow", *OTHERS])
def test_bombs_are_refused_before_they_are_decoded(encode_jpeg, decoder_of, name):
    jpeg = encode_jpeg(64, 64)
    frame = jpeg.index(b"\xff\xc0") + 5

    def enlarged(width, height):
        return jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :]

    for data in (enlarged(9000, 9200), bomb(9000, 9200)):
        told = outcome(decoder_of(name), data)
        assert told == "it has 9000 x 9200 pixels, more than data.max_pixels = 80000000"
    for data in (enlarged(65000, 65000), bomb(60_000, 60_000)):
        assert isinstance(outcome(decoder_of(name), data), str)
    assert "64 x 64" in outcome(decoder_of(name, max_pixels=64 * 64 - 1), jpeg)
    assert not isinstance(outcome(decoder_of(name, max_pixels=64 * 64), jpeg), str)


@pytest.mark.parametrize("name", ["pillow", *FAST])
def test_the_recipe_names_the_decoder(decoder_of, name):
    assert decoder_of(name, "bilinear").name == name


def test_auto_takes_the_fastest(native_runs):
    assert make_decoder(DataConfig(path="-"), "bilinear").name == "native"


@pytest.fixture(params=[*torchvision.LIBRARIES, "neither"])
def library(request, monkeypatch):
    """The library that the decoder `torchvision` finds."""
    found = {name: module for name, module in torchvision.LIBRARIES.items() if name == request.param}
    monkeypatch.setattr(torchvision, "LIBRARIES", found)
    if found:
        try:
            torchvision.find_jpeg_decoder(torch.device("cpu"))
        except RecipeError as error:
            pytest.skip(str(error))


def with_orientation(encode_jpeg, number):
    exif = Image.Exif()
    exif[0x0112] = number
    return encode_jpeg(50, 40, exif=exif.tobytes())


def test_the_pixels_of_whole_decodes_do_not_depend_on_the_library(library, encode_jpeg, odd_images, decoder_of):
    plain = [encode_jpeg(61, 47, mode=mode, progressive=way) for mode in ("RGB", "L") for way in (False, True)]
    unscaled, view = (View((0, 0, 40, 30), (0, 0, 40, 30), size) for size in ((40, 30), (24, 18)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder, pillow = decoder_of("torchvision"), decoder_of("pillow")
        for data in (*plain, *(with_orientation(encode_jpeg, number) for number in range(9))):
            assert np.array_equal(decoder.read(data, lambda *_: unscaled), pillow.read(data, lambda *_: unscaled))
            assert difference(decoder.read(data, lambda *_: view), pillow.read(data, lambda *_: view)).max() <= 24
    for file, data in odd_images:
        ours, reference = outcome(decoder, data), outcome(pillow, data)
        assert isinstance(ours, str) == isinstance(reference, str), file
        assert ours == reference if isinstance(reference, str) else difference(ours, reference).mean() <= 1, file


def test_exif_is_hidden_and_pixels_stay(encode_jpeg):
    data = with_orientation(encode_jpeg, 6)
    copy = bytearray(data)
    assert hide_exif(copy)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(copy)) as after:
        assert before.getexif()[0x0112] == 6
        assert not after.getexif()
        assert np.array_equal(before, after)
    copy = bytearray(data[:2] + b"\xff\xff" + data[2:])
    assert hide_exif(copy)
    assert b"\xff\xe1" not in copy
    frame = data.index(b"\xff\xc0")
    assert not hide_exif(bytearray(data[:frame] + b"junk" + data[frame:]))
    assert not hide_exif(bytearray(data[:frame]))


def test_without_a_library_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    monkeypatch.setattr(torchvision, "LIBRARIES", {"nothing": "no_such_library", "torchvision": "torchvision.io"})
    with pytest.raises(RecipeError, match=r"nothing: No module .*; torchvision: .*decode_jpeg.*pip install"):
        torchvision.find_jpeg_decoder(torch.device("cpu"))
