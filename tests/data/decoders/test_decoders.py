"""Tests of what every decoder must do alike, with Pillow as the reference."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_scale.data.decoders import libraries as torchvision
from karat_scale.data.decoders import make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View, centre_view, crop_view
from karat_scale.data.decoders.jpeg_header import Frame, hide_exif, read_frame
from karat_scale.data.decoders.libraries import RESAMPLE, resize_region, resized
from karat_scale.data.shards.beton import RAW
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import DataConfig
from tests.data.betons import need_ffcv
from tests.data.conftest import encode, exif, photo

FAST = ["native", "torchvision"]
# FFCV's DCT is fast and less exact.
OTHERS = [*FAST, "ffcv"]
MEAN = {"native": 1, "torchvision": 1, "ffcv": 4}
# Bicubic weights overshoot, so that an 8-bit pass clips, and Pillow may resize vertically first.
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
    """Draw a JPEG's dimensions and the options of its encoding."""
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
@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=60)
@given(data=st.data())
def test_crops_are_those_of_pillow(encode_jpeg, decoder_of, name, interpolation, data):
    width, height, options = data.draw(photos())
    encoded = encode_jpeg(width, height, **options)
    view = data.draw(crops(width, height))
    ours, reference = (decoder_of(which, interpolation).read(encoded, lambda *_: view) for which in (name, "pillow"))
    apart = difference(ours, reference)
    assert apart.mean() <= MEAN[name]
    assert name == "ffcv" or apart.max() <= LARGEST[interpolation]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=30)
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
    assert apart.mean() <= MEAN[name]
    assert name == "ffcv" or apart.max() <= LARGEST[interpolation]


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
def test_other_formats_and_refusals_of_truncated_files_are_pillows(encode_jpeg, decoder_of, name):
    decoder, pillow = decoder_of(name), decoder_of("pillow")
    ramp = np.arange(40 * 30).reshape(30, 40)
    plain = Image.fromarray(ramp.astype(np.uint8))
    images = {mode: plain.convert(mode) for mode in ("CMYK", "P", "RGBA", "LA", "RGB")}
    images["I;16"] = Image.fromarray((ramp * 50).astype(np.uint16))
    for mode, image in images.items():
        data = encode(image, {"CMYK": "JPEG", "RGB": "WEBP"}.get(mode, "PNG"))
        assert np.array_equal(decoder.read(data, whole), pillow.read(data, whole)), mode
    unscaled, plain_jpeg = View((3, 5, 43, 35), (3, 5, 43, 35), (40, 30)), encode_jpeg(50, 40)
    apart = difference(*(each.read(plain_jpeg, lambda *_: unscaled) for each in (decoder, pillow)))
    assert name == "ffcv" or apart.max() <= 2
    encoded = encode_jpeg(100, 80)
    for end in range(0, len(encoded) - 50, 97):
        assert outcome(decoder, encoded[:end]) == outcome(pillow, encoded[:end])


@pytest.mark.parametrize("name", ["pillow", *OTHERS])
def test_grey_of_no_certain_range_is_refused(decoder_of, name):
    """Such an image is refused. Before the fix, it became black or white without a message."""
    decoder, ramp = decoder_of(name), np.linspace(0, 1, 40 * 30).reshape(30, 40)
    for pixels, said in ((ramp.astype(np.float32), "floating-point"), ((ramp * 65535).astype(np.int32), "32-bit")):
        assert said in outcome(decoder, encode(Image.fromarray(pixels), "TIFF"))
    grey = encode(Image.fromarray((ramp * 65535).astype(np.uint16)), "TIFF")
    assert np.ptp(decoder.read(grey, whole)) > 240


def bomb(width, height):
    """Return a small PNG whose header claims this many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["pillow", *OTHERS])
def test_bombs_are_refused_before_they_are_decoded(encode_jpeg, decoder_of, name, monkeypatch):
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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit is twice that
    png = encode(Image.new("RGB", (64, 64)), "PNG")
    assert not isinstance(outcome(decoder_of(name, max_pixels=64 * 64), png), str)


def test_the_recipe_names_the_decoder_and_auto_takes_the_fastest(decoder_of):
    for name in ("pillow", *FAST):
        assert decoder_of(name, "bilinear").name == name
    assert make_decoder(DataConfig(path="-"), "bilinear").name == "native"


@pytest.fixture(params=[*torchvision.LIBRARIES, "neither"])
def library(request, monkeypatch):
    """Let the decoder `torchvision` find only one library, or none."""
    found = {name: module for name, module in torchvision.LIBRARIES.items() if name == request.param}
    monkeypatch.setattr(torchvision, "LIBRARIES", found)
    if found:
        try:
            torchvision.find_jpeg_decoder(torch.device("cpu"))
        except RecipeError as error:
            pytest.skip(str(error))


def test_the_pixels_of_whole_decodes_do_not_depend_on_the_library(library, encode_jpeg, odd_images, decoder_of):
    plain = [encode_jpeg(61, 47, mode=mode, progressive=way) for mode in ("RGB", "L") for way in (False, True)]
    unscaled, view = (View((0, 0, 40, 30), (0, 0, 40, 30), size) for size in ((40, 30), (24, 18)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder, pillow = decoder_of("torchvision"), decoder_of("pillow")
        for data in (*plain, *(encode_jpeg(50, 40, exif=exif(number)) for number in range(9))):
            assert np.array_equal(decoder.read(data, lambda *_: unscaled), pillow.read(data, lambda *_: unscaled))
            assert difference(decoder.read(data, lambda *_: view), pillow.read(data, lambda *_: view)).max() <= 24
    for file, data in odd_images:
        ours, reference = outcome(decoder, data), outcome(pillow, data)
        assert isinstance(ours, str) == isinstance(reference, str), file
        assert ours == reference if isinstance(reference, str) else difference(ours, reference).mean() <= 1, file


def test_a_library_for_another_torch_is_passed_over(encode_jpeg, decoder_of, monkeypatch, tmp_path):
    """torchcodec for CUDA raises this beside a torch for CPUs, or for another CUDA."""
    (tmp_path / "foreign.py").write_text("raise OSError('Could not load this library: libtorchcodec_image.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torchvision, "LIBRARIES", {"torchcodec": "foreign"})
    with pytest.raises(RecipeError, match=r"CPU \(torchcodec: Could not load this library: libtorchcodec_image\.so\);"):
        torchvision.find_jpeg_decoder(torch.device("cpu"))
    data = encode_jpeg(50, 40)
    assert difference(*(decoder_of(name).read(data, whole) for name in ("torchvision", "pillow"))).max() <= 2


def test_exif_is_hidden_and_pixels_stay(encode_jpeg):
    data = encode_jpeg(50, 40, exif=exif(6))
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


def damaged(rng, photos, first=0):
    """Return a photo with bytes changed, cut off or inserted, from byte `first` on."""
    data = bytearray(rng.choice(photos))
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(first, len(data))] = rng.choice([rng.randrange(256), 0xFF, 0x00, 0xD9, 0xDA])
    if rng.random() < 0.3:
        del data[rng.randrange(first, len(data)) :]
    if rng.random() < 0.1:
        at = rng.randrange(first, len(data) + 1)
        data[at:at] = rng.randbytes(rng.randrange(40))
    return bytes(data)


@pytest.mark.parametrize("name", OTHERS)
def test_damaged_files_are_read_or_refused_as_pillow_does(encode_jpeg, decoder_of, name):
    """A decoder refuses what Pillow refuses; libjpeg only warns of some damage, and some libraries ignore that."""
    rng = random.Random(0)
    kinds = [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": "4:4:4"}, {"mode": "L"}]
    photos = [encode_jpeg(90, 70, seed, **options) for seed, options in enumerate(kinds)]
    ours, pillow = (decoder_of(which, "bilinear", 10**7) for which in (name, "pillow"))
    readable = {True: 0, False: 0}

    def choose(width, height):
        return crop_view((width // 3, height // 3, max(1, width // 3), max(1, height // 3)), 20)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about EXIF
        for _ in range(800 if name == "native" else 200):
            data = damaged(rng, photos, 700 if name == "ffcv" else 0)  # FFCV reads other colours from a damaged header
            expected, found = outcome(pillow, data, choose), outcome(ours, data, choose)
            assert isinstance(found, str) == isinstance(expected, str)
            if not isinstance(expected, str):
                assert difference(found, expected).mean() <= MEAN[name]
            readable[isinstance(expected, str)] += 1
    assert min(readable.values()) > 20


PPM = encode(photo(2, 120, 110), "PPM").partition(b"255\n")[2]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_raw_pixels_are_resized_as_pillows_and_refused_where_short_or_too_many(decoder_of, interpolation):
    ours, pillow = (decoder_of(name, interpolation, 10**6) for name in ("ffcv", "pillow"))
    view, data = centre_view(120, 110, 40, 32), b"P6 120 110 255\n" + PPM
    assert np.array_equal(ours.read(data, lambda *_: view), pillow.read(data, lambda *_: view))
    for data, reason in (b"P6 4 4 255\nshort", None), (b"P6 9999 9999 255\n", "more than data"):
        with pytest.raises(UndecodableImageError, match=reason):
            ours.read(data, whole)


def test_results_stay_when_the_next_image_is_read_and_raw_is_numbered_as_ffcv_numbers_it(decoder_of):
    decoder = decoder_of("ffcv")
    first = decoder.read(encode(photo(5, 24, 24)), whole)
    kept = first.copy()
    decoder.read(encode(photo(6, 24, 24)), whole)
    assert np.array_equal(first, kept)
    need_ffcv()
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert IMAGE_MODES["raw"] == RAW


def test_the_dimensions_and_components_of_a_frame(encode_jpeg):
    for options in ({}, {"progressive": True}, {"comment": b"x" * 3000}):
        assert read_frame(encode_jpeg(37, 21, **options)) == Frame(37, 21, 3)
        assert read_frame(encode_jpeg(8, 9, mode="L", **options)) == Frame(8, 9, 1)
        assert read_frame(encode_jpeg(8, 9, mode="CMYK", **options)) is None
    whole = encode_jpeg(20, 20)
    junk = whole[:2] + b"junk" + whole[2:]
    assert [read_frame(data) for data in (encode(photo(1), "PNG"), b"", junk)] == [None, None, None]
    found = [read_frame(whole[:end]) for end in range(len(whole))]
    assert set(found) == {None, Frame(20, 20, 3)}


@settings(max_examples=30)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(sorted(RESAMPLE)), st.integers(0, 99)
)
def test_a_crop_is_resized_as_pillow_does_but_for_rounding(width, height, size, interpolation, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = crop_view((0, 0, width, height), size)
    result = resize_region(pixels, view, interpolation)
    expected = np.asarray(resized(Image.fromarray(pixels), view, RESAMPLE[interpolation]))
    difference = np.abs(result.astype(int) - expected)
    assert result.shape == (size, size, 3)
    assert difference.mean() < 1


@pytest.mark.parametrize("interpolation", sorted(RESAMPLE))
@pytest.mark.parametrize("dimensions", [(40, 30), (33, 71)])
def test_a_centre_is_resized_as_pillow_does_to_the_bit(dimensions, interpolation):
    width, height = dimensions
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = centre_view(width, height, 20, 16)
    left, top, right, bottom = view.region
    expected = np.asarray(resized(Image.fromarray(pixels), view, RESAMPLE[interpolation]))
    assert np.array_equal(resize_region(pixels[top:bottom, left:right], view, interpolation), expected)


@pytest.mark.parametrize("size", [28, 112, 224, 240, 299, 336, 448])
def test_a_centre_crop_of_the_whole_short_side_stays_within_the_image(size: int) -> None:
    """Before the fix, rounding moved the box outside the image, and another decoder then read the whole image."""
    for short in range(size, 4 * size):
        left, top, right, bottom = centre_view(short, short + 3, size, size).box
        assert 0 <= left < right <= short
        assert 0 <= top < bottom <= short + 3
