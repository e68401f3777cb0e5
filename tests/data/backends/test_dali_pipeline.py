import io

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.backends.dali_pipeline import DaliDecoder, Request
from karat_scale.data.decoders.pillow import RESAMPLE, resized
from karat_scale.data.view import View, centre_view, crop_view
from tests.data.conftest import encode, photo

SIZE = 16


@pytest.fixture
def decoder() -> DaliDecoder:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'karat-scale[dali]'")
    return DaliDecoder(threads=2, interpolation="bicubic")


def image(number: int) -> tuple[np.ndarray, bytes]:
    """A photo's pixels as Pillow decodes them, and its JPEG."""
    data = encode(photo(number, 40 + number % 9, 38 + number % 7), quality=95)
    return np.asarray(Image.open(io.BytesIO(data))), data


def request(datas: list[bytes], views: list[View], flips: list[bool] | None = None) -> Request:
    return Request([np.frombuffer(data, dtype=np.uint8) for data in datas], views, flips or [False] * len(datas))


def crops(numbers) -> tuple[list[np.ndarray], Request]:
    views = [crop_view((number % 5, number % 3, 30, 20), SIZE) for number in numbers]
    images = [image(number) for number in numbers]
    regions = [
        pixels[view.region[1] : view.region[3], view.region[0] : view.region[2]]
        for (pixels, _), view in zip(images, views, strict=True)
    ]
    return regions, request([data for _, data in images], views)


def equal(decoded: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(decoded) == len(expected) and all(map(np.array_equal, decoded, expected))


def test_regions_are_pillows_to_the_bit_in_batches_of_any_size(decoder):
    batches = [crops(numbers) for numbers in ([0, 1], [2], [3, 4, 5, 6], [7, 8], range(9))]
    decoded = decoder.decoded(asked for _, asked in batches)
    for regions, _ in batches:
        assert equal(next(decoded), regions)
    assert next(decoded, None) is None


def test_a_batch_that_cannot_be_decoded_is_named_and_the_rest_go_on(decoder):
    batches = [crops([number, number + 1]) for number in range(9)]
    fed = []

    def requests():
        for number, (_, asked) in enumerate(batches):
            fed.append(number)
            if number in (0, 3, 4, 8):
                asked.data[1] = asked.data[1][:200]
            yield asked

    results = [decoded and [region.copy() for region in decoded] for decoded in decoder.decoded(requests())]
    assert [number for number, result in enumerate(results) if result is None] == [0, 3, 4, 8]
    assert all(result is None or equal(result, batches[number][0]) for number, result in enumerate(results))
    assert fed == list(range(9))  # each once


def test_an_error_in_what_feeds_it_comes_after_the_batches_before_it(decoder):
    regions, asked = crops([0, 1])

    def requests():
        yield asked
        yield asked
        raise RuntimeError("odd")

    decoded = decoder.decoded(requests())
    assert equal(next(decoded), regions)
    assert equal(next(decoded), regions)
    with pytest.raises(RuntimeError, match=r"^odd$"):
        next(decoded)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["crop", "centre"])
def test_what_a_gpu_would_do_is_pillows_within_half_a_grey_level_on_average(decoder, interpolation, kind):
    # The same graph, on the CPU.
    numbers, flips = range(8), [number % 3 == 0 for number in range(8)]
    images = [image(number) for number in numbers]
    views = [
        crop_view((number % 5, 2, 30, 12 + number), SIZE)
        if kind == "crop"
        else centre_view(pixels.shape[1], pixels.shape[0], SIZE + 2, SIZE)
        for number, (pixels, _) in enumerate(images)
    ]
    asked = request([data for _, data in images], views, flips)
    (result,) = DaliDecoder(2, interpolation, size=SIZE).decoded([asked])
    assert result.shape == (8, 3, SIZE, SIZE)
    assert result.is_contiguous()
    for row, (pixels, _) in enumerate(images):
        expected = np.asarray(resized(Image.fromarray(pixels), views[row], RESAMPLE[interpolation]))
        expected = expected[:, ::-1] if flips[row] else expected
        difference = np.abs(result[row].permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < 0.5
        assert difference.max() <= 16  # at the edges
