import io

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.decoders.native import NativeRecoder, result_size
from karat_scale.foundation import native_build

pytestmark = pytest.mark.usefixtures("native_runs")
SIZES = [(150, 110), (97, 131), (64, 64), (31, 33), (1, 5), (700, 301)]


def opened(data):
    return Image.open(io.BytesIO(data))


def pillow(data, short_side, quality):
    image = opened(data).convert("RGB")
    buffer = io.BytesIO()
    image.resize(result_size(*image.size, short_side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_image_and_the_file_are_as_pillows(encode_jpeg, size, subsampling):
    data = encode_jpeg(*size, 3, subsampling=subsampling, progressive=subsampling == 1)
    for quality in (5, 90, 100):
        ours, theirs = (
            opened(found) for found in (NativeRecoder().shrink(data, 48, quality, 2), pillow(data, 48, quality))
        )
        assert (ours.size, ours.quantization, ours.layer) == (theirs.size, theirs.quantization, theirs.layer)
    # Where nothing is resized ours keeps the stored colours; Pillow's smooths them on its way through RGB.
    if min(size) > 48:
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean() < 3


def test_every_instruction_set_gives_the_same_bytes(encode_jpeg, monkeypatch):
    images = [encode_jpeg(*size, 1, subsampling=number % 3) for number, size in enumerate(SIZES)]
    expected = [NativeRecoder().shrink(data, 40, 90, 2) for data in images]
    for name in (*native_build._available_instruction_sets(), native_build.PLAIN):
        monkeypatch.setenv("KARAT_CPU_ISA", name)
        recoder = NativeRecoder()
        # Twice, since a recoder keeps its memory and its filters.
        for _ in range(2):
            assert [recoder.shrink(data, 40, 90, 2) for data in images] == expected, name


def test_grey_stays_grey_in_an_rgb_file(encode_jpeg, encode_flat):
    image = opened(NativeRecoder().shrink(encode_jpeg(90, 70, mode="L"), 32, 90, 2))
    red, green, blue = np.moveaxis(np.asarray(image), 2, 0)
    assert image.mode == "RGB"
    assert np.array_equal(red, green)
    assert np.array_equal(red, blue)
    assert np.unique(opened(NativeRecoder().shrink(encode_flat(90, 70), 32, 100, 2))).tolist() == [119]


def test_what_is_doubtful_is_left_to_pillow(encode_jpeg):
    recoder, whole = NativeRecoder(), encode_jpeg(150, 110)
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:40], encode_jpeg(50, 40, mode="CMYK")):
        assert recoder.shrink(data, 32, 90, 2) is None
    assert recoder.shrink(whole, 32, 90, 2) == NativeRecoder().shrink(whole, 32, 90, 2)
