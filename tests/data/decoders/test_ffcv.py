import numpy as np
import pytest

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
    pixels = encode(photo(2, 120, 110), "PPM").partition(b"255\n")[2]
    ours, theirs = read_both(decoders, b"P6 120 110 255\n" + pixels, view)
    assert np.array_equal(ours, theirs)


def test_grey_jpegs_become_rgb(decoders):
    ours, theirs = read_both(decoders, encode(photo(3, 120, 110)[:, :, 0]), crop_view((2, 3, 64, 64), 64))
    assert np.array_equal(ours[:, :, 0], ours[:, :, 2])
    assert np.abs(ours.astype(int) - theirs).mean() < 2


def test_results_stay_when_the_next_image_is_read(decoders):
    decoder, _ = decoders
    whole = crop_view((0, 0, 24, 24), 24)
    first = decoder.read(encode(photo(5, 24, 24)), lambda *_: whole)
    kept = first.copy()
    decoder.read(encode(photo(6, 24, 24)), lambda *_: whole)
    assert np.array_equal(first, kept)


def test_raw_pixels_that_are_short_or_too_many_are_refused(decoders):
    decoder, _ = decoders
    for data, reason in (b"P6 4 4 255\nshort", None), (b"P6 9999 9999 255\n", "more than data"):
        with pytest.raises(UndecodableImageError, match=reason):
            decoder.read(data, lambda *_: crop_view((0, 0, 4, 4), 4))


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


def test_raw_is_numbered_as_ffcv_numbers_it():
    need_ffcv()
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert IMAGE_MODES["raw"] == RAW
