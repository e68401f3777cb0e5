"""The nvjpeg backend on the CPU: libjpeg-turbo decodes in place of nvJPEG, and the rest is the code for a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from karat_scale.data import ExactLoader
from karat_scale.data.augmentation.device_augment import resize_on_device
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.backends.gpu_decoders import BatchDecodingBackend, NvjpegDecoder, Request, _is_of_an_image, gpu_of
from karat_scale.data.backends.images import open_shards
from karat_scale.data.decoders.decode import centre_view, crop_view
from karat_scale.data.decoders.libraries import RESAMPLE, find_jpeg_decoder, resized
from karat_scale.data.plan import BatchSlice, EvalPlan, TrainPlan
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError, RecipeError
from karat_scale.recipe import AugmentConfig, DataConfig
from tests.conftest import karat_here
from tests.data.backends.helpers import CROP_AND_FLIP, SIZE, broken, hollow, odd_samples
from tests.data.conftest import photo

ON_THE_DEVICE = AugmentConfig(run_on="device")


def nvjpeg_on_the_cpu(config, augment):
    spec = ImageSpec(config, augment, SIZE, 3, 5)
    decoder = NvjpegDecoder(find_jpeg_decoder(torch.device("cpu")), SIZE, augment.interpolation)
    return BatchDecodingBackend(open_shards(spec), spec, lambda _: decoder)


SMALLER, LARGER, CENTRE = crop_view((3, 5, 60, 41), 24), crop_view((0, 0, 7, 9), 24), centre_view(101, 83, 27, 24)
LARGER_CENTRE = centre_view(83, 101, 240, 224)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_differs_from_pillows_by_one_level_at_most(interpolation):
    for view in (SMALLER, LARGER, CENTRE, LARGER_CENTRE):
        width, height = (83, 101) if view.size == (224, 224) else (101, 83)
        image = Image.fromarray(photo(1, width, height))
        left, top, right, bottom = view.region
        region = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[:, top:bottom, left:right]
        expected = np.asarray(resized(image, view, RESAMPLE[interpolation])).transpose(2, 0, 1).astype(int)
        difference = (resize_on_device(region, view, interpolation).int() - torch.from_numpy(expected)).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.05


def tf32(x):
    """Return what tensor cores read of float32 numbers: 11 bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_products_in_tf32_are_as_exact_as_in_float32(monkeypatch):
    left, top, right, bottom = CENTRE.region
    region = torch.from_numpy(photo(1, 101, 83).copy()).permute(2, 0, 1)[:, top:bottom, left:right]
    expected = resize_on_device(region, CENTRE, "bicubic")
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(tf32(a), tf32(b)))
    assert torch.equal(resize_on_device(region, CENTRE, "bicubic"), expected)


@pytest.mark.parametrize("augment", [CROP_AND_FLIP, ON_THE_DEVICE], ids=["crop and flip", "augmented on the device"])
def test_samples_and_draws_are_those_of_webdataset_and_pixels_nearly(make_shards, data_config, webdataset, augment):
    samples = list(odd_samples())
    directory = make_shards(train=samples, val=samples)
    ours, other = nvjpeg_on_the_cpu(data_config(directory), augment), webdataset(directory, augment)
    slices = list(TrainPlan(5, len(samples), 4, 2, 0, 1).slices(0, 5))
    evaluated = list(EvalPlan(len(samples), 4, 0, 1).slices())
    for found, expected in (
        (ours.train_batches(slices), other.train_batches(slices)),
        (ours.eval_batches(evaluated), other.eval_batches(evaluated)),
    ):
        for one, two in zip(found, expected, strict=True):
            assert one.draws == two.draws
            assert torch.equal(one.labels, two.labels)
            assert torch.equal(one.sample_ids, two.sample_ids)
            assert torch.equal(one.valid, two.valid)
            difference = (one.images.int() - two.images).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.1
    ours.close()


def test_a_bad_image_is_skipped_or_stops_the_run(make_shards, data_config, webdataset):
    samples = [*odd_samples(), hollow(1), broken(2)]
    directory = make_shards(train=samples, val=samples)
    slices = [BatchSlice(0, 0, np.arange(len(samples))), BatchSlice(0, 1, np.arange(4))]
    skipping = nvjpeg_on_the_cpu(data_config(directory, on_bad_sample="skip"), CROP_AND_FLIP)
    first, second = skipping.train_batches(slices)
    expected, _ = webdataset(directory, CROP_AND_FLIP, on_bad_sample="skip").train_batches(slices)
    assert {bad.key for bad in first.bad} == {bad.key for bad in expected.bad} == {"hollow-1", "broken-2"}
    assert torch.equal(first.images, expected.images)  # the reference decoder makes a batch with a bad image
    assert not second.bad
    stopping = nvjpeg_on_the_cpu(data_config(directory), CROP_AND_FLIP)
    with pytest.raises(DataError, match="hollow-1"):
        list(stopping.train_batches(slices))


class BusyStream:
    """A stream that is busy from the end of a decode until `synchronize` returns.

    That waits up to 0.3 s for another thread to decode on the busy stream.
    """

    def __init__(self):
        self.is_busy, self.others = False, threading.Event()

    def record_event(self):
        return self

    def synchronize(self):
        self.others.wait(0.3)
        self.is_busy = False


def test_no_thread_decodes_into_memory_that_another_still_reads(make_shards):
    """The decoder writes on its own stream, where memory that another thread has just freed may be allocated again."""
    stream, decode, met = BusyStream(), find_jpeg_decoder(torch.device("cpu")), []

    def noting(encoded, device):
        met.append(stream.is_busy)
        if stream.is_busy:
            stream.others.set()
        images = decode.function(encoded, device=device)
        stream.is_busy = True
        return images

    decoder = NvjpegDecoder(replace(decode, function=noting), SIZE, "bilinear", stream)
    split = ShardSplit(make_shards(), "train", 3)
    requests = [
        [Request([np.frombuffer(split.read(i), np.uint8)], [crop_view((0, 0, 9, 9), SIZE)], [False])] for i in (0, 1)
    ]
    expected = [next(replace(decoder, decode=decode, stream=None).decoded(one)) for one in requests]
    with ThreadPoolExecutor(2) as pool:  # training and evaluation
        found = list(pool.map(lambda one: next(decoder.decoded(one)), requests))
    assert met == [False, False]
    assert all(map(torch.equal, found, expected))


OF_AN_IMAGE = ("Failed to get image info: 3", "Failed to decode batch: 4", "Unknown chroma subsampling")
OTHERS = (
    "Failed to decode batch: 5",
    "jpeg stream: 6",
    "decode_jpegs_cuda: torchvision not compiled with nvJPEG support",
)


def test_only_an_error_of_an_image_is_passed_to_the_reference_decoder():
    for message in (*OF_AN_IMAGE, "nvjpegDecode failed: 3", *OTHERS):
        error = RuntimeError(f"Error while decoding JPEG images: {message}\n  more")
        assert _is_of_an_image(error) is (message not in OTHERS), message


def test_without_a_gpu_or_with_augmentation_on_the_cpu_it_is_refused(make_shards, data_config, recipe_file, capsys):
    config = data_config(make_shards(), backend="nvjpeg")
    with pytest.raises(RecipeError, match=r"uses none; set run\.device=cuda, or data\.backend=webdataset"):
        open_backend(ImageSpec(config, ON_THE_DEVICE, SIZE, 3, 5))
    with pytest.raises(RecipeError, match=r"set augment\.run_on=device"):
        open_backend(ImageSpec(config, AugmentConfig(), SIZE, 3, 5))
    assert karat_here("train", str(recipe_file), "data.backend=nvjpeg", "augment.run_on=device") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_gpu_is_that_of_the_loaders_device(make_shards):
    """Before the fix, it was the process's current one, even for a loader on the CPU."""
    own = {"global_batch": 8, "image_size": SIZE, "workers": 0, "backend": "nvjpeg", "augment": {"run_on": "device"}}
    with pytest.raises(
        RecipeError, match=r"^backend = nvjpeg decodes .* uses none; set device=cuda, or backend=webdat"
    ):
        ExactLoader(make_shards(), **own)
    for device, number in {"cuda:1": 1, "cuda:0": 0, "cpu": None, "cpu:0": None}.items():
        spec = ImageSpec(DataConfig(path="x"), ON_THE_DEVICE, SIZE, 3, 5, device=torch.device(device))
        assert gpu_of(spec) == number


@pytest.mark.slow
def test_commands_that_need_no_gpu_read_its_shards_otherwise(recipe_file, tmp_path, capsys):
    recipe = (str(recipe_file), "data.backend=nvjpeg", "augment.run_on=device")
    assert karat_here("plan", *recipe, "--dry-run") == 0, capsys.readouterr().err
    assert karat_here("show", *recipe, "--out", str(tmp_path / "batch.png")) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    assert karat_here("train", str(recipe_file), "augment.run_on=device", f"run.dir={run}", "train.max_steps=1") == 0
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("backend: webdataset", "backend: nvjpeg"))
    assert karat_here("analyze", str(run), "--only", "accuracy") == 0, capsys.readouterr().err
