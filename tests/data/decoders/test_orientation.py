"""Pictures are turned upright as viewers show them, with the bytes that data_prep stores."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from karat_scale.data.decoders.decode import UndecodableImageError, decode_rgb
from karat_scale.data.decoders.orientation import turned_by_default, upright
from tests.data.prepare.images import jpeg
from tests.data.prepare.making import prepared


def with_orientation(number: int, kind: str = "JPEG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return jpeg(3, 64, 48, kind, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("number", range(2, 9))
def test_a_picture_is_turned_as_viewers_and_data_prep_turn_it(number: int) -> None:
    data = with_orientation(number, quality=95)
    turned = upright(data)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    assert np.abs(expected - np.asarray(decode_rgb(turned))).mean() < 2
    assert turned == prepared(data)
    assert upright(turned) == turned


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_turned_too(kind: str) -> None:
    data = with_orientation(6, kind)
    assert decode_rgb(upright(data)).size == (48, 64)
    assert upright(data) == prepared(data)


def test_what_has_nothing_to_turn_keeps_its_bytes() -> None:
    corrupt = jpeg(1, exif=b"Exif\0\0" + b"\xff" * 40)
    for data in (jpeg(1), jpeg(1, kind="PNG"), with_orientation(1), with_orientation(9), corrupt, b"no image", b""):
        assert upright(data) == data


def test_a_broken_picture_is_bad_as_it_is_without_an_orientation() -> None:
    broken = with_orientation(6, quality=95)[:-60]
    with pytest.raises(UndecodableImageError, match="truncated"):
        upright(broken)


def test_imagenet_is_not_turned_unless_asked() -> None:
    assert turned_by_default(["cat", "n01440764"])
    assert not turned_by_default(["n01440764", "n01443537"])
    assert not turned_by_default(["tench, Tinca tinca", "goldfish, Carassius auratus"])
