import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from karat_scale.data.decoders import make_decoder
from karat_scale.data.decoders.decode import UndecodableImageError, View, crop_view, result_size
from karat_scale.data.decoders.native import NativeDecoder, NativeRecoder
from karat_scale.foundation import native_build
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import DataConfig
from tests.conftest import forked, karat_environment
from tests.warm import run_code

pytestmark = pytest.mark.usefixtures("native_runs")
VIEWS = [
    crop_view((0, 0, 150, 110), 40),
    crop_view((17, 9, 101, 77), 64),
    crop_view((140, 100, 10, 10), 33),
    crop_view((63, 31, 1, 1), 5),
    View((3, 2, 140, 100), (4.3, 2.6, 138.9, 99.1), (47, 31)),
]


def pixels_of(decoder, encode_jpeg):
    """Return the views of a few photos as one string of bytes."""
    return b"".join(
        decoder.read(encode_jpeg(150, 110, seed, progressive=seed == 2), lambda *_, view=view: view).tobytes()
        for seed in range(3)
        for view in VIEWS
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_instruction_set_gives_the_same_pixels(encode_jpeg, interpolation, monkeypatch):
    expected = pixels_of(NativeDecoder(interpolation, 10**6), encode_jpeg)
    for name in (*native_build._available_instruction_sets(), native_build.PLAIN):
        monkeypatch.setenv("KARAT_CPU_ISA", name)
        assert pixels_of(NativeDecoder(interpolation, 10**6), encode_jpeg) == expected, name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_flat_colour_stays_what_it_is(encode_flat, interpolation):
    decoder = NativeDecoder(interpolation, 10**8)
    for width, height, view in [
        (40, 30, crop_view((3, 5, 31, 20), 57)),
        (40, 30, View((2, 1, 39, 29), (3.7, 2.2, 37.1, 26.3), (21, 13))),
        # A filter of thousands of weights, each next to nothing.
        (20_000, 9, crop_view((0, 0, 20_000, 9), 3)),
    ]:
        assert np.unique(decoder.read(encode_flat(width, height), lambda *_, view=view: view)).tolist() == [119]


def test_a_decoder_serves_threads_and_a_forked_process(encode_jpeg):
    decoder = NativeDecoder("bicubic", 10**6)
    expected = pixels_of(decoder, encode_jpeg)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pixels_of(decoder, encode_jpeg), range(12)))
    assert set(found) == {expected}
    decoder = NativeDecoder("bicubic", 10**6)
    expected = pixels_of(decoder, encode_jpeg)

    def read() -> None:
        assert pixels_of(decoder, encode_jpeg) == expected

    assert os.waitpid(forked(read), 0)[1] == 0


def test_a_progressive_file_without_its_last_scans_is_left_to_pillow(encode_jpeg):
    whole = encode_jpeg(90, 70, progressive=True)
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    cut = whole[: scans[3]] + b"\xff\xd9"
    view = crop_view((10, 10, 70, 50), 40)
    pillow = make_decoder(DataConfig(path="-", decoder="pillow"), "bilinear")
    native = NativeDecoder("bilinear", 10**6)
    assert np.array_equal(native.read(cut, lambda *_: view), pillow.read(cut, lambda *_: view))


def test_memory_does_not_grow(encode_jpeg):
    decoder = NativeDecoder("bicubic", 10**6)
    photos = [encode_jpeg(160, 120, seed, progressive=seed == 1) for seed in range(3)]
    photos.append(photos[0][:-300])
    view = crop_view((5, 5, 140, 100), 96)

    def work(times):
        for number in range(times):
            try:
                decoder.read(photos[number % 4], lambda *_: view)
            except UndecodableImageError:
                assert number % 4 == 3
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared  # pages of libraries come and go

    before = work(600)
    assert work(3000) - before < 4 << 20


def test_asked_for_by_name_it_must_run(monkeypatch):
    monkeypatch.setenv("KARAT_CPU_ISA", "none such")
    with pytest.raises(RecipeError, match=r"data\.decoder = native cannot run: .*apt-get install g\+\+ libjpeg-dev"):
        make_decoder(DataConfig(path="-", decoder="native"), "bicubic")
    assert make_decoder(DataConfig(path="-"), "bicubic").name == "torchvision"


def test_without_a_compiler_auto_takes_the_next_with_one_notice(tmp_path):
    code = (
        "import warnings\n"
        "from karat_scale.data.decoders import make_decoder\n"
        "from karat_scale.recipe import DataConfig\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [make_decoder(DataConfig(path='-'), 'bicubic').name for _ in range(2)]\n"
        "print(*names, *(w.message for w in told if 'decoder' in str(w.message)), sep='; ')\n"
    )
    environment = karat_environment() | {"CXX": "no-such-compiler", "KARAT_CACHE_DIR": str(tmp_path)}
    told = run_code(code, environments=[environment], directory=tmp_path).stdout
    assert told.startswith("torchvision; torchvision; the native JPEG decoder is not available: ")
    assert told.count("not available") == 1


SIZES = [(150, 110), (97, 131), (64, 64), (31, 33), (1, 5), (700, 301)]


def opened(data):
    return Image.open(io.BytesIO(data))


def pillow(data, short_side, quality):
    image = opened(data).convert("RGB")
    buffer = io.BytesIO()
    image.resize(result_size(*image.size, short_side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_the_image_and_the_file_are_as_pillows(encode_jpeg, size):
    for subsampling in range(3):
        data = encode_jpeg(*size, 3, subsampling=subsampling, progressive=subsampling == 1)
        for quality in (5, 90, 100):
            ours, theirs = (
                opened(found) for found in (NativeRecoder().shrink(data, 48, quality, 2), pillow(data, 48, quality))
            )
            assert (ours.size, ours.quantization, ours.layer) == (theirs.size, theirs.quantization, theirs.layer)
        # Without a resize, ours keeps the stored colours, and Pillow smooths them on the way through RGB.
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
