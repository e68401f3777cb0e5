import io
import os
import struct
import warnings

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from torchvision.datasets.folder import pil_loader

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.jpeg_header import turned_by_default, upright
from tests.data.conftest import encode, exif
from tests.data.prepare.images import jpeg
from tests.data.prepare.making import prepared

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")],
)
def test_every_mode_becomes_rgb_as_imagefolder_reads_it(tmp_path, mode, kind):
    data = encode(Image.fromarray(RAMP).convert(mode), kind)
    (tmp_path / "image").write_bytes(data)
    image = decode_rgb(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(pil_loader(tmp_path / "image")))


def test_a_postscript_file_starts_no_interpreter(tmp_path, monkeypatch):
    """A PostScript file is refused; Pillow by itself would run Ghostscript on it."""
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = encode(Image.fromarray(RAMP).convert("RGB"), "EPS")
    with pytest.raises(UndecodableImageError, match="not an image in a supported format"):
        decode_rgb(data)
    assert not (tmp_path / "started").exists()


def test_sixteen_bits_are_scaled_not_clipped_and_a_palette_with_transparency_gives_no_warning():
    image = decode_rgb(encode(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"))
    assert np.array_equal(np.asarray(image)[..., 0], RAMP)
    data = encode(Image.fromarray(RAMP).convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(data).mode == "RGB"


def grey_tiff(pixels: bytes, bits: int, sample_format: int) -> bytes:
    """Return a TIFF of 8 x 8 pixels of so many bits: whole numbers without a sign (1), or with a sign (2)."""
    entries = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(pixels))]
    entries.append((339, sample_format))
    folder = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    begin = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return begin + pixels + struct.pack("<H", len(entries)) + folder + bytes(4)


def test_twelve_bits_are_scaled_and_grey_of_no_certain_range_is_refused():
    pairs = RAMP.reshape(-1, 2).astype(np.uint16) << 4
    packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs.tolist()]
    image = decode_rgb(grey_tiff(bytes(sum(packed, ())), 12, 1))
    assert np.array_equal(np.asarray(image)[..., 0], RAMP)
    image = decode_rgb(grey_tiff((RAMP.astype(np.uint16) * 257).tobytes(), 16, 1))
    assert np.array_equal(np.asarray(image)[..., 0], RAMP)
    for dtype, bits, sample_format in ((np.int16, 16, 2), (np.int32, 32, 2), (np.uint32, 32, 1)):
        with pytest.raises(UndecodableImageError, match="signed or 32-bit numbers of no certain range; store it with"):
            decode_rgb(grey_tiff(RAMP.astype(dtype).tobytes(), bits, sample_format))


def test_damaged_bytes_raise_with_a_reason():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for cut in (0, 1, 10, 200, -30):
        with pytest.raises(UndecodableImageError) as caught:
            decode_rgb(encode(Image.fromarray(noise), "JPEG")[:cut])
        assert str(caught.value)
        assert "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)


def test_odd_jpegs(odd_images, tmp_path):
    refused = []
    for name, data in odd_images:
        try:
            image = decode_rgb(data)
        except UndecodableImageError:
            refused.append(name)
            continue
        (tmp_path / "image").write_bytes(data)
        assert np.array_equal(np.asarray(image), np.asarray(pil_loader(tmp_path / "image"))), name
    assert refused == ["odd/truncated_jpeg.jpg", "odd/ultrahdr.jpg"]


# Pictures are turned upright as viewers show them, with the bytes that data_prep stores.
def with_orientation(number, kind="JPEG", **options):
    return jpeg(3, 64, 48, kind, exif=exif(number), **options)


def test_a_picture_is_turned_as_viewers_and_data_prep_turn_it():
    for number in range(2, 9):
        data = with_orientation(number, quality=95)
        turned = upright(data)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
        assert np.abs(expected - np.asarray(decode_rgb(turned))).mean() < 2
        assert turned == prepared(data)
        assert upright(turned) == turned
    for kind in ("PNG", "WEBP", "TIFF"):
        data = with_orientation(6, kind)
        assert decode_rgb(upright(data)).size == (48, 64)
        assert upright(data) == prepared(data)


def test_what_has_nothing_to_turn_keeps_its_bytes_and_a_broken_picture_is_bad():
    corrupt = jpeg(1, exif=b"Exif\0\0" + b"\xff" * 40)
    for data in (jpeg(1), jpeg(1, kind="PNG"), with_orientation(1), with_orientation(9), corrupt, b"no image", b""):
        assert upright(data) == data
    broken = with_orientation(6, quality=95)[:-60]
    with pytest.raises(UndecodableImageError, match="truncated"):
        upright(broken)


def test_imagenet_is_not_turned_unless_asked():
    assert turned_by_default(["cat", "n01440764"])
    assert not turned_by_default(["n01440764", "n01443537"])
    assert not turned_by_default(["tench, Tinca tinca", "goldfish, Carassius auratus"])
