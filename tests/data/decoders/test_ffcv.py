import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.decoders.decode import UndecodableImageError, View, centre_view, crop_view
from karat_scale.data.decoders.pillow import PillowDecoder
from karat_scale.data.shards.beton import RAW
from tests.data.betons import need_ffcv
from tests.data.conftest import encode, photo

LIMIT = 10**6


@pytest.fixture(params=["bilinear", "bicubic"])
def decoders(request):
    need_ffcv()
    from karat_scale.data.decoders.ffcv import FfcvDecoder

    return FfcvDecoder(request.param, LIMIT), PillowDecoder(request.param, LIMIT)


def read_both(decoders, data: bytes, view: View) -> tuple[np.ndarray, np.ndarray]:
    asked = []

    def choose(width: int, height: int) -> View:
        asked.append((width, height))
        return view

    ours, theirs = (decoder.read(data, choose) for decoder in decoders)
    assert asked[0] == asked[1]
    assert ours.shape == theirs.shape == (*reversed(view.size), 3)
    assert ours.dtype == np.uint8
    return ours, theirs


@pytest.mark.parametrize(
    ("box", "size"), [((10, 20, 90, 80), 32), ((10, 20, 30, 80), 32), ((3, 4, 20, 16), 32), ((0, 0, 120, 110), 64)]
)
def test_crops_are_close_to_pillows_whether_they_shrink_or_grow(decoders, box, size):
    ours, theirs = read_both(decoders, encode(photo(1, 120, 110), quality=95), crop_view(box, size))
    assert np.abs(ours.astype(int) - theirs).mean() < 2


def test_evaluation_views_differ_by_the_decoder_alone(decoders):
    view = centre_view(120, 110, 40, 32)
    ours, theirs = read_both(decoders, encode(photo(2, 120, 110), quality=95), view)
    assert np.abs(ours.astype(int) - theirs).mean() < 1.5
    # The pixels without a JPEG in between, as PPM: nothing differs.
    buffer = io.BytesIO()
    Image.fromarray(photo(2, 120, 110)).save(buffer, "PPM")
    pixels = buffer.getvalue().partition(b"255\n")[2]
    ours, theirs = read_both(decoders, b"P6 120 110 255\n" + pixels, view)
    assert np.array_equal(ours, theirs)


def test_grey_jpegs_become_rgb(decoders):
    ours, theirs = read_both(decoders, encode(photo(3, 120, 110)[:, :, 0]), crop_view((2, 3, 64, 64), 64))
    assert np.array_equal(ours[:, :, 0], ours[:, :, 2])
    assert np.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "CMYK"])
def test_what_ffcv_cannot_read_is_read_by_pillow(decoders, kind):
    if kind == "PNG":
        data = encode(photo(4), "PNG")
    else:
        buffer = io.BytesIO()
        Image.fromarray(photo(4)).convert("CMYK").save(buffer, "JPEG")
        data = buffer.getvalue()
    ours, theirs = read_both(decoders, data, crop_view((0, 0, 24, 20), 16))
    assert np.array_equal(ours, theirs)


def test_results_stay_when_the_next_image_is_read(decoders):
    decoder, _ = decoders
    whole = crop_view((0, 0, 24, 24), 24)
    first = decoder.read(encode(photo(5, 24, 24)), lambda *_: whole)
    kept = first.copy()
    decoder.read(encode(photo(6, 24, 24)), lambda *_: whole)
    assert np.array_equal(first, kept)


def test_damaged_and_huge_images_are_refused(decoders):
    decoder, _ = decoders
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encode(noise)
    for data in (whole[:-600], b"no image", b"", b"P6 4 4 255\nshort"):
        with pytest.raises(UndecodableImageError):
            decoder.read(data, lambda *_: crop_view((0, 0, 4, 4), 4))
    with pytest.raises(UndecodableImageError, match=r"1001 x 1000 pixels, more than data.max_pixels = 1000000"):
        decoder.read(encode(np.zeros((1000, 1001, 3), np.uint8)), lambda *_: crop_view((0, 0, 4, 4), 4))
    with pytest.raises(UndecodableImageError, match="more than data"):
        decoder.read(b"P6 9999 9999 255\n", lambda *_: crop_view((0, 0, 4, 4), 4))


def test_damage_that_only_confuses_the_colours_is_judged_as_pillow_judges_it(decoders):
    """libjpeg warns of much that it can read all the same; FFCV ignores it, this decoder asks Pillow."""
    decoder, pillow = decoders
    rng = np.random.default_rng(7)
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    view = centre_view(64, 64, 64, 64)
    for _ in range(40):
        data = bytearray(whole)
        data[int(rng.integers(700, len(data) - 2))] = int(rng.integers(256))
        found = []
        for one in (decoder, pillow):
            try:
                found.append(one.read(bytes(data), lambda *_: view).astype(int))
            except UndecodableImageError as error:
                found.append(str(error))
        assert isinstance(found[0], str) == isinstance(found[1], str)
        if not isinstance(found[0], str):
            assert np.abs(found[0] - found[1]).mean() < 3


def test_odd_files_are_read_as_pillow_reads_them(decoders, sample_data):
    decoder, pillow = decoders
    with tarfile.open(sample_data / "odd_jpegs.tar") as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]
    for name, data in files:
        found = []
        for one in (decoder, pillow):
            try:
                found.append(one.read(data, lambda w, h: centre_view(w, h, 48, 40)).astype(int))
            except UndecodableImageError:
                found.append(None)
        assert (found[0] is None) == (found[1] is None), name
        if found[0] is not None:
            assert np.abs(found[0] - found[1]).mean() < 3, name


def test_raw_is_numbered_as_ffcv_numbers_it():
    need_ffcv()
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert IMAGE_MODES["raw"] == RAW
