import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.data.backends import dali_pipeline
from karat_scale.data.backends.dali_pipeline import DaliDecoder
from karat_scale.data.backends.images import Request
from karat_scale.data.decoders.decode import View, centre_view, crop_view
from karat_scale.data.decoders.pillow import RESAMPLE, resized
from karat_scale.foundation.errors import DataError
from tests.data.conftest import encode, photo

SIZE = 16


@pytest.fixture
def decoder() -> DaliDecoder:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
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


def test_a_batch_that_cannot_be_decoded_is_named_and_the_rest_continue(decoder):
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


# As DALI 2.4 words them: what was met is the last paragraph but one.
MET = """Critical error in pipeline:
Error in {where} operator `nvidia.dali.fn.decoders.image_slice`,
which was used in the pipeline definition with the following traceback:

  File "/opt/CUDA/pipeline.py", line 143, in _build
    images = fn.decoders.image_slice(

encountered:

{met}
Current pipeline object is no longer valid."""


@pytest.mark.parametrize(
    "met",
    [
        "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
        "CUDA allocation failed",
        "Can't allocate 123456 bytes on device 0.",
        "nvImageCodec failure: '#6'",
    ],
)
def test_an_error_of_the_gpu_is_not_taken_for_a_bad_image(decoder, monkeypatch, met):
    """Before, every batch was read again on the CPU, for the rest of the run."""

    class Failing:
        def run(self):
            raise RuntimeError(MET.format(where="MIXED", met=met))

    monkeypatch.setattr(DaliDecoder, "_build", lambda *_: Failing())
    with pytest.raises(RuntimeError, match=r"^DALI failed on the GPU, not for a bad image: ") as caught:
        list(decoder.decoded([crops([0, 1])[1]]))
    assert str(caught.value).endswith(met.splitlines()[0])


def test_an_error_of_cuda_that_dali_does_not_word_is_found_on_the_stream(decoder, monkeypatch):
    class Broken:
        def synchronize(self):
            raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")

    error = RuntimeError(MET.format(where="MIXED", met="Failed to decode sample #0 :"))
    with pytest.raises(RuntimeError, match=r"not for a bad image: CUDA error: unspecified launch failure$"):
        dali_pipeline._raise_unless_of_an_image(error, Broken())
    dali_pipeline._raise_unless_of_an_image(error, None)


def test_a_gpu_that_is_not_there_is_said_before_any_image():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DataError, match=r"^DALI does not start: .*CUDA is not available"):
        next(DaliDecoder(1, "bicubic", device_id=0).decoded([crops([0])[1]]))


def test_results_are_taken_over_on_a_stream_of_their_own(monkeypatch, decoder):
    """Before, the thread that reads waited for the default stream, so for the training step under way."""
    seen: list[str] = []

    class Stream:
        def record_event(self):
            seen.append("recorded")
            return self

        def synchronize(self):
            seen.append("waited")

    @contextmanager
    def entered(stream):
        seen.append(type(stream).__name__)
        yield
        seen.append("left")

    monkeypatch.setattr("torch.cuda.stream", entered)
    monkeypatch.setattr("torch.cuda.current_stream", lambda *_: pytest.fail("the training stream was asked for"))
    (result,) = DaliDecoder(1, "bicubic", size=SIZE, stream=Stream()).decoded([crops([0, 1])[1]])
    assert result.shape == (2, 3, SIZE, SIZE)
    assert seen == ["Stream", "recorded", "waited", "left"]


def test_an_error_of_the_requests_is_raised_although_an_image_fails_before(decoder, monkeypatch):
    class FailsAtTheSecond:
        """Asks for two batches more than it has decoded, as DALI does."""

        def __init__(self, inputs):
            self.inputs, self.ahead, self.done = inputs, [], 0

        def run(self):
            while len(self.ahead) < self.done + 3 and (one := next(self.inputs, None)) is not None:
                self.ahead.append(one)
            if self.done == len(self.ahead):
                raise StopIteration
            self.done += 1
            if self.done == 2:
                raise RuntimeError(MET.format(where="CPU", met="Failed to decode sample #0 :"))
            return ("decoded",)

    def requests():
        for number in range(3):
            yield crops([number])[1]
        raise DataError("the store does not answer")

    monkeypatch.setattr(DaliDecoder, "_build", lambda self, source, _: FailsAtTheSecond(source))
    monkeypatch.setattr(DaliDecoder, "_result", lambda self, output: output)
    found = []
    with pytest.raises(DataError, match="the store does not answer"):
        found += iter(decoder.decoded(requests()))
    assert found == ["decoded", None, "decoded"]
