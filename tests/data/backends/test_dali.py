"""Tests of the dali backend: DALI decodes, and the rest is the same as in the other backends."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from karat_scale.data.backends import ImageSpec, gpu_decoders
from karat_scale.data.backends.gpu_decoders import BatchDecodingBackend, DaliDecoder, Request
from karat_scale.data.backends.images import open_shards
from karat_scale.data.decoders.decode import crop_view
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.shards.tars import EncodedSample
from karat_scale.foundation.errors import DataError
from tests.conftest import wait_until
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE, contents, hollow, noise, odd_samples
from tests.data.conftest import encode, photo
from tests.data.tars import tar_files


@pytest.mark.parametrize(("workers", "order"), [(0, "full"), (1, "block"), (3, "full"), (3, "block")])
def test_batches_are_those_of_webdataset_and_torchvision_to_the_bit(make_shards, dali, webdataset, workers, order):
    directory = make_shards()
    policy = {"order": order, "block_samples": 4, "window_blocks": 2}
    seen = []
    for backend in (dali(directory, workers=workers, **policy), webdataset(directory, **policy)):
        # The paper's whole augmentation, over an epoch's end.
        plan = TrainPlan(5, backend.num_train, 12, 6, 0, 1, order, 4, 2)
        train = contents(backend.train_batches(plan.slices(1, 7)))
        seen.append((train, contents(backend.eval_batches(EvalPlan(backend.num_val, 4, 0, 1).slices()))))
    assert [len(part) for part in seen[0]] == [12, 3]
    assert seen[0] == seen[1]
    (batch,) = dali(directory, workers=workers).eval_batches([BatchSlice(0, 0, np.array([-1, -1]))])
    assert not batch.images.any()
    assert not batch.valid.any()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_batches_that_dali_finishes_hold_the_same_samples(make_shards, data_config, webdataset, interpolation):
    # On the CPU here, as on a GPU, DALI resizes and flips, and rows that it was not given are filled in.
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    samples = list(odd_samples())
    directory, augment = make_shards(train=samples, val=samples), CROP_AND_FLIP.changed(interpolation=interpolation)
    spec = ImageSpec(data_config(directory, backend="dali", workers=1), augment, SIZE, 3, 5)
    finishing = DaliDecoder(1, interpolation, size=SIZE)
    backend = BatchDecodingBackend(open_shards(spec), spec, lambda _: finishing)
    other = webdataset(directory, augment)
    whole = [BatchSlice(2, 0, np.arange(len(samples)))]
    padded = [BatchSlice(2, 0, np.array([*range(len(samples)), -1]))]
    for found, expected in (
        (backend.train_batches(whole), other.train_batches(whole)),
        (backend.eval_batches(padded), other.eval_batches(padded)),
    ):
        (one,), (two,) = found, expected
        assert one.draws == two.draws
        assert torch.equal(one.valid, two.valid)
        assert not one.images[~one.valid].any()
        difference = (one.images.int() - two.images).abs().float().mean(dim=(1, 2, 3))
        assert difference.max() < 0.5
        by_pillow = [i for i, sample in enumerate(samples) if sample.key in ("png", "cmyk", "palette", "alpha")]
        assert not difference[by_pillow].any()
    backend.close()


def damaged(number: int) -> EncodedSample:
    """Return a JPEG with bytes changed, cut out or zeroed, anywhere."""
    rng = np.random.default_rng(number)
    data = bytearray(encode(noise(number), quality=90))
    at = int(rng.integers(2, len(data) - 300))
    if number % 3 == 0:
        del data[at : at + 200]
    elif number % 3 == 1:
        data[at : at + 200] = bytes(200)
    else:
        for place in rng.integers(2, len(data) - 2, 4).tolist():
            data[place] = int(rng.integers(200, 256))
    return EncodedSample(f"damaged-{number}", "jpg", bytes(data), 0)


def with_hollow(make_sample) -> list[EncodedSample]:
    samples = [make_sample(i) for i in range(10)]
    samples[4], samples[8], samples[9] = hollow(4), hollow(8), hollow(9)
    return samples


def odd_set(sample_data) -> list[EncodedSample]:
    files = tar_files(sample_data / "odd_jpegs.tar").items()
    return [EncodedSample(name, "jpg", data, number % 3) for number, (name, data) in enumerate(files)]


@pytest.mark.parametrize("kind", ["odd", "odd set", "damaged", "hollow"])
def test_bad_images_are_judged_and_replaced_as_elsewhere(make_shards, make_sample, request, dali, webdataset, kind):
    if kind == "odd set":
        samples = odd_set(request.getfixturevalue("sample_data"))
    else:
        samples = {"odd": [*odd_samples()], "hollow": with_hollow(make_sample), "damaged": [*map(damaged, range(60))]}[
            kind
        ]
    directory, count = make_shards(train=samples, val=samples), len(samples)
    slices = [BatchSlice(0, start, np.arange(start, min(start + 2, count))) for start in range(0, count, 2)]
    slices += [BatchSlice(1, 0, np.arange(count))]
    one, two = dali(directory, on_bad_sample="skip"), webdataset(directory, on_bad_sample="skip")
    train, evaluated = contents(one.train_batches(slices)), contents(one.eval_batches(slices))
    assert train == contents(two.train_batches(slices))
    assert evaluated == contents(two.eval_batches(slices))
    bad = {sample.key for batch in evaluated for sample in batch[-1]}
    if kind == "odd set":
        assert bad == {sample.key for sample in samples if "truncated_jpeg" in sample.key or "hdr" in sample.key}
    elif kind == "hollow":
        assert train[5][4] == [0, 1, 2, 3, 5, 5, 6, 7, 0, 0]  # the samples' ids
        assert [i for i in range(10) if not evaluated[5][5][i]] == [4, 8, 9]
    else:
        assert bool(bad) == (kind == "damaged")


def crops(numbers) -> Request:
    """Return a request for parts of photos."""
    views = [crop_view((number % 5, number % 3, 30, 20), SIZE) for number in numbers]
    datas = [encode(photo(number, 40 + number % 9, 38 + number % 7), quality=95) for number in numbers]
    return Request([np.frombuffer(data, dtype=np.uint8) for data in datas], views, [False] * len(datas))


@pytest.fixture
def decoder():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install -e '.[dali]'")
    return DaliDecoder(threads=2, interpolation="bicubic")


def test_an_error_in_what_feeds_it_comes_after_the_batches_before_it(decoder):
    asked = crops([0, 1])

    def requests():
        yield asked
        yield asked
        raise RuntimeError("odd")

    decoded = decoder.decoded(requests())
    assert [len(next(decoded)), len(next(decoded))] == [2, 2]
    with pytest.raises(RuntimeError, match=r"^odd$"):
        next(decoded)


# The wording of DALI 2.4, which has the cause in the last paragraph but one.
MET = """Critical error in pipeline:
Error in {where} operator `nvidia.dali.fn.decoders.image_slice`,
which was used in the pipeline definition with the following traceback:

  File "/opt/CUDA/pipeline.py", line 143, in _build
    images = fn.decoders.image_slice(

encountered:

{met}
Current pipeline object is no longer valid."""


def test_an_error_of_the_gpu_is_not_taken_for_a_bad_image(decoder, monkeypatch):
    """An error of the GPU stops the run. Before the fix, all later batches were read again on the CPU."""

    class Failing:
        def run(self):
            raise RuntimeError(MET.format(where="MIXED", met=met))

    monkeypatch.setattr(DaliDecoder, "_build", lambda *_: Failing())
    for met in (
        "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
        "CUDA allocation failed",
        "Can't allocate 123456 bytes on device 0.",
        "nvImageCodec failure: '#6'",
    ):
        with pytest.raises(RuntimeError, match=r"^DALI failed on the GPU, not for a bad image: ") as caught:
            list(decoder.decoded([crops([0, 1])]))
        assert str(caught.value).endswith(met.splitlines()[0])

    class Broken:  # a stream with an error of CUDA that DALI's message does not contain
        def synchronize(self):
            raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")

    error = RuntimeError(MET.format(where="MIXED", met="Failed to decode sample #0 :"))
    with pytest.raises(RuntimeError, match=r"not for a bad image: CUDA error: unspecified launch failure$"):
        gpu_decoders._raise_unless_of_an_image(error, Broken())
    gpu_decoders._raise_unless_of_an_image(error, None)


def test_a_gpu_that_is_not_there_is_said_before_any_image(decoder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DataError, match=r"^DALI does not start: .*CUDA is not available"):
        next(DaliDecoder(1, "bicubic", device_id=0).decoded([crops([0])]))


def test_results_are_taken_over_on_a_stream_of_their_own(monkeypatch, decoder):
    """Results are taken over on their own stream.

    Before the fix, the reading thread waited for the default stream, and so for the current training step.
    """
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
    (result,) = DaliDecoder(1, "bicubic", size=SIZE, stream=Stream()).decoded([crops([0, 1])])
    assert result.shape == (2, 3, SIZE, SIZE)
    assert seen == ["Stream", "recorded", "waited", "left"]


def test_an_error_of_the_requests_is_raised_although_an_image_fails_before(decoder, monkeypatch):
    """With a deeper queue, DALI has met the error and holds the third request when the second one's image fails."""
    monkeypatch.setattr(gpu_decoders, "QUEUE_DEPTH", 3)
    asked = []

    def requests():
        for number in range(3):
            asked.append(number)
            one = crops([number])
            yield one if number != 1 else replace(one, data=[np.frombuffer(hollow(number).data, dtype=np.uint8)])
        asked.append("all")
        raise DataError("the store does not answer")

    decoded = decoder.decoded(requests())
    found = [(one and len(one), asked[-1]) for one in (next(decoded), next(decoded), next(decoded))]
    assert found == [(1, "all"), (None, "all"), (1, "all")]
    with pytest.raises(DataError, match="the store does not answer"):
        next(decoded)


def tasks() -> int:
    return psutil.Process().num_threads()


def test_closing_and_forgetting_end_the_threads_and_the_iterators(make_shards, dali, cheap_augment):
    directory = make_shards()
    list(dali(directory, cheap_augment, workers=3).train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 2)))
    gc.collect()
    before, files = tasks(), psutil.Process().num_fds()
    backend = dali(directory, cheap_augment, workers=3)
    batches = backend.train_batches(TrainPlan(0, 40, 8, 8, 0, 1).slices(0, 10**6))
    next(batches)
    forgotten = backend.eval_batches(EvalPlan(11, 2, 0, 1).slices())
    next(forgotten)
    assert tasks() > before
    del forgotten
    backend.close()
    gc.collect()
    assert next(batches, None) is None
    wait_until(lambda: tasks() <= before and psutil.Process().num_fds() <= files)


def test_eighty_bad_batches_leave_nothing_behind(make_shards, make_sample, dali, cheap_augment):
    samples = [make_sample(i) for i in range(8)]
    samples[1] = hollow(1)
    backend = dali(make_shards(train=samples), cheap_augment, on_bad_sample="skip")
    slices = [BatchSlice(epoch, number, np.arange(2)) for epoch in range(2) for number in range(40)]
    after = []
    for number, batch in enumerate(backend.train_batches(slices)):
        assert batch.sample_ids.tolist() == [0, 2]
        if number in (20, 79):
            gc.collect()
            after.append((tasks(), psutil.Process().num_fds()))
    (threads_then, files), (threads_now, files_now) = after
    assert threads_now <= threads_then + 4  # those of one pipeline, which may still be ending
    assert files_now <= files
